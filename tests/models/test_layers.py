"""Shared layers against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_jax.models.layers import LayerNorm, Linear, RMSNorm, stack_layers

D = 48


def random(*shape, seed=0, scale=1.0, offset=0.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale + offset).astype(np.float32)


def test_linear_equals_torch():
    x, weight, bias = random(3, 5, D), random(7, D, seed=1), random(7, seed=2)
    linear = Linear(D, 7, bias=True, rngs=nnx.Rngs(0))
    linear.kernel[...], linear.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)
    expected = torch.nn.functional.linear(*map(torch.from_numpy, (x, weight, bias))).numpy()
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, rtol=0, atol=1e-5)


def test_linear_has_the_gradients_of_torch():
    x, weight, bias, dy = random(3, 5, D), random(7, D, seed=1), random(7, seed=2), random(3, 5, 7, seed=3)
    linear = Linear(D, 7, bias=True, rngs=nnx.Rngs(0))
    linear.kernel[...], linear.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)
    ours, dx = jax.grad(lambda linear, x: (linear(x) * dy).sum(), argnums=(0, 1))(linear, jnp.asarray(x))
    leaves = [torch.from_numpy(value).requires_grad_() for value in (x, weight, bias)]
    torch.nn.functional.linear(*leaves).backward(torch.from_numpy(dy))
    for gradient, leaf in zip((dx, ours.kernel[...].T, ours.bias[...]), leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm_equals_torch(eps):
    x, scale, bias = random(3, 5, D, scale=4, offset=3), random(D, seed=1), random(D, seed=2)
    norm = LayerNorm(D, eps)
    norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    expected = torch.nn.functional.layer_norm(
        torch.from_numpy(x), (D,), torch.from_numpy(scale), torch.from_numpy(bias), eps
    )
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_equals_transformers(eps):
    x, scale = random(3, 5, D, scale=0.3, offset=0.2), random(D, seed=1)
    norm = RMSNorm(D, eps)
    norm.scale[...] = jnp.asarray(scale)
    reference = LlamaRMSNorm(D, eps)
    reference.weight.data = torch.from_numpy(scale)
    np.testing.assert_allclose(norm(jnp.asarray(x)), reference(torch.from_numpy(x)).detach().numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_norms_compute_in_float32_and_round_once(make):
    x = jnp.asarray(random(64, D, scale=3, offset=40)).astype(jnp.bfloat16)
    norm = make(D, 1e-5)
    norm.scale[...] = jnp.asarray(random(D, seed=1))
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_linear_computes_in_the_type_of_its_input():
    linear = Linear(D, 7, bias=True, rngs=nnx.Rngs(0))
    assert linear(jnp.ones((2, D), jnp.bfloat16)).dtype == jnp.bfloat16
    assert linear.kernel.dtype == jnp.float32


def test_stacked_layers_are_initialised_apart():
    stack = stack_layers(lambda rngs: Linear(D, D, bias=True, rngs=rngs), 3, nnx.Rngs(0))
    assert stack.kernel.shape == (3, D, D) and stack.bias.shape == (3, D)
    assert len({float(layer[0, 0]) for layer in stack.kernel[...]}) == 3
    np.testing.assert_allclose(np.std(np.asarray(stack.kernel[...]), axis=(1, 2)), 0.02, rtol=0.1)
