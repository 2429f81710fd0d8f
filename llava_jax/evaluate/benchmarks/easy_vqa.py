"""easy-VQA: questions about one coloured shape, small enough for a laptop.

Labels are the answers in the LLaVA JSON that `examples.easy_vqa.data` makes from the package `easy-vqa`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmark import Benchmark, by_kind, register
from llava_jax.evaluate.label_formats import LABEL_FORMATS, Entry

SHAPES = ("circle", "rectangle", "triangle")


class Label(NamedTuple):
    right: str
    kind: str


def kind(question: str, answer: str) -> str:
    """`shape` or `colour`; of yes-or-no questions `is it that shape` or `is it that colour`."""
    if answer not in ("yes", "no"):
        return "shape" if answer in SHAPES else "colour"
    return f"is it that {'shape' if any(shape in question for shape in SHAPES) else 'colour'}"


def read(path: str) -> Iterator[Entry]:
    for entry in LABEL_FORMATS["records"].read(path):
        right = entry.label.right
        yield entry._replace(label=Label(right, kind(entry.question, right)))


@register
class EasyVqa(Benchmark):
    name, what = "easy-vqa", "easy-VQA: exact answers"
    label_files, entries = "the LLaVA JSON of `examples.easy_vqa.data`", staticmethod(read)
    max_new_tokens = 8

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """The share of answers that equal the label."""
        return by_kind([(label.kind, answer.text == label.right) for answer, label in pairs])
