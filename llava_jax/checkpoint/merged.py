"""A checkpoint with adapters (`models.lora`) as a plain model: they are added to the weights while these are read.

Sums are computed in float32 and rounded once, one layer after the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.models import lora
from llava_jax.models.config import LoraConfig
from llava_jax.models.llava import Params, abstract_params


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
    fields = {field.name: getattr(adapted, field.name) for field in dataclasses.fields(adapted)}
    model = dataclasses.replace(adapted.config, lora=None)
    fields["description"] = dataclasses.replace(adapted.description, model=model)
    return Merged(**fields, adapted=adapted, added=added)


@dataclasses.dataclass(frozen=True)
class Merged(Checkpoint):
    """Attributes:
    adapted: the checkpoint with its adapters.
    added: whether these are added to the weights, or left out.
    changes: of each kernel or layer that was read, the sum of squares of what its adapter added, and of what rounding
      to the stored type changed.
    """

    adapted: Checkpoint = None
    added: bool = True
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

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: leaf for name, leaf in super().abstract().items() if not lora.PARAMETER.fullmatch(name)}

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        if name not in self.adapters:
            return super().read(name, layer)
        shape = self.abstract()[name].shape
        if layer is None and len(shape) == 3:
            return np.stack([self.read(name, index) for index in range(shape[0])])
        kernel = super().read(name, layer)
        adapter = {part: self.adapted.read(its_name, layer) for part, its_name in self.adapters[name].items()}
        exact = np.asarray(lora.merged(kernel, adapter, self.adapted.config.lora))
        rounded = exact.astype(kernel.dtype)
        self.changes.append((_squared_distance(exact, kernel), _squared_distance(exact, rounded)))
        return rounded

    def is_computed(self, name: str) -> bool:
        return name in self.adapters or super().is_computed(name)

    def load(
        self,
        names: Iterable[str] | None = None,
        dtype: Callable[[str, jnp.dtype], jnp.dtype] = lambda name, stored: stored,
        sharding: Callable[[str], jax.sharding.Sharding] | None = None,
    ) -> Params:
        wanted = list(abstract_params(self.config) if names is None else names)
        params = super().load([name for name in wanted if name not in self.adapters], dtype, sharding)
        for name in (name for name in wanted if name in self.adapters):
            kernel = super().load([name], sharding=sharding)[name]
            adapter = {part: self.adapted.read(its_name) for part, its_name in self.adapters[name].items()}
            add = jax.jit(_added, static_argnames=("config", "dtype"), donate_argnums=0, out_shardings=kernel.sharding)
            with jax.default_matmul_precision("highest"):
                params[name] = add(kernel, adapter, config=self.adapted.config.lora, dtype=dtype(name, kernel.dtype))
        return {name: params[name] for name in wanted}


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
