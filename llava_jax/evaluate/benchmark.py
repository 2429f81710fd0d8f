"""What there is to know of a benchmark that is scored by comparing answers with labels."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import TEXTS, Answer, by_key, percent, percent_by, question_id
from llava_jax.evaluate.lines import Line, once
from llava_jax.evaluate.questions import Question

SHORT = "Answer the question using a single word or phrase."
KINDS = {str: "text", list: "list", dict: "object", int: "whole number"}  # what types are called in errors
LETTER = "Answer with the option's letter from the given choices directly."

Key = Callable[[Line], str]


class Labels(dict[str, Any]):
    """Labels by key, and how the key of an answer is told from its line: by default it's the question's id.

    `again` has the keys of questions that were asked before in the same words, and the keys of these: where such a
    question is answered but once, the answer counts for both.
    """

    def __init__(self, labels: Mapping[str, Any], key: Key = question_id, again: Mapping[str, str] | None = None):
        super().__init__(labels)
        self.key = key
        self.again = again or {}

    def answers(self, lines: Sequence[Line], names: Sequence[str] = TEXTS) -> dict[str, Answer]:
        """The answers in lines, by key. Raises `UserError` at two different ones of a key."""
        answers = by_key(lines, self.key, names)
        shared = {key: answers[first] for key, first in self.again.items() if key not in answers and first in answers}
        return answers | shared


class Judged(NamedTuple):
    """Answers that are scored together, and what came of them."""

    name: str  # what tells them from others
    pairs: Sequence[tuple[Answer, Any]]
    categories: tuple[str, ...]
    score: float
    of: float = 1.0
    weight: float = 1.0  # in the sums over several of them


@dataclass(frozen=True)
class Benchmark:
    """Attributes:
    what: in a few words.
    questions: reads questions from a file of the benchmark's own; None where it has none but of the common forms.
    suffix: what follows each question, as for the v1.5 release.
    max_new_tokens: of an answer.
    labels: (files, lines of the answers, questions as far as they are given) -> what is right.
    score: what is printed, of all answers with their labels.
    judged: answers that are scored together, apart from others; None where each is scored alone.
    submission: (answers as objects, the benchmark's own file or None) -> the content of a file to hand in, or of each
      file of a folder.
    fields: of the lines of what is scored; the first that is there.
    ids: what its question ids look like (a regular expression), by which answers to other benchmarks are told.
    """

    what: str
    questions: Callable[[str], Iterable[Question]] | None = None
    suffix: str = ""
    max_new_tokens: int = 128
    labels: Callable[[Sequence[str], Sequence[Line], Sequence[Question]], Labels] | None = None
    score: Callable[[Sequence[tuple[Answer, Any]]], dict[str, Any]] | None = None
    judged: Callable[[Sequence[tuple[Answer, Any]]], Iterable[Judged]] | None = None
    submission: Callable[[Sequence[Line], str | None], bytes | dict[str, bytes]] | None = None
    fields: Sequence[str] = TEXTS
    ids: str = ""


def unique(pairs: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    """A dict of (key, label, where it stands). Raises `UserError` where two labels of a key differ."""
    return {key: label for key, (label, _) in once(pairs, "question {key} has another label before").items()}


def of_files(read: Callable[[str], Iterable[tuple[str, Any, str]]]) -> Callable[..., Labels]:
    """`labels` of a benchmark whose files alone tell what is right, by question id. `read` gives what `unique` takes of
    a file."""
    return lambda paths, lines, asked: Labels(unique(label for path in paths for label in read(path)))


def by_kind(values: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The scores of a benchmark whose questions are of several kinds, of (kind, accuracy of an answer)."""
    accuracy = percent(sum(value for _, value in values), len(values))
    return {"accuracy": accuracy, "by_kind": dict(sorted(percent_by(values).items())), "total": len(values)}


def field(value: Any, name: str, where: str, kind: type = object) -> Any:
    """A field of an object of a file. Raises `UserError` where it isn't there, or is of another kind."""
    if not isinstance(value, dict) or name not in value:
        raise UserError(f"{where}: has no {name}: is it a file of another kind or version?")
    if not isinstance(value[name], kind):
        raise UserError(f"{where}: its {name} is no {KINDS[kind]} but {json.dumps(value[name])[:40]}")
    return value[name]


def listed(value: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """The elements of a list in a file (of its field `name`, unless it's empty), each with where it stands."""
    elements = field(value, name, where) if name else value
    if not isinstance(elements, list):
        raise UserError(f"{where}: {name or 'its content'} is no list: is it a file of another kind or version?")
    return [(f"{where}: {name or 'element'} {number}", element) for number, element in enumerate(elements)]
