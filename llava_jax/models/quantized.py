"""Frozen weights in 8 or 4 bits, as QLoRA trains adapters on (Dettmers et al. 2023, section 3).

`int8` rounds the weights of each output to 127 levels on either side of 0. `nf4` rounds blocks of 64 inputs of an
output to the 16 values of NormalFloat, relative to the largest of the block, which is itself stored in 8 bits (double
quantization); it dequantizes to the values of bitsandbytes.

A `QuantizedLinear` has these parameters instead of a kernel [I, O]:

  int8   codes int8[I, O], scales float32[O]
  nf4    codes uint8[32 N, O], absmax uint8[N, O], nested_absmax float32[ceil(N O / 256)], offset float32[]

Axes: I inputs, O outputs, N blocks of 64 inputs, the last one filled with zeros.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from llava_jax.cli import UserError
from llava_jax.models.layers import Linear, broadcast_last, project

# NormalFloat (appendix E): the quantiles of N(0, 1), scaled to [-1, 1].
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)
BLOCK = 64  # inputs with a common scale
TINY = float(np.finfo(np.float32).tiny)  # for blocks of zeros
NESTED_BLOCK = 256  # scales with a common scale, in bitsandbytes' order: all of an output, then those of the next
PART = re.compile(r"(?P<linear>llm\.layers\..+)\.(?P<part>codes|scales|absmax|nested_absmax|offset)")
PARTS = {"int8": ("codes", "scales"), "nf4": ("codes", "absmax", "nested_absmax", "offset")}
# The 8-bit map of scales (Dettmers 2015), for code 127 + k and |k| from 2^e to 2^(e+1) - 1: the sign of k times the
# centres of 2^e intervals that divide [0.1, 1] x 10^(e-6). A row has 2^e, their width and the start of the first one.
# The last code means 1.
INTERVALS = (*((2.0**e, 0.9 * 10.0 ** (e - 6) / 2**e, 0.1 * 10.0 ** (e - 6)) for e in range(7)), (128.0, 0.0, 1.0))

Parts = dict[str, jax.Array]


class QuantizedLinear(Linear):
    """A `Linear` with a frozen quantized kernel, which is dequantized for each product.

    Its kernel is zero until it is loaded: `quantize` makes its parameters.
    """

    def __init__(self, linear: Linear, base_dtype: str):
        self.base_dtype, self.inputs, self.bias = base_dtype, linear.kernel_shape[-2], linear.bias
        for name, leaf in shapes_of_parts(linear.kernel_shape, base_dtype).items():
            setattr(self, name, nnx.Param(jnp.zeros(leaf.shape, leaf.dtype)))

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        *stack, _, outputs = self.codes.shape
        return (*stack, self.inputs, outputs)

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        return dequantize(self._parts(), self.inputs, dtype)

    def product(self, x: jax.Array) -> jax.Array:
        # The backward pass dequantizes again. Otherwise it would keep the dequantized weights of all layers.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def product(x: jax.Array, parts: Parts) -> jax.Array:
            return project(x, dequantize(parts, self.inputs, x.dtype))

        return product(x, self._parts())

    def _parts(self) -> Parts:
        return {name: getattr(self, name)[...] for name in PARTS[self.base_dtype]}


def quantize_linears(layers: nnx.Module, base_dtype: str) -> None:
    """Replaces every `Linear` of stacked layers by a `QuantizedLinear`."""
    for _, module in list(nnx.iter_modules(layers)):
        for name, value in list(vars(module).items()):
            if isinstance(value, Linear):
                setattr(module, name, QuantizedLinear(value, base_dtype))


def kept_dtype(name: str, stored: jnp.dtype, wanted: jnp.dtype) -> jnp.dtype:
    """The type to hold a parameter in: `wanted`, except that quantized weights and their scales keep their own."""
    return stored if PART.fullmatch(name) else wanted


def shapes_of_parts(kernel_shape: tuple[int, ...], base_dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the parameters of a quantized kernel [I, O], or of a stack of them."""
    *stack, inputs, outputs = kernel_shape
    blocks = -(-inputs // BLOCK)
    shapes = {
        "int8": [(inputs, outputs, jnp.int8), (outputs, jnp.float32)],
        "nf4": [
            (blocks * BLOCK // 2, outputs, jnp.uint8),
            (blocks, outputs, jnp.uint8),
            (-(-blocks * outputs // NESTED_BLOCK), jnp.float32),
            (jnp.float32,),
        ],
    }[base_dtype]
    return {
        name: jax.ShapeDtypeStruct((*stack, *shape), dtype)
        for name, (*shape, dtype) in zip(PARTS[base_dtype], shapes, strict=True)
    }


def linear_of(name: str) -> str | None:
    """The linear layer that has this parameter as its kernel, or as a part of its quantized kernel."""
    found = re.fullmatch(r"(llm\.layers\..+)\.kernel", name) or PART.fullmatch(name)
    return found and found[1]


def refuse_trained(names: Iterable[str]) -> None:
    """Raises UserError if quantized weights are among the parameters that a run trains."""
    if name := next((name for name in names if PART.fullmatch(name)), None):
        raise UserError(
            f"config.base_dtype: {name} would be trained, but quantized weights are frozen: set config.lora.rank, or "
            "leave it out of config.trainable, or set config.base_dtype to ''"
        )


# -------------------------------------------------------------------------------------------------------- quantization


def quantize(kernel: jax.Array, base_dtype: str, like: Mapping[str, Sharding] | None = None) -> Parts:
    """A kernel [I, O], or a stack of them, in "int8" or "nf4".

    `like`: shardings of the results. The values do not depend on them.
    """
    like = like or dict.fromkeys(PARTS[base_dtype])
    if base_dtype == "int8":
        codes, scales = _on_layers(quantize_int8, like["codes"], like["scales"])(kernel)
        return {"codes": codes, "scales": scales}
    codes, absmax = _on_layers(quantize_blocks, like["codes"], unsharded(like["absmax"]))(kernel)
    # On the host: sums of devices depend on their program.
    absmax = np.asarray(absmax.addressable_data(0))
    nested = [quantize_absmax(layer) for layer in absmax.reshape(-1, *absmax.shape[-2:])]
    stacks = (np.stack(parts).reshape((*kernel.shape[:-2], *parts[0].shape)) for parts in zip(*nested, strict=True))
    placed = {name: _placed(stack, like[name]) for name, stack in zip(PARTS[base_dtype][1:], stacks, strict=True)}
    return {"codes": codes} | placed


def _placed(values: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def unsharded(sharding: Sharding | None) -> Sharding | None:
    """The sharding of an array that all of its devices have all of."""
    return NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding


@functools.cache
def _on_layers(function: Callable, *shardings: Sharding | None) -> Callable:
    """`function`, jitted, of a layer or of each layer of a stack; `shardings` are those of its results."""

    def on_layers(kernel: jax.Array) -> tuple[jax.Array, ...]:
        return jax.lax.map(function, kernel) if kernel.ndim == 3 else function(kernel)

    return jax.jit(on_layers, out_shardings=None if None in shardings else shardings)


def quantize_int8(kernel_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> int8[I, O] and float32[O], whose product approximates the kernel: the largest weight of an output is 127."""
    kernel_IO = kernel_IO.astype(jnp.float32)
    scale_O = jnp.maximum(jnp.abs(kernel_IO).max(axis=0) / 127, TINY)
    return jnp.round(kernel_IO / scale_O[None]).astype(jnp.int8), scale_O


def quantize_blocks(kernel_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-> the codes of the nearest values of `NF4`, uint8[32 N, O], and the largest size of each block, float32[N, O].

    Byte i of a block has the code of its input i in the high bits, and that of input 32 + i in the low bits.
    """
    inputs, outputs = kernel_IO.shape
    padded = jnp.pad(kernel_IO.astype(jnp.float32), ((0, -inputs % BLOCK), (0, 0)))
    blocks_NBO = padded.reshape(-1, BLOCK, outputs)
    absmax_NO = jnp.abs(blocks_NBO).max(axis=1)
    scaled_NBO = jnp.clip(blocks_NBO * (1 / jnp.maximum(absmax_NO, TINY))[:, None], -1, 1)
    codes_NBO = sum((scaled_NBO > middle).astype(jnp.uint8) for middle in (NF4[:-1] + NF4[1:]) / 2)
    high, low = jnp.split(codes_NBO, 2, axis=1)
    return (high << 4 | low).reshape(-1, outputs), absmax_NO


def quantize_absmax(absmax_NO: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """-> codes uint8[N, O] of the scales of blocks without their mean, their own scales, and that mean."""
    flat = absmax_NO.T.reshape(-1)
    offset = np.float32(flat.mean(dtype=np.float64))
    nested = np.pad(flat - offset, (0, -flat.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested_absmax = np.abs(nested).max(axis=1)
    scaled = nested * (1 / np.maximum(nested_absmax, TINY))[:, None]
    # bitsandbytes' CPU kernel rounds to 16 bits before it looks for the nearest value.
    rounded = ((scaled + 1) * np.float32(0.5 * 65535) + np.float32(0.5)).astype(np.int32).clip(0, 65535)
    codes = _nearest_codes()[rounded].reshape(-1)[: flat.size]
    return codes.reshape(absmax_NO.shape[::-1]).T, nested_absmax, offset


@functools.cache
def _nearest_codes() -> np.ndarray:
    """The code of the nearest value of the 8-bit map for each of 65536 numbers from -1 to 1."""
    values = np.asarray(dynamic_map(jnp.arange(256)))
    return np.searchsorted((values[1:] + values[:-1]) / 2, np.linspace(-1, 1, 65536)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ dequantization


def dequantized(params: Mapping[str, jax.Array], plain: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters of a plain model, whose shapes and types are `plain`, from those of a quantized one."""
    kept = {name: value for name, value in params.items() if not PART.fullmatch(name)}
    parts: dict[str, Parts] = {}
    for name, value in params.items():
        if part := PART.fullmatch(name):
            parts.setdefault(f"{part['linear']}.kernel", {})[part["part"]] = value
    return kept | {name: dequantize_stack(values, plain[name]) for name, values in parts.items()}


def dequantize_stack(parts: Mapping[str, jax.Array], kernel: jax.ShapeDtypeStruct) -> jax.Array:
    """A kernel [L, I, O] in the type and with the sharding of `kernel`."""
    return _dequantize_stack(kernel.shape[-2], kernel.dtype, kernel.sharding)(dict(parts))


@functools.cache
def _dequantize_stack(inputs: int, dtype: jnp.dtype, sharding: Sharding | None) -> Callable:
    def stack(parts: Parts) -> jax.Array:
        return jax.lax.map(lambda layer: dequantize(layer, inputs, dtype), parts)

    return jax.jit(stack, out_shardings=sharding)


def dequantize(parts: Mapping[str, jax.Array], inputs: int, dtype: jnp.dtype) -> jax.Array:
    """The kernel [I, O] of one layer, rounded once."""
    if "scales" in parts:
        weights = parts["codes"].astype(jnp.float32)
        return (weights * broadcast_last(parts["scales"], weights)).astype(dtype)
    blocks, outputs = parts["absmax"].shape
    absmax_NO = dequantize_absmax(parts["absmax"], parts["nested_absmax"], parts["offset"])
    packed_NBO = parts["codes"].reshape(blocks, BLOCK // 2, outputs).astype(jnp.int32)
    halves = [(nf4_values(codes) * absmax_NO[:, None]).astype(dtype) for codes in (packed_NBO >> 4, packed_NBO & 15)]
    return jnp.concatenate(halves, axis=1).reshape(blocks * BLOCK, outputs)[:inputs]


def nf4_values(codes: jax.Array) -> jax.Array:
    """The values of 4-bit codes, by one choice for each bit: accelerators are slow at looking up tables.

    The first choices are sums, which are exact. Constants to choose from would be arrays, which `jax.lax.scan` keeps.
    """
    first = (codes & 1).astype(jnp.float32)
    values = [even + first * (odd - even) for even, odd in zip(NF4[::2], NF4[1::2], strict=True)]
    for bit in (1, 2, 3):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def dequantize_absmax(absmax_NO: jax.Array, nested_absmax: jax.Array, offset: jax.Array) -> jax.Array:
    """The scales of blocks, float32[N, O]."""
    nested_NO = jnp.repeat(nested_absmax, NESTED_BLOCK)[: absmax_NO.size].reshape(absmax_NO.shape[::-1]).T
    return dynamic_map(absmax_NO) * nested_NO + offset


def dynamic_map(codes: jax.Array) -> jax.Array:
    """The values of the 8-bit map, float32, see `INTERVALS`."""
    k = codes.astype(jnp.float32) - 127
    size, value = jnp.abs(k), 0.0
    for first, width, start in INTERVALS:
        inside = (size >= first) & (size < 2 * first)
        value += inside.astype(jnp.float32) * (start + width * (size - first + 0.5))
    return jnp.sign(k) * value
