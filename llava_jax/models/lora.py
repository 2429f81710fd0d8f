"""Low-rank adaptation, LoRA (Hu et al. 2021, section 4.1): y = x W + s x A B, of which only A and B are trained.

Also rsLoRA (Kalajdzievski 2023), whose s does not shrink with the rank, and DoRA (Liu et al. 2024), which trains the
length of each column of W + s A B apart from its direction. Everything computes and starts as in PEFT.

The adapter of a `Linear` is its attribute `lora`, so its parameters are `llm.layers.mlp.up_proj.lora.a` and so on.

Axes: B batch, T positions, I inputs, O outputs, R rank.
"""

import math
import re
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.config import LoraConfig
from llava_jax.models.layers import Linear, broadcast_last, product_and_factors, project

PARAMETER = re.compile(r"(?P<layer>.+)\.lora\.(?P<part>a|b|magnitude)")
# Linear layers that are not computed by `Linear.__call__`.
NOT_ADAPTED = ("llm.lm_head", "vision.patch_embedding")


class Lora(nnx.Module):
    """The adapter of a `Linear`, or of a stack of them: `a` [I, R], `b` [R, O] and, of DoRA, `magnitude` [O]."""

    dropout_seeds: nnx.Variable | None = None  # uint32[B, 2], in training with dropout: see `use_dropout`

    def __init__(self, kernel_shape: tuple[int, ...], config: LoraConfig, *, rngs: nnx.Rngs):
        *stack, inputs, outputs = kernel_shape
        self.scale, self.rate = config.scale, config.dropout
        bound = inputs**-0.5
        self.a = nnx.Param(
            jax.random.uniform(rngs.params(), (*stack, inputs, config.rank), minval=-bound, maxval=bound)
        )
        self.b = nnx.Param(jnp.zeros((*stack, config.rank, outputs)))
        self.magnitude = nnx.Param(jnp.ones((*stack, outputs))) if config.dora else None

    def __call__(self, x_BTI: jax.Array, y_BTO: jax.Array, linear: Linear) -> jax.Array:
        """`y` = x W of the layer, without its bias -> the same with the adapter."""
        dropped_BTI = x_BTI if self.dropout_seeds is None else dropout(x_BTI, self.dropout_seeds[...], self.rate)
        a_IR, b_RO = self.a[...].astype(x_BTI.dtype), self.b[...].astype(x_BTI.dtype)
        update_BTO = project(self.scale * narrow(dropped_BTI, a_IR), b_RO)
        if self.magnitude is None:
            return y_BTO + update_BTO
        kernel_IO = linear.weight(x_BTI.dtype)
        base_BTO = y_BTO if self.dropout_seeds is None else linear.product(dropped_BTI)
        ratio_O = self.magnitude[...] / column_norms(kernel_IO, self.scale, a_IR, b_RO)
        # Near 1, bfloat16 has steps of 0.8 %: ratio - 1 is computed in float32.
        ratio, change = (broadcast_last(x, y_BTO).astype(y_BTO.dtype) for x in (ratio_O, ratio_O - 1))
        return y_BTO + change * base_BTO + ratio * update_BTO


@jax.custom_vjp
def narrow(x_BTI: jax.Array, a_IR: jax.Array) -> jax.Array:
    """x A [B, T, R], with its own gradient rule.

    `project`'s rule transposes x for the gradient of A, which takes CPUs four times as long as the product at a small
    rank. Here only dy, which is narrow, and the result are transposed.
    """
    return x_BTI @ a_IR


