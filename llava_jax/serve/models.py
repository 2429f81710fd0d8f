"""The models that clients may name: the base and its adapters, which they may load from one directory if allowed."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import anyio
from openai.types import Model

from llava_jax.cli import UserError
from llava_jax.inference.adapters import Adapter, AdapterWeights, UnknownAdapter, check_name
from llava_jax.inference.engine import Engine
from llava_jax.serve.errors import ApiError


class Card(Model):
    """A model of OpenAI's API with what vLLM adds: the context; for an adapter, the base's name and its directory."""

    max_model_len: int
    parent: str | None = None
    root: str | None = None


class Models:
    """The base under the name `base`, and the adapters of the engine."""

    def __init__(self, engine: Engine, base: str):
        self._engine, self._base, self._created = engine, base, int(time.time())

    def find(self, name: str) -> Adapter:
        """Raises `ApiError` that lists the models."""
        if name == self._base:
            return self._engine.base
        try:
            return self._engine.adapters.get(name)
        except UnknownAdapter:
            names = ", ".join(repr(card.id) for card in self.cards())
            what = f"model {name!r} is not served here: there is {names}"
            raise ApiError(404, what, "model_not_found", "model") from None

    def card(self, name: str) -> Card:
        """Raises `ApiError` as `find` does."""
        return self._card(self.find(name))

    def cards(self) -> list[Card]:
        """The base first."""
        return [self._card(adapter) for adapter in (self._engine.base, *self._engine.adapters.loaded())]

    def _card(self, adapter: Adapter) -> Card:
        fields = {"object": "model", "owned_by": "llava_jax", "max_model_len": self._engine.context}
        card = Card(id=self._base, created=self._created, **fields)
        if adapter is self._engine.base:
            return card
        update = {"id": adapter.name, "created": int(adapter.loaded), "parent": self._base, "root": adapter.origin}
        return card.model_copy(update=update)


class AdapterDirectory:
    """The adapters that clients may load: directories below one.

    Args:
      engine: gets the adapters.
      base: the name of the base, which no adapter may have.
      directory: of the adapters' directories.
      read: reads one of them. Raises `UserError`.
    """

    def __init__(self, engine: Engine, base: str, directory: str, read: Callable[[str], AdapterWeights]):
        self._engine, self._base, self._read = engine, base, read
        self._root = Path(directory).resolve()
        self._one = anyio.CapacityLimiter(1)  # a large one takes long

    async def load(self, name: str, path: str) -> None:
        """Raises `ApiError`."""
        try:
            check_name(name, self._base)
        except UserError as error:
            raise ApiError(400, str(error), "invalid_value", "lora_name") from error
        found = self._below(path)
        try:
            await anyio.to_thread.run_sync(self._load, name, found, path, limiter=self._one)
        except (UserError, OSError) as error:
            message = str(error).replace(f"{self._root}{os.sep}", "")  # clients do not see where it lies
            raise ApiError(400, message, "invalid_value", "lora_path") from error

    def _load(self, name: str, found: Path, path: str) -> None:
        self._engine.adapters.load(name, self._read(str(found))._replace(origin=path))

    async def unload(self, name: str) -> None:
        """Raises `ApiError`."""
        try:
            await anyio.to_thread.run_sync(self._engine.adapters.unload, name, limiter=self._one)
        except UnknownAdapter as error:
            raise ApiError(404, str(error), "model_not_found", "lora_name") from error

    def _below(self, path: str) -> Path:
        """The directory that a client means. Raises `ApiError` for all others, whether they exist or not."""
        try:
            found = (self._root / path).resolve()
            below = self._root in found.parents and found.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, a loop of links
            below = False
        if not below:
            what = "lora_path: there is no such directory below the server's --adapter-directory"
            raise ApiError(400, what, "invalid_value", "lora_path")
        return found
