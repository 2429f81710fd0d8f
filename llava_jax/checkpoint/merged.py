"""A checkpoint with adapters (`models.lora`) as a plain model: they are added to the weights while these are read.

Sums are computed in float32 and rounded once, one layer after the other.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.checkpoint.reading import Checkpoint, DtypeOf, ShardingOf, as_stored, first_device
from llava_jax.models import lora, pieces
from llava_jax.models.config import LoraConfig
from llava_jax.models.llava import Params, Shapes, abstract_params
from llava_jax.models.quantized import Parts, dequantize, linear_of


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a model without adapters, which may be the checkpoint itself. Those that were trained beside
    quantized weights are added to the dequantized ones."""
    plain = checkpoint.dequantized() if checkpoint.config.base_dtype else checkpoint
    return plain if plain.config.lora is None else _plain(plain, added=True)


def without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as the plain model to which its adapters would be added."""
    return _plain(checkpoint.dequantized(), added=False)


def _plain(adapted: Checkpoint, added: bool) -> "Merged":
    adapted.check()
    plain = adapted.with_model(lora=None)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return Merged(**fields, adapted=adapted, added=added)


def trained_whole(checkpoint: Checkpoint) -> set[str] | None:
    """Of a checkpoint with adapters: the other parameters that are not those of the model that the adapters are for;
    None if that is not known."""
    found: set[str] = set()
    for holder, names in checkpoint.holders:
        if holder.config.lora is None:  # the model itself
            continue
        whole = names if holder.step is not None else holder.description.trained_whole
        if whole is None:
            return None
        found |= {pieces.whole(name) for name in whole}
    return {name for name in found if not lora.PARAMETER.fullmatch(name)}


@dataclasses.dataclass(frozen=True)
class Merged(Checkpoint):
    """A checkpoint with adapters as a model without."""

    adapted: Checkpoint = None  # with its adapters
    added: bool = True  # whether these are added to the weights, or left out
    # Of each kernel or layer that was read, the sum of squares of what its adapter added, and of what rounding to the
    # stored type changed.
    changes: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def adapters(self) -> dict[str, dict[str, str]]:
        """Names of adapted kernels -> names of their adapters' parameters, by part."""
        found: dict[str, dict[str, str]] = {}
        for name in self.adapted.abstract():
            if self.added and (match := lora.PARAMETER.fullmatch(name)):
                found.setdefault(f"{match['layer']}.kernel", {})[match["part"]] = name
        return found

    def rounding(self) -> float:
        """What rounding took from the adapters in all that was read, relative to what they added (rms)."""
        added, lost = (sum(column) for column in zip(*self.changes, strict=True))
        return (lost / added) ** 0.5 if added else 0.0

    def abstract(self) -> Shapes:
        return {name: leaf for name, leaf in super().abstract().items() if not lora.PARAMETER.fullmatch(name)}

    def read(self, name: str, layer: int | None = None, exact: bool = False) -> np.ndarray:
        if name not in self.adapters:
            return super().read(name, layer, exact)
        leaf = self.abstract()[name]
        if layer is None and len(leaf.shape) == 3:
            return np.stack([self.read(name, index, exact) for index in range(leaf.shape[0])])
        kernel = super().read(name, layer, exact=True)
        adapter = {part: self.adapted.read(its_name, layer) for part, its_name in self.adapters[name].items()}
        total = np.asarray(lora.merged(kernel, adapter, self.adapted.config.lora))
        rounded = total.astype(leaf.dtype)
        self.changes.append((_squared_distance(total, kernel), _squared_distance(total, rounded)))
        return total if exact else rounded

    def is_computed(self, name: str) -> bool:
        return name in self.adapters or super().is_computed(name)

    def load(
        self, names: Iterable[str] | None = None, dtype: DtypeOf = as_stored, sharding: ShardingOf = first_device
    ) -> Params:
        wanted = list(abstract_params(self.config) if names is None else names)
        params = super().load([name for name in wanted if name not in self.adapters], dtype, sharding)
        for name in (name for name in wanted if name in self.adapters):
            params[name] = self._load_adapted(name, dtype(name, self.abstract()[name].dtype), sharding)
        return {name: params[name] for name in wanted}

    def _load_adapted(self, name: str, dtype: jnp.dtype, place: ShardingOf) -> jax.Array:
        adapter = {part: self.adapted.read(its_name) for part, its_name in self.adapters[name].items()}
        given = {"config": self.adapted.config.lora, "dtype": dtype}
        if name in self._converted:
            given["inputs"] = self.abstract()[name].shape[-2]
            weights, add, donated = self._load_parts(linear_of(name), place), _added_dequantized, ()
        else:
            weights, add, donated = super().load([name], sharding=place)[name], _added, (0,)
        add = jax.jit(add, static_argnames=tuple(given), donate_argnums=donated, out_shardings=place(name))
        with jax.default_matmul_precision("highest"):
            return add(weights, adapter, **given)


def _squared_distance(a: np.ndarray, b: np.ndarray) -> float:
    apart = a - b.astype(np.float32)
    return float(np.vdot(apart, apart))


def _added(kernel: jax.Array, adapter: dict[str, jax.Array], config: LoraConfig, dtype: jnp.dtype) -> jax.Array:
    """A kernel, or a stack of them, with its adapter; in place if the type stays the same."""
    if kernel.ndim == 2:
        return lora.merged(kernel, adapter, config).astype(dtype)
    exact = kernel.astype(jnp.promote_types(kernel.dtype, dtype))

    def one(layer: int, stack: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf[layer], adapter)
        return stack.at[layer].set(lora.merged(stack[layer], own, config).astype(stack.dtype))

    return jax.lax.fori_loop(0, len(kernel), one, exact).astype(dtype)


def _added_dequantized(
    parts: Parts, adapter: dict[str, jax.Array], config: LoraConfig, dtype: jnp.dtype, inputs: int
) -> jax.Array:
    """A stack of quantized kernels with its adapter: the sum with the dequantized float32 kernel is rounded once."""

    def one(layer: tuple[Parts, dict[str, jax.Array]]) -> jax.Array:
        return lora.merged(dequantize(layer[0], inputs, jnp.float32), layer[1], config).astype(dtype)

    return jax.lax.map(one, (parts, adapter))
