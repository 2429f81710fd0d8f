"""Low-rank adaptation, LoRA (Hu et al. 2021, section 4.1): y = x W + s x A B, of which only A and B are trained.

Also rsLoRA (Kalajdzievski 2023), whose s does not shrink with the rank, and DoRA (Liu et al. 2024), which trains the
length of each column of W + s A B apart from its direction. Everything computes and starts as in PEFT.

The adapter of a `Linear` is its attribute `lora`, so its parameters are `llm.layers.mlp.up_proj.lora.a` and so on.

Axes: B batch, T positions, I inputs, O outputs, R rank.
"""

import functools
import re
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.config import LoraConfig
from llava_jax.models.layers import Linear, broadcast_last, project

PARAMETER = re.compile(r"(?P<layer>.+)\.lora\.(?P<part>a|b|magnitude)")
# Linear layers that are not computed by `Linear.__call__`.
NOT_ADAPTED = ("llm.lm_head", "vision.patch_embedding")


class Lora(nnx.Module):
    """The adapter of a `Linear`, or of a stack of them: `a` [I, R], `b` [R, O] and, of DoRA, `magnitude` [O]."""

    dropout_keys: nnx.Variable | None = None  # [B], of the rows of a batch in training with dropout: see `use_dropout`

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
        dropped_BTI = self._dropped(x_BTI)
        a_IR, b_RO = self.a[...].astype(x_BTI.dtype), self.b[...].astype(x_BTI.dtype)
        update_BTO = self.scale * project(project(dropped_BTI, a_IR), b_RO)
        if self.magnitude is None:
            return y_BTO + update_BTO
        kernel_IO = linear.weight(x_BTI.dtype)
        base_BTO = y_BTO if self.dropout_keys is None else linear.product(dropped_BTI)
        ratio_O = self.magnitude[...] / column_norms(kernel_IO, self.scale, a_IR, b_RO)
        ratio = broadcast_last(ratio_O, y_BTO).astype(y_BTO.dtype)
        return y_BTO + (ratio - 1) * base_BTO + ratio * update_BTO

    def _dropped(self, x_BTI: jax.Array) -> jax.Array:
        """Inverted dropout of the adapter's input, with a mask that depends on the row alone."""
        if self.dropout_keys is None:
            return x_BTI
        kept = round((1 - self.rate) * 2**16)
        bits_BTI = jax.vmap(lambda key: jax.random.bits(key, x_BTI.shape[1:], jnp.uint16))(self.dropout_keys[...])
        return jnp.where(bits_BTI < kept, x_BTI / (1 - self.rate), 0)


def column_norms(kernel_IO: jax.Array, scale: float, a_IR: jax.Array, b_RO: jax.Array) -> jax.Array:
    """Lengths of the columns of W + s A B, float32[O]; a constant to the gradient (DoRA, section 4.3)."""
    adapted_IO = kernel_IO.astype(jnp.float32) + scale * (a_IR.astype(jnp.float32) @ b_RO.astype(jnp.float32))
    return jax.lax.stop_gradient(jnp.sqrt(jnp.square(adapted_IO).sum(0)))


def merged(kernel_IO: jax.Array, adapter: dict[str, jax.Array], config: LoraConfig) -> jax.Array:
    """The kernel that computes the same alone, float32; `adapter` has `a`, `b` and, of DoRA, `magnitude`."""
    adapted_IO = kernel_IO.astype(jnp.float32) + config.scale * (
        adapter["a"].astype(jnp.float32) @ adapter["b"].astype(jnp.float32)
    )
    if "magnitude" not in adapter:
        return adapted_IO
    return adapted_IO * (adapter["magnitude"] / jnp.sqrt(jnp.square(adapted_IO).sum(0)))[None]


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


def use_dropout(model: nnx.Module, keys_B: jax.Array) -> None:
    """Makes adapters drop inputs. The mask of a row depends on its key and the layer, not on the mesh."""
    adapted = [linear.lora for _, linear in sorted(linears(model), key=lambda item: item[0]) if linear.lora is not None]
    for number, adapter in enumerate(adapted):
        keys = _fold_in(keys_B, number)
        if adapter.a.ndim == 3:  # of a stack, whose scan gives each layer its own
            keys = jax.vmap(functools.partial(_fold_in, keys))(jnp.arange(len(adapter.a)))
        adapter.dropout_keys = nnx.Variable(keys)


def _fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
