"""POPE: is there such an object in the picture? F1 of "yes", in three samplings of the objects.

Question ids of label files begin anew in each file, and versions of them differ in their questions. So answers are
joined by sampling, picture and question where a file of questions tells these, and by id only else.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, percent, question_id
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, unique
from llava_jax.evaluate.lines import Line, read_lines
from llava_jax.evaluate.questions import Question

SHARES = ("f1", "accuracy", "precision", "recall", "yes_ratio")
SAMPLINGS = ("adversarial", "popular", "random")
PREFIX = "coco_pope_"
ASKS = re.compile(r"Is there an? (.+?) in the ima\w+\?", re.IGNORECASE)  # some labels say "imange", versions differ


class Label(NamedTuple):
    category: str
    present: bool

    @property
    def right(self) -> str:
        return "yes" if self.present else "no"


def says_no(text: str) -> bool:
    """As the original reads it: `no` or `not` is a word of the first sentence; whatever else is a yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.isdisjoint(words)


def says_yes(text: str) -> bool:
    return not says_no(text)


def score(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """In percent, by sampling and on average over these (the published number is the average F1)."""
    categories: dict[str, list[tuple[bool | None, bool]]] = {}
    for answer, label in pairs:
        categories.setdefault(label.category, []).append((answer.read(says_yes, None), label.present))
    shares = {category: _shares(answers) for category, answers in sorted(categories.items())}
    means = {name: _mean([share[name] for share in shares.values()]) for name in SHARES}
    by_category = {
        category: {name: _percent(share[name]) for name in SHARES} | {"total": len(categories[category])}
        for category, share in shares.items()
    }
    return {name: _percent(mean) for name, mean in means.items()} | {"by_category": by_category, "total": len(pairs)}


def _shares(answers: Sequence[tuple[bool | None, bool]]) -> dict[str, float | None]:
    """Of (said yes, is there); None of nothing. Where nothing was said (None) that is wrong, but no yes."""
    right = sum(said == present for said, present in answers)
    found = sum(bool(said and present) for said, present in answers)
    false = sum(said is not False and not present for said, present in answers)
    yes, present = sum(said is True for said, _ in answers), sum(present for _, present in answers)
    parts = (
        (2 * found, found + false + present), (right, len(answers)), (found, found + false), (found, present),
        (yes, len(answers)),
    )  # fmt: skip
    return {name: part / whole if whole else None for name, (part, whole) in zip(SHARES, parts, strict=True)}


def _mean(shares: Sequence[float | None]) -> float | None:
    return None if not shares or None in shares else sum(shares) / len(shares)


def _percent(share: float | None) -> float | None:
    return None if share is None else percent(share, 1)


def answers_pope(line: Line) -> bool:
    """Whether a line answers a question of POPE, as far as it tells."""
    prompt = str(line.value.get("prompt", "")).replace(SHORT, "").strip()
    return line.value.get("category") in SAMPLINGS or bool(ASKS.fullmatch(prompt))


class Entry(NamedTuple):
    """A line of a label file."""

    question_id: str
    key: str
    label: Label
    where: str


def labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    entries = [entry for path in paths for entry in _read(path)]
    only = _category(paths[0]) if len(paths) == 1 else ""
    if asked:
        placed = [(_category(str(question.extra.get("category", only))), question) for question in asked]
        index = {(category, str(q.id)): _key(category, q.pictures, q.text) for category, q in placed}
    else:
        index = {(entry.label.category, entry.question_id): entry.key for entry in entries}
    categories: dict[str, list[str]] = {}
    for category, ident in index:
        categories.setdefault(ident, []).append(category)

    def key(line: Line) -> str:
        ident = question_id(line)
        known = categories.get(ident, [])
        if "category" not in line.value and len(known) > 1:
            raise UserError(f"{line.where}: question {ident} may be of {' or '.join(known)}: give --questions")
        category = _category(str(line.value.get("category", known[0] if known else only)))
        return index.get((category, ident), f"{ident} {category}".strip())

    return Labels(unique((entry.key, entry.label, entry.where) for entry in entries), key)


def _read(path: str) -> Iterator[Entry]:
    category = _category(path)
    for line in read_lines(path):
        label = line.get("label")
        if label not in ("yes", "no"):
            raise UserError(f"{line.where}: the label is {label}, neither yes nor no")
        key = _key(category, (line.text("image"),), line.text("text"))
        yield Entry(question_id(line), key, Label(category, label == "yes"), line.where)


def _key(category: str, pictures: Sequence[Any], text: str) -> str:
    """The thing that is asked for, whatever the version of the question's text; and the picture's name, wherever it
    lies: `COCO_val2014_000000310196.jpg`."""
    picture = str(pictures[0]).rpartition("/")[2] if pictures else ""
    text = " ".join(text.replace(SHORT, "").split())
    asks = ASKS.fullmatch(text)
    return f"{category} {picture}: {asks[1].lower() if asks else text}"


def _category(path: str) -> str:
    return PurePath(path).stem.removeprefix(PREFIX)


POPE = Benchmark("POPE: F1 of yes, over three samplings", None, SHORT, labels=labels, score=score)
