"""Registries: objects that modules add by name, those of this package and a user's own."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from llava_jax.cli import UserError

Item = TypeVar("Item")


class Registry(dict[str, Item]):
    """Objects by their `name`."""

    def __init__(self, what: str):
        super().__init__()
        self.what = what

    def add(self, item: Item) -> None:
        """Raises `ValueError` if the name is taken."""
        if item.name in self:
            raise ValueError(f"{self.what} {item.name!r} is registered already")
        self[item.name] = item

    def find(self, name: str, fits: Callable[[Item], Any] = lambda item: True) -> Item:
        """The object with this name. `MODULE:NAME` first imports the module of a user, which registers it.

        Raises `UserError` if the module cannot be imported, or if no object has the name and `fits`.
        """
        module, _, known = name.rpartition(":")
        if module:
            try:
                importlib.import_module(module)
            except (ImportError, TypeError, ValueError) as error:
                raise UserError(f"{name}: {error}; PYTHONPATH says where Python finds modules") from error
        if known not in self or not fits(self[known]):
            names = ", ".join(known for known, item in self.items() if fits(item))
            raise UserError(f"{name}: is no such {self.what}; choose from {names}")
        return self[known]
