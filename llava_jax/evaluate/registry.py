"""Registries: objects that modules add by name, those of this package and a user's own."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from llava_jax.cli import UserError

Item = TypeVar("Item")


class Registry(dict[str, Item]):
    """Objects of one class by their `name`. A user's module registers its object when it is imported."""

    def __init__(self, kind: type[Item], what: str):
        super().__init__()
        self.kind, self.what = kind, what

    def register(self, item: Item) -> Item:
        """Adds an object. Raises `ValueError` if its name is taken."""
        if self.setdefault(item.name, item) is not item:
            raise ValueError(f"a {self.what} {item.name} is registered already")
        return item

    def find(self, name: str, fits: Callable[[Item], Any] = lambda item: True) -> Item:
        """The object with this name, or `MODULE:OBJECT`, whose module is imported.

        Raises:
          UserError: if no object has this name and `fits`, or if the module cannot be imported.
        """
        module, _, attribute = name.partition(":")
        item = self._imported(name, module, attribute) if attribute else self.get(name)
        if item is None or not fits(item):
            names = ", ".join(known for known, item in self.items() if fits(item))
            raise UserError(f"{name}: is no such {self.what}; choose from {names}, or give MODULE:OBJECT")
        return item

    def _imported(self, name: str, module: str, attribute: str) -> Item:
        try:
            item = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{name}: {error}; PYTHONPATH says where Python finds modules") from error
        if not isinstance(item, self.kind):
            raise UserError(f"{name}: is no {self.kind.__name__} but {type(item).__name__}")
        return item
