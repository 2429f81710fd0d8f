"""What there is to know of a benchmark that is scored by comparing answers with labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import TEXTS, Answer, question_id
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

Key = Callable[[Line], str]


class Labels(dict[str, Any]):
    """Labels by key, and how the key of an answer is told from its line: by default it's the question's id."""

    def __init__(self, labels: Mapping[str, Any], key: Key = question_id):
        super().__init__(labels)
        self.key = key


@dataclass(frozen=True)
class Benchmark:
    """Attributes:
    what: in a few words.
    questions: reads questions from a file of the benchmark's own; None where it has none but of the common forms.
    suffix: what follows each question, as for the v1.5 release.
    max_new_tokens: of an answer.
    labels: (files, lines of the answers, questions as far as they are given) -> what is right.
    score: what is printed, of all answers with their labels.
    submission: (answers as objects, the benchmark's own file or None) -> the content of a file to hand in, or of each
      file of a folder.
    fields: of the lines of what is scored; the first that is there.
    """

    what: str
    questions: Callable[[str], Iterable[Question]] | None = None
    suffix: str = ""
    max_new_tokens: int = 128
    labels: Callable[[Sequence[str], Sequence[Line], Sequence[Question]], Labels] | None = None
    score: Callable[[Sequence[tuple[Answer, Any]]], dict[str, Any]] | None = None
    submission: Callable[[Sequence[Line], str | None], bytes | dict[str, bytes]] | None = None
    fields: Sequence[str] = TEXTS


def unique(pairs: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    """A dict of (key, label, where it stands). Raises `UserError` where two labels of a key differ."""
    labels: dict[str, Any] = {}
    for key, label, where in pairs:
        if labels.setdefault(key, label) != label:
            raise UserError(f"{where}: question {key} has another label before")
    return labels


def field(value: Any, name: str, where: str) -> Any:
    """A field of an object of a file. Raises `UserError` where it isn't there."""
    if not isinstance(value, dict) or name not in value:
        raise UserError(f"{where}: has no {name}: is it a file of another kind or version?")
    return value[name]


def listed(value: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """The elements of a list in a file (of its field `name`, unless it's empty), each with where it stands."""
    elements = field(value, name, where) if name else value
    if not isinstance(elements, list):
        raise UserError(f"{where}: {name or 'its content'} is no list: is it a file of another kind or version?")
    return [(f"{where}: {name or 'element'} {number}", element) for number, element in enumerate(elements)]
