"""Label formats: the files that `score --labels` takes, and helpers to read them."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_jax.cli import UserError, warn
from llava_jax.evaluate.answers import TEXTS, Answer, by_key, question_id, read_json
from llava_jax.evaluate.lines import Line, once
from llava_jax.registry import Registry

KINDS = {str: "text", list: "list", dict: "object", int: "whole number"}  # names of JSON types in errors


class Entry(NamedTuple):
    """A question in a file of labels, with its label."""

    id: str
    label: Any  # of the class that the benchmark scores with
    where: str  # file and line, for errors
    question: str = ""  # empty if the file does not have it


@dataclass(frozen=True)
class LabelFormat:
    """Attributes:
    name: for `score --label-format`.
    what: in a few words.
    benchmarks: names of the benchmarks whose labels it holds.
    read: path -> `Entry` of each question, or other objects that the benchmark's `labels` takes.
    matches: whether a file may have this format. Of several that match, the one that was registered last reads the
      file.
    """

    name: str
    what: str
    benchmarks: tuple[str, ...]
    read: Callable[[str], Iterable[Any]]
    matches: Callable[[str], bool] = lambda path: True


class Labels(dict[str, Any]):
    """Labels by key, and how to get the key of an answer from its line: by default it is the question's id.

    `again` maps the keys of repeated questions to the key of the first one. If only the first one is answered, the
    answer counts for all of them. Answers with keys in `skipped` are left out.
    """

    def __init__(
        self,
        labels: Mapping[str, Any],
        key: Callable[[Line], str] = question_id,
        again: Mapping[str, str] | None = None,
        skipped: Collection[str] = (),
    ):
        super().__init__(labels)
        self.key = key
        self.again = again or {}
        self.skipped = skipped

    def answers(self, lines: Sequence[Line], names: Sequence[str] = TEXTS) -> dict[str, Answer]:
        """The answers in lines, by key. Raises `UserError` for two different answers with the same key."""
        counted = [line for line in lines if self.key(line) not in self.skipped] if self.skipped else lines
        if len(counted) < len(lines):
            warn(f"{lines[0].where}: {len(lines) - len(counted)} answers to questions that are not scored are left out")
        answers = by_key(counted, self.key, names)
        shared = {key: answers[first] for key, first in self.again.items() if key not in answers and first in answers}
        return answers | shared


LABEL_FORMATS: Registry[LabelFormat] = Registry("label format")


def read_labels(path: str, benchmark: str, form: LabelFormat | None = None) -> Iterable[Any]:
    """The entries of a file. `form` is its format; by default it is found by the benchmark and by `matches`."""
    for known in [form] if form else reversed(formats_of(benchmark)):
        if form or known.matches(path):
            return known.read(path)
    raise UserError(f"{path}: has no format of labels of {benchmark}")


def formats_of(benchmark: str) -> list[LabelFormat]:
    return [form for form in LABEL_FORMATS.values() if benchmark in form.benchmarks]


# ------------------------------------------------------------------------------------------------ reading JSON labels


def unique(labels: Iterable[tuple[str, Any, str]]) -> dict[str, Any]:
    """A dict of (key, label, where it is). Raises `UserError` if two labels of a key differ."""
    return {key: label for key, (label, _) in once(labels, "question {key} has another label before").items()}


def field(value: Any, name: str, where: str, kind: type = object) -> Any:
    """A field of a JSON object. Raises `UserError` if it is missing or of another type."""
    if not isinstance(value, dict) or name not in value:
        raise UserError(f"{where}: has no {name}: is it a file of another kind or version?")
    if not isinstance(value[name], kind):
        raise UserError(f"{where}: its {name} is no {KINDS[kind]} but {json.dumps(value[name])[:40]}")
    return value[name]


def listed(value: Any, name: str, where: str) -> list[tuple[str, Any]]:
    """The elements of the list in field `name` (of `value` itself if it is empty), each after its place in the file."""
    elements = field(value, name, where) if name else value
    if not isinstance(elements, list):
        raise UserError(f"{where}: {name or 'its content'} is no list: is it a file of another kind or version?")
    return [(f"{where}: {name or 'element'} {number}", element) for number, element in enumerate(elements)]


def entries_by_id(path: str) -> list[tuple[str, str, Any]]:
    """The entries of a file that is one object of questions by id: place in the file, id and value of each."""
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise UserError(f"{path}: is no object of questions by id: is it a file of another kind or version?")
    return [(f"{path}: question {ident}", ident, entry) for ident, entry in entries.items()]
