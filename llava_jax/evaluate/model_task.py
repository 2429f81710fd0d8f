"""What a language model does for a benchmark, besides answering it: judge answers, or write reference answers."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.llm_api.cost import Message

if TYPE_CHECKING:
    from llava_jax.llm_api.asking import Outcome  # openai takes a second to load


class Case(NamedTuple):
    """A prompt, or None if there is nothing to ask, and the objects from which its line of output is made."""

    name: str  # in the ledger, which finds earlier replies by it
    messages: list[Message] | Callable[[], list[Message]] | None  # a function if they have images, which take memory
    about: Any

    def made(self) -> list[Message]:
        return self.messages() if callable(self.messages) else list(self.messages or ())


class ModelTask(ABC):
    """A subclass says the prompts of a task, how replies are read, and what is written; its docstring is for `--help`.

    Attributes:
      epilog: examples for `--help`.
      writes: the lines of the output, in the plural.
      failed: how the summary calls lines whose reply could not be read ("without scores"). Empty: they are an error.
      cut_counts: whether a reply that is cut off is read, too.
      several: whether several models are asked, each several times: `--judge A B --repeats N`.
      temperature, max_tokens: defaults of requests.
    """

    epilog = ""
    writes: str
    failed = ""
    cut_counts = False
    several = False
    temperature = 0.0
    max_tokens = 1024

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options that name the files."""

    @abstractmethod
    def prompts(self, args: argparse.Namespace) -> tuple[Sequence[Sequence[Case]], Any]:
        """The cases of each output file, and the instructions in all prompts, whose hash is stored with each line."""

    def read(self, about: Any, text: str) -> Any:
        """The value of a reply. None if it has another form: the model is then asked again."""
        return text.strip()

    @abstractmethod
    def line(self, about: Any, outcome: "Outcome | None", by: Mapping[str, str]) -> dict[str, Any]:
        """A line of output. `outcome` is None if nothing was asked; `by` has `judge`, the model, and `prompt_hash`."""


def chat(system: str, content: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def read_prompt(name: str) -> str:
    """The text of a file in `benchmarks/prompt_files`."""
    return Path(__file__).parent.joinpath("benchmarks/prompt_files", name).read_text(encoding="utf-8").rstrip("\n")
