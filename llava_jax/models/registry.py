"""The registered vision towers, decoder families and projectors.

Each is one object that says everything about itself; see `towers.Tower`, `families.Family`, `projectors.ProjectorKind`.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Registry(Mapping):
    """Objects by key. Those of the package are imported when they are first looked up: their modules import JAX."""

    def __init__(self, attribute: str, package: str, **modules: str):
        self._attribute = attribute  # of a class that has its key
        self._modules = {key: f"llava_jax.models.{package}.{module}" for key, module in modules.items()}
        self._objects: dict[str, Any] = {}

    def register(self, cls: type) -> type:
        """Class decorator: makes an object of the class known. Raises ValueError if its key is taken."""
        from llava_jax.parallel.sharding import PARAMETER_AXES

        key = getattr(cls, self._attribute)
        if key in self._objects or self._modules.get(key, cls.__module__) != cls.__module__:
            raise ValueError(f"{key!r} is registered already")
        self._objects[key] = cls()
        PARAMETER_AXES.extend(cls.parameter_axes)
        return cls

    def __getitem__(self, key: str) -> Any:
        if key not in self._objects and key in self._modules:
            importlib.import_module(self._modules[key])
        return self._objects[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._modules or key in self._objects)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._objects})

    def __len__(self) -> int:
        return len({**self._modules, **self._objects})


# By `VisionConfig.kind`, the `model_type` of transformers, and a regular expression of `LlavaConfig.projector_type`.
TOWERS = Registry("name", "towers", clip="clip", siglip="siglip")
FAMILIES = Registry("name", "families", llama="llama", mistral="mistral", qwen2="qwen2")
PROJECTORS = Registry("pattern", "projectors", **{r"linear|mlp([1-9]\d?)x_gelu": "mlp"})
