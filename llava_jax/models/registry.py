"""The registered vision towers, decoder families and projectors, by name.

Each is one object that says everything about itself; see the docstrings of `towers`, `families` and `projectors`.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Registered = TypeVar("Registered")


class Registry(Mapping, Generic[Registered]):
    """Objects by key. Those of the package are imported when they are first looked up: their modules import JAX."""

    def __init__(self, **modules: str):
        self._modules = modules
        self._objects: dict[str, Registered] = {}

    def register(self, key: str, value: Registered) -> None:
        if key in self._objects or self._modules.get(key, value.__module__) != value.__module__:
            raise ValueError(f"{key!r} is registered already")
        self._objects[key] = value

    def __getitem__(self, key: str) -> Registered:
        if key not in self._objects and key in self._modules:
            importlib.import_module(self._modules[key])
        return self._objects[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._modules or key in self._objects)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._modules, *self._objects)))

    def __len__(self) -> int:
        return len(list(iter(self)))


_PACKAGE = "llava_jax.models"
# By `VisionConfig.kind`: objects of `towers.Tower`.
TOWERS: Registry = Registry(clip=f"{_PACKAGE}.towers.clip", siglip=f"{_PACKAGE}.towers.siglip")
# By the `model_type` of transformers: objects of `families.Family`.
FAMILIES: Registry = Registry(
    llama=f"{_PACKAGE}.families.llama", mistral=f"{_PACKAGE}.families.mistral", qwen2=f"{_PACKAGE}.families.qwen2"
)
# By a regular expression of `LlavaConfig.projector_type`: objects of `projectors.ProjectorKind`.
PROJECTORS: Registry = Registry(**{r"linear|mlp([1-9]\d?)x_gelu": f"{_PACKAGE}.projectors.mlp"})
