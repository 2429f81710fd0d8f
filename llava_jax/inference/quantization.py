"""Decoders with 8-bit weights: decoding is bound by the bandwidth of reading them."""

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.cli import UserError
from llava_jax.models.config import QUANTIZATIONS
from llava_jax.models.layers import broadcast_last, finish
from llava_jax.models.llama import Llama, replace_linears
from llava_jax.models.quantized import quantize_int8


def check_quantization(quantize: str | None) -> None:
    """Raises UserError unless it is one of `models.config.QUANTIZATIONS`."""
    if quantize not in QUANTIZATIONS:
        raise UserError(f"quantize is {quantize!r}: choose {' or '.join(map(repr, QUANTIZATIONS))}")


class Int8Linear(nnx.Module):
    """A `Linear` with int8 `kernel` [in, out] and float32 `scale` [out]: the largest weight of each output is 127.

    The product is computed with weights cast to the input's type, and scaled afterwards.
    """

    def __init__(self, kernel: jax.Array, bias: nnx.Param | None = None, lora: nnx.Module | None = None):
        quantized, scale = jax.jit(quantize_int8)(kernel)
        self.kernel, self.scale, self.bias, self.lora = nnx.Param(quantized), nnx.Param(scale), bias, lora

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """The rounded kernel [in, out], as `Linear.weight`."""
        return (self.kernel[...] * self.scale[...][None]).astype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return finish(self, x, self.scores(x).astype(x.dtype))

    def scores(self, x: jax.Array) -> jax.Array:
        """The product without the bias, in float32."""
        y = jnp.matmul(x, self.kernel[...].astype(x.dtype), preferred_element_type=jnp.float32)
        return y * broadcast_last(self.scale[...], y)


def quantize_decoder(llm: Llama) -> None:
    """Replaces every projection of unstacked layers, and the vocabulary projection, by an `Int8Linear`.

    Embeddings and norms stay as they are. If the vocabulary projection shares the table of embeddings, it gets an array
    of its own.
    """
    for layer in llm.layers:
        replace_linears(layer, lambda linear: Int8Linear(linear.kernel[...], linear.bias, linear.lora))
    tied = llm.config.tie_word_embeddings
    llm.int8_head = Int8Linear(llm.embed_tokens.embedding[...].T if tied else llm.lm_head.kernel[...])
    if not tied:
        del llm.lm_head