def _narrow_backward(saved: tuple[jax.Array, jax.Array], dy_BTR: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTI, a_IR = saved
    da_RI = dy_BTR.reshape(-1, dy_BTR.shape[-1]).T @ x_BTI.reshape(-1, x_BTI.shape[-1])
    # Without the barrier the compiler would undo it: the transpose of a product is the product of the transposes.
    return dy_BTR @ a_IR.T, jax.lax.optimization_barrier(da_RI).T


narrow.defvjp(product_and_factors, _narrow_backward)


def dropout(x_BTI: jax.Array, seeds_B2: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014), with a mask of each row that its seeds alone decide.

    The bits are a hash of the place in the row: jax.random's take fifteen times as long on CPUs.
    """
    shape_1TI = (1, *x_BTI.shape[1:])
    places_1TI = jnp.arange(math.prod(shape_1TI), dtype=jnp.uint32).reshape(shape_1TI)
    first_B11, second_B11 = (seeds_B2[:, i].reshape(-1, 1, 1) for i in (0, 1))
    bits_BTI = _mixed(_mixed(places_1TI ^ first_B11) ^ second_B11)
    return jnp.where(bits_BTI >= jnp.uint32(int(rate * 2**32)), x_BTI / (1 - rate), 0)


def _mixed(bits: jax.Array) -> jax.Array:
    """A bijection of 32 bits of which each output bit depends on all input bits (Wellons 2018, "lowbias32")."""
    bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)
    return bits ^ bits >> 16


def adapted_kernel(kernel_IO: jax.Array, scale: float, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """W + s A B, float32."""
    return kernel_IO.astype(jnp.float32) + scale * (a_IR.astype(jnp.float32) @ b_RO.astype(jnp.float32))


def column_lengths(kernel_IO: jax.Array) -> jax.Array:
    """float32[O]."""
    return jnp.sqrt(jnp.square(kernel_IO.astype(jnp.float32)).sum(0))


def column_norms(kernel_IO: jax.Array, scale: float, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """Lengths of the columns of W + s A B, float32[O]; a constant to the gradient (DoRA, section 4.3)."""
    return jax.lax.stop_gradient(column_lengths(adapted_kernel(kernel_IO, scale, a_IR, b_RO)))


def merged(kernel_IO: jax.Array, adapter: dict[str, jax.Array], config: LoraConfig) -> jax.Array:
    """The kernel that computes the same alone, float32; `adapter` has `a`, `b` and, of DoRA, `magnitude`."""
    adapted_IO = adapted_kernel(kernel_IO, config.scale, adapter["a"], adapter["b"])
    if "magnitude" not in adapter:
        return adapted_IO
    return adapted_IO * (adapter["magnitude"] / column_lengths(adapted_IO))[None]


# ------------------------------------------------------------------------------------------------- adapters of a model


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """The linear layers of a model by dotted name."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield ".".join(map(str, path)), module


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether a linear layer has an adapter. A pattern matches the whole name or, in the language model, its end."""
    if name in NOT_ADAPTED:
        return False
    decoder = name.startswith("llm.")
    return any(re.fullmatch(target, name) or decoder and re.fullmatch(rf".*\.({target})", name) for target in targets)


def attach(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives each target of a model a fresh adapter, with which it computes the same as before."""
    for name, linear in list(linears(model)):
        if is_target(name, config.targets):
            linear.lora = Lora(linear.kernel_shape, config, rngs=rngs)


def use_dropout(model: nnx.Module, keys_B: jax.Array, images_GI: tuple[int, int]) -> None:
    """Makes adapters drop inputs. The mask of a row, or of an image, depends on its key and the layer, not on the mesh.

    Args:
      model: its adapters are changed.
      keys_B: of the rows of a batch.
      images_GI: how many groups the rows form, and image slots a group has, which take the key of its first row.
    """
    groups, slots = images_GI
    keys_G = keys_B[:: len(keys_B) // groups]
    keys_N = jnp.stack([_fold_in(keys_G, slot) for slot in range(slots)], 1).reshape(-1) if slots else keys_G
    for number, (name, linear) in enumerate(sorted(linears(model))):
        if linear.lora is not None:
            keys = _fold_in(keys_B if name.startswith("llm.") else keys_N, number)
            linear.lora.dropout_seeds = nnx.Variable(_seeds(keys, linear.kernel_shape[:-2]))


def _seeds(keys: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    """uint32[B, 2] or, for a stack of layers, whose scan gives each its own, [L, B, 2]."""
    if stack:
        return jax.vmap(lambda layer: _seeds(_fold_in(keys, layer), ()))(jnp.arange(stack[0]))
    return jax.vmap(lambda key: jax.random.bits(key, 2, jnp.uint32))(keys)


def _fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
