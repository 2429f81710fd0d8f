"""POPE: is an object in the image? F1 of "yes" for three ways of sampling the objects.

Each label file numbers its questions anew, and versions of the files have other questions. So answers are joined by
sampling, image and object if a file of questions is given, and otherwise by id.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import Answer, percent, question_id
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Labels, register
from llava_jax.evaluate.label_formats import Entry, unique
from llava_jax.evaluate.lines import Line, read_lines
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.rule_texts import yes_or_no
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Case, Reading, Rule, Term

SHARES = ("f1", "accuracy", "precision", "recall", "yes_ratio")
SAMPLINGS = ("adversarial", "popular", "random")
PREFIX = "coco_pope_"
ASKS = re.compile(r"Is there an? (.+?) in the ima\w+\?", re.IGNORECASE)  # some labels say "imange", versions differ


class Label(NamedTuple):
    category: str
    present: bool
    image: str = ""

    @property
    def right(self) -> str:
        return "yes" if self.present else "no"


def says_yes(text: str) -> bool:
    """As in the original, everything is a yes unless `no` or `not` is a word of the first sentence."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return {"No", "not", "no"}.isdisjoint(words)


def _reading(said: bool | None, label: Label, why: str) -> Reading:
    return Reading(float(said is label.present), {True: "yes", False: "no", None: None}[said], why)


def official(text: str, label: Label) -> Reading:
    return _reading(says_yes(text), label, "no or not in the first sentence, else yes")


def lmms_eval(text: str, label: Label) -> Reading:
    return _reading({"yes": True, "no": False}.get(text.lower().strip()), label, "the whole answer")


def vlmevalkit(text: str, label: Label) -> Reading:
    return _reading({"yes": True, "no": False}.get(yes_or_no(text)), label, "the only one of the words yes and no")


def f1_terms(cases: Sequence[Case], missed: Sequence[str | None], pooled: bool = True) -> Iterator[Term]:
    """F1 of yes, of all answers (`pooled`) or as the mean over samplings: 2 of 2 for a yes that is right, 0 of 1 for
    one that is wrong, and for what is not found: an object to which the answer is one of `missed`."""
    for case in cases:
        said, label = case.reading.said, case.label
        absent = bool(case.answer.absent) and not pooled  # wrong, whatever is right
        of = (2.0 if said == "yes" else float(said in missed)) if label.present else float(said == "yes" or absent)
        part = "" if pooled else label.category
        name = f"{label.category} {case.answer.where}"
        yield Term(name, (case,), of if of == 2.0 else 0.0, of, part, (label.category,), label.image)


def _shares(answers: Sequence[tuple[bool | None, bool]]) -> dict[str, float | None]:
    """The shares of (said yes, is present); None if nothing is counted. No answer (None) is wrong, but not a yes."""
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


def read(path: str) -> Iterator[Entry]:
    """The entries of a label file, each with its `_key` as the question."""
    category = _category(path)
    for line in read_lines(path):
        label = line.get("label")
        if label not in ("yes", "no"):
            raise UserError(f"{line.where}: the label is {label}, neither yes nor no")
        key = _key(category, (line.text("image"),), line.text("text"))
        yield Entry(question_id(line), Label(category, label == "yes", line.text("image")), line.where, key)


def _key(category: str, images: Sequence[Any], text: str) -> str:
    """The sampling, the file name of the image and the object, which all versions of the question's text have."""
    image = str(images[0]).rpartition("/")[2] if images else ""
    text = " ".join(text.replace(SHORT, "").split())
    asks = ASKS.fullmatch(text)
    return f"{category} {image}: {asks[1].lower() if asks else text}"


def _category(path: str) -> str:
    return PurePath(path).stem.removeprefix(PREFIX)


def _of_row(line: Line) -> tuple[list[Label], list[str], str]:
    """The samplings that a row is of are in one text."""
    answer, image = files.text(line, "answer"), files.first(line.value, "image_path", "image_source")
    if (right := answer.strip().lower()) not in ("yes", "no"):
        raise UserError(f"{line.where}: the answer is {answer}, neither yes nor no")
    samplings = str(line.value.get("category") or "").split(",")
    return (
        [Label(sampling.strip(), right == "yes", str(image or "")) for sampling in samplings],
        [answer],
        ",".join(samplings),
    )


@register
class Pope(Benchmark):
    name, what = "pope", "POPE: F1 of yes, over three samplings"
    label_files, entries, of_row = "`coco_pope_*.json`", staticmethod(read), staticmethod(_of_row)
    suffix = SHORT
    rules = {
        OFFICIAL: Rule("mean of F1 over the samplings; yes unless the first sentence has no or not", official,
                       lambda cases: f1_terms(cases, ("no", None), pooled=False)),
        LMMS: Rule("F1 of all answers; the whole answer is yes or no, and others are in no recall", lmms_eval,
                   lambda cases: f1_terms(cases, ("no",))),
        VLMEVAL: Rule("F1 of all answers; the only one of the words yes and no, else no", vlmevalkit,
                      lambda cases: f1_terms(cases, ("no", None))),
    }  # fmt: skip

    def labels(self, entries: Sequence[Entry], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """By sampling, image and object. Raises `UserError` if an answer may be to several samplings."""
        samplings = {entry.label.category for entry in entries}
        only = samplings.pop() if len(samplings) == 1 else ""
        if asked:
            placed = [(_category(str(question.extra.get("category", only))), question) for question in asked]
            index = {(category, str(q.id)): _key(category, q.images, q.text) for category, q in placed}
        else:
            index = {(entry.label.category, entry.id): entry.question for entry in entries}
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

        return Labels(unique((entry.question, entry.label, entry.where) for entry in entries), key)

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """In percent, by sampling and averaged over the samplings. The published number is the average F1."""
        categories: dict[str, list[tuple[bool | None, bool]]] = {}
        for answer, label in pairs:
            categories.setdefault(label.category, []).append((answer.read(says_yes, None), label.present))
        shares = {category: _shares(answers) for category, answers in sorted(categories.items())}
        means = {name: _mean([share[name] for share in shares.values()]) for name in SHARES}
        by_category = {
            category: {name: _percent(share[name]) for name in SHARES} | {"total": len(categories[category])}
            for category, share in shares.items()
        }
        return {name: _percent(mean) for name, mean in means.items()} | {
            "by_category": by_category,
            "total": len(pairs),
        }

    def recognizes(self, line: Line) -> bool:
        """Whether a line looks like an answer to a question of POPE, by its category or its prompt."""
        prompt = str(line.value.get("prompt", "")).replace(SHORT, "").strip()
        return line.value.get("category") in SAMPLINGS or bool(ASKS.fullmatch(prompt))
