"""Weights in eight bits against what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from llava_jax.inference.quantization import Int8Linear, quantize_decoder
from llava_jax.models.config import TextConfig
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import build
from llava_jax.models.quantized import quantize_int8


def test_each_output_is_rounded_to_its_own_255_steps():
    kernel = jax.random.normal(jax.random.key(0), (64, 5)) * jnp.array([[1e-4, 1.0, 30.0, 0.0, 2.0]])
    quantized, scale = jax.jit(quantize_int8)(kernel)
    assert quantized.dtype == jnp.int8
    np.testing.assert_array_equal(jnp.abs(quantized).max(axis=0), [127, 127, 127, 0, 127])
    error = jnp.abs(quantized * scale[None] - kernel)
    assert (error <= scale[None] / 2 * 1.0001).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_the_rounded_kernel(dtype):
    x = jax.random.normal(jax.random.key(1), (3, 64), dtype)
    kernel, bias = jax.random.normal(jax.random.key(0), (64, 8)), jnp.arange(8.0)
    linear = Int8Linear(kernel, nnx.Param(bias))
    rounded = linear.kernel[...] * linear.scale[...][None]
    expected = x.astype(jnp.float32) @ rounded + bias[None]
    assert linear(x).dtype == dtype
    np.testing.assert_allclose(
        linear(x).astype(jnp.float32), expected, rtol=2**-7 if dtype == jnp.bfloat16 else 1e-5, atol=1e-2
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_decoder_is_near_the_decoder(tied):
    text = TextConfig(tiny.VOCAB, 48, 96, 2, 4, 2, 12, qkv_bias=True, tie_word_embeddings=tied)
    config = tiny.config(text=text)
    params = tiny.params(config)

    def logits(int8: bool) -> tuple[jax.Array, int]:
        model = build(config, jax.tree.map(jnp.copy, params))
        model.llm.unstack_layers()
        if int8:
            quantize_decoder(model.llm)
        cache = KVCache(*((jnp.zeros((1, 2, 256, 12)),) * 2 for _ in "kv"))
        positions = jnp.arange(30)[None]
        hidden, _ = model.llm.extend(model.embed(positions * 7), positions, cache, jnp.zeros((1, 1), jnp.int32))
        return model.llm.logits(hidden), sum(leaf.nbytes for leaf in jax.tree.leaves(model.llm.layers))

    (exact, size), (near, small) = logits(False), logits(True)
    assert small < 0.4 * size
    off = jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < off < 0.03
