"""Rules: how a toolkit reads an answer, and how its score comes from what it read.

A score is the mean over parts (or their sum) of `got` in percent of `of`, both summed over the terms of a part.
Accuracy has one part and a term for each answer; a macro mean has a part for each category; POPE's F1 has 2 of 2 for
each yes that is right, and 0 of 1 for each that is wrong or lacking.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer

OFFICIAL, LMMS, VLMEVAL = "official", "lmms-eval", "vlmevalkit"
HIDDEN = ((), ("",), ("?",))  # right answers in the files of test sets
VERSIONS = {LMMS: "0.7.3", VLMEVAL: "ms-vlmeval 0.0.20"}  # the packages that tests compare with


class Reading(NamedTuple):
    """What a rule reads in an answer."""

    score: float  # from 0 to 1
    said: str | None  # the option, number or text; None if the rule finds none
    why: str  # the step of the rule that decided


class Case(NamedTuple):
    """An answer with its label and what a rule reads in it."""

    answer: Answer
    label: Any
    reading: Reading


class Term(NamedTuple):
    """A summand of a score."""

    name: str
    cases: tuple[Case, ...]
    got: float
    of: float = 1.0
    part: str = ""
    categories: tuple[str, ...] = ()
    cluster: str = ""  # terms of a cluster, such as questions about an image, are not independent
    headline: bool = True  # whether it counts in the score, not only in those of its categories


Terms = Callable[[Sequence[Case]], Iterable[Term]]


def plain(cases: Sequence[Case]) -> Iterator[Term]:
    """A term for each answer, whose label may have a `kind`."""
    for case in cases:
        kind = getattr(case.label, "kind", "")
        yield Term(case.answer.where, (case,), case.reading.score, categories=(kind,) if kind else ())


def each(cases: Sequence[Case]) -> Iterator[Term]:
    """A term for each answer, whose label has `categories` and a `cluster`."""
    for case in cases:
        label = case.label
        yield Term(label.id, (case,), case.reading.score, 1.0, "", label.categories, label.cluster)


@dataclass(frozen=True)
class Rule:
    """Attributes:
    what: the rule in a line, which is printed with its score.
    read: (text of an answer, label) -> what it says.
    terms: of a score, from all answers.
    points: of a part whose answers are all right.
    sums: whether the score is the sum of its parts, not their mean.
    guesses: (label) -> the number of options from which the toolkit draws one if it reads none; None: it does not.
    counts: whether the score is a number of points, not a percentage: 10 answers of 20 are 10.
    rounds: whether means are rounded to three digits first, and their ratio in percent to one.
    """

    what: str
    read: Callable[[str, Any], Reading]
    terms: Terms = each
    points: float = 100.0
    sums: bool = False
    guesses: Callable[[Any], int] | None = None
    counts: bool = False
    rounds: bool = False

    def cases(self, pairs: Sequence[tuple[Answer, Any]]) -> list[Case]:
        """Readings of answers. An absent answer is wrong under every rule. Raises `UserError` for a test set's labels,
        which are not public."""
        if hidden := [answer.where for answer, label in pairs if getattr(label, "answers", None) in HIDDEN]:
            raise UserError(
                f"{hidden[0]}: the right answer is not public: `submission` writes answers for the benchmark's server"
            )
        return [
            Case(answer, label, Reading(0.0, None, "no answer") if answer.text is None
                 else self.read(answer.text, label))
            for answer, label in pairs
        ]  # fmt: skip

    def value(self, terms: Sequence[Term]) -> float | None:
        """The score of these terms, with all digits; None if nothing is counted."""
        if self.counts:
            return sum(term.got for term in terms)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for term in terms:
            sums[term.part][0] += term.got
            sums[term.part][1] += term.of
        if self.rounds and terms:
            ((got, of),) = ([round(total / len(terms), 3) for total in totals] for totals in sums.values())
            return round(got / of * 100, 1) if of else None
        shares = [got / of for got, of in sums.values() if of]
        if not shares:
            return None
        return self.points * sum(shares) / (1 if self.sums else len(shares))

    def scores(self, name: str, pairs: Sequence[tuple[Answer, Any]]) -> dict[str, Any]:
        """The headline `score`, those of categories (`by`), and how many answers have no text or none that is read."""
        cases = self.cases(pairs)
        terms = list(self.terms(cases))
        by: dict[str, list[Term]] = defaultdict(list)
        for term in terms:
            for category in term.categories:
                by[category].append(term)
        unread = [case for case in cases if case.reading.said is None and not case.answer.absent]
        found = {
            "score": _rounded(self.value([term for term in terms if term.headline])),
            "by": {category: _rounded(self.value(some)) for category, some in by.items()},
            "total": len(cases),
            "failed": sum(bool(case.answer.absent) for case in cases),
            "unparsed": len(unread),
        }
        if self.guesses and unread:
            found["guesses_would_add"] = _rounded(
                100 * sum(1 / self.guesses(case.label) for case in unread) / len(cases)
            )
        version = f" {VERSIONS[name]}" if name in VERSIONS else ""
        return found | {"rule": f"{name}{version}: {self.what}"}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
