"""Adapters of several models on one base: each row of a batch is computed with its own (Chen et al. 2023, Punica).

y_b = g_n (x_b W + x_b A_n B_n), where n is the adapter of row b. B has the scale s in it. g is 1, or of DoRA the
magnitude divided by the column norms of W + A B, which do not change at inference. Adapter 0 changes nothing.

Axes: N adapters, B rows, T positions, I inputs, O outputs, R rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llava_jax.models.config import LoraConfig
from llava_jax.models.layers import Linear
from llava_jax.models.llava import Llava, Params
from llava_jax.models.lora import column_norms, linears, merged
from llava_jax.parallel.sharding import param_sharding

LAYERS, PROJECTOR = "llm.layers.", "projector."  # the parameters that adapters may differ in


class BatchedLora(nnx.Module):
    """The adapters of a `Linear`: `a` [N, I, R], `b` [N, R, O] and float32 `ratio` [N, O]; adapters of a lower rank are
    padded with zeros."""

    rows: nnx.Variable | None = None  # int32[B] or [1], the adapter of each row, see `use`

    def __init__(
        self, name: str, shape: tuple[int, ...], adapters: int, rank: int, dtype: jnp.dtype, mesh: Mesh | None
    ):
        *stack, inputs, outputs = shape

        def full(part: str, value: float, dtype: jnp.dtype, *axes: int) -> nnx.Param:
            shape = (*stack, adapters, *axes)
            sharding = mesh and param_sharding(mesh, f"{name}.lora.{part}", shape)
            return nnx.Param(jnp.full(shape, value, dtype, device=sharding))

        self.a, self.b = full("a", 0, dtype, inputs, rank), full("b", 0, dtype, rank, outputs)
        self.ratio = full("ratio", 1, jnp.float32, outputs)

    def __call__(self, x_BTI: jax.Array, y_BTO: jax.Array, linear: nnx.Module) -> jax.Array:
        """`y` = x W of the layer, without its bias -> the same with the adapter of each row."""
        a_BIR, b_BRO, ratio_BO = (stacked[...][self.rows[...]] for stacked in (self.a, self.b, self.ratio))
        update_BTO = x_BTI @ a_BIR @ b_BRO
        return ((y_BTO + update_BTO) * ratio_BO[:, None]).astype(y_BTO.dtype)


def attach(model: Llava, adapters: int, rank: int, mesh: Mesh | None = None) -> None:
    """Makes room for `adapters` adapters, besides adapter 0, of at most this rank. Adapters may also have projectors of
    their own. Only before the layers are unstacked."""
    for name, linear in list(linears(model)):
        if name.startswith(LAYERS):
            linear.lora = BatchedLora(name, linear.kernel_shape, 1 + adapters, rank, model.dtype, mesh)
    model.projector = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (1 + adapters, *x.shape)), model.projector)


def use(model: Llava, rows_B: jax.Array) -> None:
    """Computes row b of a batch with adapter `rows_B[b]`, and images with the projector of the first row's adapter.
    One adapter, int32[1], is that of all rows.

    For use while a program is traced. Does nothing to a model without adapters.
    """
    modules = [module for _, module in nnx.iter_modules(model) if isinstance(module, BatchedLora)]
    for module in modules:
        stack = module.a.shape[:-3]
        module.rows = nnx.Variable(jnp.broadcast_to(rows_B, (*stack, len(rows_B))))
    if modules:
        model.projector = jax.tree.map(lambda stacked: stacked[rows_B[0]], model.projector)


def write(model: Llava, index: int, config: LoraConfig, params: Params) -> None:
    """Makes the parameters of an adapter those of adapter `index` of a model with unstacked layers.

    Args:
      model: its arrays are replaced, not changed.
      index: at least 1.
      config: its rank is at most that of `attach`.
      params: `llm.layers.mlp.up_proj.lora.a` [L, I, R] and so on, and those of its own projector or of adapters to the
        base's. What is missing is as in the base.
    """
    for number, layer in enumerate(model.llm.layers):
        for path, linear in nnx.iter_modules(layer):
            if isinstance(stacked := getattr(linear, "lora", None), BatchedLora):
                own = _own(params, ".".join([LAYERS[:-1], *map(str, path), "lora"]))
                _write(linear, stacked, index, config.scale, {part: value[number] for part, value in own.items()})
    for path, stacked in nnx.to_flat_state(nnx.state(model.projector)):
        name = ".".join([PROJECTOR[:-1], *map(str, path)])
        value = params.get(name, stacked[...][0])
        if own := _own(params, f"{name.rpartition('.')[0]}.lora") if name.endswith(".kernel") else {}:
            value = merged(value, own, config)
        stacked.set_value(_put(stacked[...], index, value))


def _own(params: Params, name: str) -> Params:
    """The parts of an adapter with this name."""
    return {part: params[f"{name}.{part}"] for part in ("a", "b", "magnitude") if f"{name}.{part}" in params}


def _write(linear: Linear, stacked: BatchedLora, index: int, scale: float, own: Params) -> None:
    (_, inputs, rank), outputs = stacked.a.shape, stacked.b.shape[-1]
    a_IR, b_RO = np.zeros((inputs, rank), np.float32), np.zeros((rank, outputs), np.float32)
    ratio_O = np.ones(outputs, np.float32)
    if own:
        a_IR[:, : own["a"].shape[1]], b_RO[: own["b"].shape[0]] = own["a"], scale * np.asarray(own["b"], np.float32)
    if "magnitude" in own:
        ratio_O = own["magnitude"] / column_norms(linear.weight(jnp.float32), 1.0, jnp.asarray(a_IR), jnp.asarray(b_RO))
    for variable, value in ((stacked.a, a_IR), (stacked.b, b_RO), (stacked.ratio, ratio_O)):
        variable.set_value(_put(variable[...], index, value))


def _put(stacked: jax.Array, index: int, value: jax.Array) -> jax.Array:
    """A copy with another value at `index`: programs that run at the moment may be reading `stacked`."""
    return jax.device_put(stacked.at[index].set(jnp.asarray(value, stacked.dtype)), stacked.sharding)
