"""The adapters that an engine has loaded: requests choose among them by name, and are batched together."""

import dataclasses
import difflib
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llava_jax.cli import UserError, shown
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.models.batched_lora import PROJECTOR
from llava_jax.models.config import LoraConfig
from llava_jax.models.llava import Params

MAX_NAME = 200  # characters


class AdapterWeights(NamedTuple):
    """An adapter as it is read from files, in host memory."""

    lora: LoraConfig  # its rank and scale
    params: Params  # see `models.batched_lora.write`
    prompts: PromptEncoder | None = None  # the template and image settings of its training; None for those of the base
    origin: str = ""  # its directory


def max_rank(adapters: Mapping[str, AdapterWeights]) -> int:
    """The largest rank; 0 without adapters."""
    return max((each.lora.rank for each in adapters.values()), default=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """What requests are answered with: an adapter, or the base alone."""

    name: str  # "" for the base
    prompts: PromptEncoder
    index: int = 0  # among those of `models.batched_lora`
    version: int = 0  # no other adapter has or had it: cached keys and values belong to a version
    own_projector: bool = False
    origin: str = ""
    loaded: float = 0.0  # `time.time()`


class UnknownAdapter(UserError):
    """There is no adapter of this name, or not any more."""


@dataclasses.dataclass(eq=False)
class Adapters:
    """The loaded adapters by name. For use from any thread."""

    base: Adapter  # of the engine
    limit: int  # of adapters
    rank: int  # the largest that they may have
    write: Callable[[int, LoraConfig, Params], None]  # copies parameters to the device, as the adapter with this index
    used: Callable[[], set[Adapter]]  # the adapters that accepted requests have not finished with

    def __post_init__(self) -> None:
        self._loading, self._versions = threading.Lock(), 0
        self._loaded: dict[str, Adapter] = {}

    def __contains__(self, adapter: Adapter) -> bool:
        return adapter is self.base or self._loaded.get(adapter.name) is adapter

    def loaded(self) -> list[Adapter]:
        """In the order in which they were loaded."""
        return list(self._loaded.values())

    def get(self, name: str) -> Adapter:
        """Raises `UnknownAdapter`."""
        if (adapter := self._loaded.get(name)) is None:
            near = difflib.get_close_matches(name, self._loaded, n=1)
            hint = f"; did you mean {shown(near[0])}?" if near else ""
            raise UnknownAdapter(f"no adapter is named {shown(name)}: there is {self._names() or 'none'}{hint}")
        return adapter

    def load(self, name: str, weights: AdapterWeights) -> Adapter:
        """Raises UserError for a name that is taken or malformed, too high a rank, or too many adapters."""
        check_name(name)
        if weights.lora.rank > self.rank:
            raise UserError(
                f"adapter {name}: its rank is {weights.lora.rank}, and there is room for {self.rank}: "
                f"start with --max-adapter-rank {weights.lora.rank}"
            )
        with self._loading:
            if name in self._loaded:
                raise UserError(f"an adapter is named {name} already: unload it first, or choose another name")
            taken = {adapter.index: adapter for adapter in [*self.used(), *self._loaded.values()]}
            index = next((index for index in range(1, self.limit + 1) if index not in taken), None)
            if index is None:
                unloaded = [adapter.name for adapter in taken.values() if adapter not in self]
                way_out = f"wait for the answers of {unloaded[0]}" if unloaded else f"unload one of {self._names()}"
                raise UserError(
                    f"adapter {name}: there is room for {self.limit}: {way_out}, or start with "
                    f"--max-adapters {self.limit + 1}"
                )
            self.write(index, weights.lora, weights.params)
            self._versions += 1
            own_projector = any(parameter.startswith(PROJECTOR) for parameter in weights.params)
            prompts = weights.prompts or self.base.prompts
            adapter = Adapter(name, prompts, index, self._versions, own_projector, weights.origin, time.time())
            self._loaded[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Takes no more requests for it; accepted ones are finished. Raises `UnknownAdapter`."""
        with self._loading:
            self.get(name)
            del self._loaded[name]

    def _names(self) -> str:
        return ", ".join(map(shown, self._loaded))


def check_name(name: str, base: str | None = None) -> None:
    """Raises UserError for a name that could not be printed in one line, and for that of the base."""
    if name == base:
        raise UserError(f"{shown(name)} is the name of the base: choose another one for the adapter")
    if not (name.isprintable() and 0 < len(name) <= MAX_NAME):
        raise UserError(f"{shown(name)} is no name of an adapter: 1 to {MAX_NAME} printable characters")
