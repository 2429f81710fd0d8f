"""Registries: objects that modules add by name, those of this package and a user's own."""

import difflib
import importlib
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llava_jax.cli import UserError, short

Item = TypeVar("Item")


class Registry(UserDict[str, Item]):
    """Objects by name, in the order in which they were added.

    Args:
      what: an object is, for errors.
      modules: name -> module that adds it, which is imported when the name is first looked up.
      key: the attribute of an object that has its name.
    """

    def __init__(self, what: str, modules: Mapping[str, str] | None = None, key: str = "name"):
        super().__init__(modules)
        self.what, self.key = what, key
        self.aliases: dict[str, str] = {}

    def add(self, item: Item, *aliases: str) -> Item:
        """Makes an object known by its name, and by other names. Raises `ValueError` if another one has such a name."""
        name = getattr(item, self.key)
        for taken in (name, *aliases):
            if self.data.get(self.aliases.get(taken, taken), item) not in (item, type(item).__module__):
                raise ValueError(f"{self.what} {taken!r} is registered already")
        self.data[name] = item
        self.aliases.update(dict.fromkeys(aliases, name))
        return item

    def __getitem__(self, name: str) -> Item:
        if isinstance(self.data[name], str):
            importlib.import_module(self.data[name])
        return self.data[name]

    def find(self, name: str, fits: Callable[[Item], Any] | None = None) -> Item:
        """The object with this name or alias. Raises `UserError` if none has it and `fits`."""
        known = self.aliases.get(name, name)
        if known not in self or (fits and not fits(self[known])):
            raise UserError(self.unknown(name, fits))
        return self[known]

    def import_and_find(self, name: str, fits: Callable[[Item], Any] | None = None) -> Item:
        """As `find`, for a name that the user typed: `MODULE:NAME` first imports the user's module, which adds it."""
        module, _, known = name.rpartition(":")
        if module:
            try:
                importlib.import_module(module)
            except (ImportError, TypeError, ValueError) as error:
                raise UserError(f"{name}: {error}; PYTHONPATH says where Python finds modules") from error
        return self.find(known, fits)

    def unknown(self, name: Any, fits: Callable[[Item], Any] | None = None) -> str:
        """The message of an error: no object has this name, and which names there are."""
        names = [known for known in self if fits is None or fits(self[known])]
        near = difflib.get_close_matches(str(name), [*names, *self.aliases], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{short(str(name))}: is no such {self.what}; {hint}choose from {', '.join(names)}"
