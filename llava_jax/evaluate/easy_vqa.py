"""easy-VQA: one shape in one colour, and whether it's seen. Small enough to be answered on a laptop.

Its labels are the answers in LLaVA JSON, as `examples.easy_vqa.data` writes it of the package `easy-vqa`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.data.sources import LlavaJson
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmark import Benchmark, by_kind, of_files
from llava_jax.evaluate.questions import unmarked

SHAPES = ("circle", "rectangle", "triangle")


class Label(NamedTuple):
    right: str
    kind: str


def kind(question: str, answer: str) -> str:
    """`shape`, `colour`, or for a question of yes or no `is it that shape`, `is it that colour`."""
    if answer not in ("yes", "no"):
        return "shape" if answer in SHAPES else "colour"
    return f"is it that {'shape' if any(shape in question for shape in SHAPES) else 'colour'}"


def score(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """The share of answers that are exactly the right word."""
    return by_kind([(label.kind, answer.text == label.right) for answer, label in pairs])


def labels(path: str) -> Iterator[tuple[str, Label, str]]:
    for sample in LlavaJson(path):
        turns = [text for role, text in sample.turns if role != "system"]
        if len(turns) < 2:
            raise UserError(f"{path}: sample {sample.id} has no answer to its question")
        question, answer = turns[:2]
        yield sample.id, Label(answer, kind(unmarked(question), answer)), f"{path}: sample {sample.id}"


EASY_VQA = Benchmark("easy-VQA: right words", max_new_tokens=8, labels=of_files(labels), score=score)
