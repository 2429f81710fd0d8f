"""Quantized weights: the values of bitsandbytes, products and gradients, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from training_runs import random_batches, settings_for

from llava_jax.models import quantized
from llava_jax.models.llava import abstract_params
from llava_jax.training.step import loss_and_gradients

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

# Hidden and intermediate sizes of SmolLM2 and, with fewer outputs, of 7B and 13B; one row and one block of each.
SHAPES = [(300, 576), (576, 1536), (64, 4096), (48, 11008), (24, 13824), (1, 64), (3, 64), (1000, 128)]


def weights(outputs: int, inputs: int, kind: str) -> np.ndarray:
    """float32[O, I] as PyTorch stores it."""
    rng = np.random.default_rng(outputs + inputs)
    found = rng.standard_normal((outputs, inputs)).astype(np.float32) * 0.02
    if kind == "outliers":
        found[rng.random(found.shape) < 1e-3] *= 50
    if kind == "zeros":
        found[:, :64] = 0
    return found


def by_bitsandbytes(weight: torch.Tensor):
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.dtype = torch.float32
    return codes, state, functional.dequantize_4bit(codes, state).numpy()


@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_dequantizes_to_the_values_of_bitsandbytes(shape, kind):
    weight = torch.from_numpy(weights(*shape, kind)).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    codes, state, expected = by_bitsandbytes(weight)
    kernel = jnp.asarray(weight.float().numpy().T, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    parts = quantized.quantize(kernel, "nf4")
    found = np.asarray(quantized.dequantize(parts, shape[1], jnp.float32)).T

    # A mean that is rounded otherwise may move a scale that lies between two codes to the other one.
    absmax = np.asarray(parts["absmax"]).T.reshape(-1)
    off = absmax.astype(int) != state.absmax.numpy()
    off &= np.repeat(state.state2.absmax.numpy() > 0, 256)[: off.size]  # of equal scales any code is right
    assert off.mean() < 1e-3
    assert np.abs(absmax.astype(int) - state.absmax.numpy())[off].max(initial=0) <= 1
    np.testing.assert_allclose(parts["nested_absmax"], state.state2.absmax, rtol=1e-6, atol=1e-9)
    same = ~np.repeat(off, 64).reshape(shape)
    # A scale is a sum, whose terms are rounded: in outliers' blocks they are larger than it.
    last_rounding = 2.0**-23 * np.abs(expected).max()
    np.testing.assert_allclose(found[same], expected[same], rtol=2.0**-22, atol=last_rounding)
    packed = codes.numpy().reshape(-1)
    values = np.stack([packed >> 4, packed & 15], 1).reshape(-1, 64)
    high, low = np.split(values, 2, axis=1)  # our byte i has codes i and 32 + i
    np.testing.assert_array_equal(np.asarray(parts["codes"]).T.reshape(-1, 32), high << 4 | low)


def test_the_map_of_scales_is_that_of_bitsandbytes():
    expected = functional.create_dynamic_map().numpy()
    np.testing.assert_allclose(quantized.dynamic_map(jnp.arange(256)), expected, rtol=2e-7, atol=0)
    grid = np.linspace(-1, 1, 65536).astype(np.float32)
    blocks = np.ones((-(-grid.size // 255), 256), np.float32)  # each with a 1, which is its largest
    blocks[:, :255].reshape(-1)[:] = 0
    padded = np.resize(grid, blocks[:, :255].size)
    blocks[:, :255] = padded.reshape(-1, 255)
    codes = functional.quantize_blockwise(torch.from_numpy(blocks.reshape(-1)), blocksize=256)[0].numpy()
    found = quantized._nearest_codes()
    np.testing.assert_array_equal(codes.reshape(-1, 256)[:, :255].reshape(-1)[: grid.size], found)


def test_the_example_of_a_block():
    values = [0.5, -1, 0.25, 2, 0, -0.1, 0.07, -2] + [0.01] * 56
    codes, absmax = quantized.quantize_blocks(jnp.asarray(values, jnp.float32)[:, None])
    assert np.asarray(codes)[:8, 0].tolist() == [code << 4 | 7 for code in (10, 2, 9, 15, 7, 6, 7, 0)]
    assert absmax.tolist() == [[2.0]]
    back = quantized.nf4_values(jnp.asarray([10, 2, 9, 15, 7, 6, 7, 0])) * 2
    np.testing.assert_allclose(back, [0.4922246, -1.0501461, 0.3218604, 2, 0, -0.1821001, 0, -2], atol=1e-7)
    between = (quantized.NF4[:-1] + quantized.NF4[1:]) / 2  # belongs to the lower value
    block = np.concatenate([between, [1.0], np.zeros(48)]).astype(np.float32)
    found = np.asarray(quantized.quantize_blocks(jnp.asarray(block)[:, None])[0])[:, 0] >> 4
    np.testing.assert_array_equal(found[:15], np.arange(15))


def test_int8_is_the_vectorwise_int8_of_bitsandbytes():
    weight = weights(40, 576, "outliers")
    expected, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
    parts = quantized.quantize(jnp.asarray(weight.astype(np.float16).T), "int8")
    np.testing.assert_array_equal(np.asarray(parts["codes"]).T, expected)
    np.testing.assert_allclose(parts["scales"], absmax.numpy() / 127, rtol=1e-6)


@pytest.mark.parametrize("inputs", [48, 65, 100, 128])
@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_any_width_and_stacks(inputs, base_dtype):
    """The last block of an output may be shorter."""
    stack = np.random.default_rng(0).standard_normal((3, inputs, 10)).astype(np.float32)
    parts = quantized.quantize(jnp.asarray(stack), base_dtype)
    shape = jax.ShapeDtypeStruct(stack.shape, jnp.float32)
    back = np.asarray(quantized.dequantize_stack(parts, shape))
    assert np.sqrt(np.mean((back - stack) ** 2)) < {"int8": 0.01, "nf4": 0.1}[base_dtype]
    for layer in range(3):
        alone = quantized.quantize(jnp.asarray(stack[layer]), base_dtype)
        for part, value in alone.items():
            np.testing.assert_array_equal(value, parts[part][layer], err_msg=part)
    last = stack[:, -(inputs % 64 or 64) :]
    if base_dtype == "nf4":
        np.testing.assert_allclose(quantized.quantize_blocks(stack[0])[1][-1], np.abs(last[0]).max(0))


# ----------------------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_a_quantized_model_computes_as_its_dequantized_one(base_dtype):
    plain = tiny.config(lora=None)
    model = dataclasses.replace(plain, base_dtype=base_dtype)
    params = tiny.quantized_params(tiny.params(plain), model)
    assert jax.eval_shape(lambda: params) == abstract_params(model)
    kernels = {name for name in abstract_params(plain) if name.startswith("llm.layers.") and name.endswith(".kernel")}
    assert abstract_params(plain).keys() - params.keys() == kernels
    dequantized = quantized.dequantized(params, abstract_params(plain))
    (batch,) = random_batches(model, 1)
    train = [name for name in params if name.startswith("projector.")]
    found = {}
    for config, all_params in ((model, params), (plain, dequantized)):
        trainable = {name: all_params[name] for name in train}
        frozen = {name: value for name, value in all_params.items() if name not in trainable}
        settings = settings_for(config, batch)
        found[config.base_dtype] = jax.jit(loss_and_gradients, static_argnums=0)(settings, trainable, frozen, batch)
    (loss, gradients), (expected, expected_gradients) = found[base_dtype], found[""]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-6 * np.abs(gradient).max(), err_msg=name)
