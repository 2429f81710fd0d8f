"""What a benchmark declares: what is asked, what is right, how answers are scored, judged and handed in.

A benchmark is a module that registers one `Benchmark`. All commands ask that object; none knows a benchmark by name.
"""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import TEXTS, Answer, percent, percent_by
from llava_jax.evaluate.label_formats import LABEL_FORMATS, Entry, LabelFormat, Labels, read_labels, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.model_task import ModelTask
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.toolkit_rows import OfRow, Row, add_rows, labels_of
from llava_jax.registry import Registry

if TYPE_CHECKING:
    import argparse

    from llava_jax.evaluate.outcomes import Outcome
    from llava_jax.evaluate.rules import Rule

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"

Pairs = Sequence[tuple[Answer, Any]]  # answers with their labels
Scores = dict[str, Any]  # numbers by name; `by_...` holds those of categories


class Group(NamedTuple):
    """Answers that are scored together, such as both answers about an image of MME, and their score."""

    name: str  # unique within the benchmark
    pairs: Pairs
    categories: tuple[str, ...]
    score: float
    of: float = 1.0
    weight: float = 1.0  # in sums over groups
    cluster: str = ""  # groups of a cluster, such as questions about an image, are not independent


class ScoreCommand(ABC):
    """`score NAME` of a benchmark that scores other files than answers and labels, and has options of its own.

    Attributes:
      what: its title, a colon and its score, in a few words.
      epilog: examples and explanations for `--help`.
    """

    name: str
    what: str
    epilog = ""

    @abstractmethod
    def add_arguments(self, parser: "argparse.ArgumentParser") -> None:
        """Adds the options except `--json`."""

    @abstractmethod
    def score(self, args: "argparse.Namespace") -> "tuple[Scores, Iterable[Outcome]]":
        """The scores, and the outcome of each question for `--outcomes`, if there is this option."""

    @abstractmethod
    def table(self, scores: Scores) -> str:
        """The scores as text."""

    def to_json(self, scores: Scores) -> Scores:
        return scores


class Benchmark:
    """A benchmark: a subclass that `register` adds, with what differs from these defaults.

    Attributes:
      name: on the command line and in file names.
      what: its title, a colon and its score, in a few words.
      label_files: the files that its score needs, in a few words.
      suffix: text after each question, as in the v1.5 release.
      max_new_tokens: of an answer.
      fields: fields of a line that hold what is scored; the first one present counts.
      ids: a regular expression that all its question ids match. A submission refuses other ids.
      own_fields: fields that only answers to this benchmark have.
      several_files: whether a submission may have several files of questions.
      judge: how a language model judges answers.
      reference: how a language model writes reference answers.
      score_commands: `score` commands with options of their own.
      commands: other commands of its own, by their words: (`module:function`, what it does).
      rules: how toolkits score, by name, for `score --as`.
      prompts: how toolkits ask, by name, for `predict --prompt`: item -> text.

    Methods that are None here are those that some benchmarks do not have:
      entries: path -> the entries of one of the `label_files`. Other forms of labels are a `LabelFormat` each.
      of_row: a row of the toolkits' files -> its labels, the right answers in it, and what tells it from other rows
        with its id.
      questions: path -> the questions of a file in the benchmark's own format.
      score: answers with their labels -> scores.
      groups: answers with their labels -> those that are scored together, if not each by itself.
      submission: (lines of answers, the benchmark's own file or None) -> the content of a file to hand in, or of each
        file of a folder.
    """

    name: str
    what: str
    label_files = ""
    suffix = ""
    max_new_tokens = 128
    fields: Sequence[str] = TEXTS
    ids = ""
    own_fields: Sequence[str] = ()
    several_files = False
    judge: ModelTask | None = None
    reference: ModelTask | None = None
    score_commands: Sequence[ScoreCommand] = ()
    commands: Mapping[str, tuple[str, str]] = {}
    rules: "Mapping[str, Rule]" = {}
    prompts: Mapping[str, Callable[[Any], str]] = {}
    rule: "Rule | None" = None  # that `scored_as` chose

    entries: Callable[[str], Iterable[Any]] | None = None
    of_row: OfRow | None = None
    questions: Callable[[str], Iterable[Question]] | None = None
    score: Callable[[Pairs], Scores] | None = None
    groups: Callable[[Pairs], Iterable[Group]] | None = None
    submission: Callable[[Sequence[Line], str | None], bytes | dict[str, bytes]] | None = None

    def labels(self, entries: Sequence[Entry], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """The labels from the entries of label files; by default by question id.

        Args:
          lines: the answers.
          asked: the questions, if they are given.
        """
        return Labels(unique((entry.id, entry.label, entry.where) for entry in entries))

    def recognizes(self, line: Line) -> bool:
        """Whether a line looks like an answer to this benchmark. Submissions to others refuse such answers."""
        return False

    def read_labels(
        self, paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question], form: LabelFormat | None = None
    ) -> Labels:
        """The labels in files, for these answers. `form` is the format of the files; by default they tell it."""
        entries = [entry for path in paths for entry in read_labels(path, self.name, form)]
        rows = [entry for entry in entries if isinstance(entry, Row)]
        return labels_of(rows) if rows else self.labels(entries, lines, asked)

    def scored_as(self, name: str) -> "Benchmark":
        """The benchmark scored by a toolkit's rule. Raises `UserError` if there is none with this name."""
        if name not in self.rules:
            known = f"has {', '.join(self.rules)}" if self.rules else "has one rule only"
            raise UserError(f"--as {name}: {self.title} {known}")
        ruled, rule = copy.copy(self), self.rules[name]
        ruled.rule, ruled.score, ruled.groups = rule, partial(rule.scores, name), partial(groups_of, rule)
        return ruled

    def asked_as(self, name: str) -> "Benchmark":
        """The benchmark with a toolkit's prompts. Raises `UserError` if there are none with this name."""
        if name not in self.prompts:
            known = f"has {', '.join(self.prompts)}" if self.prompts else "has one prompt only"
            raise UserError(f"--prompt {name}: {self.title} {known}")
        asked = copy.copy(self)
        asked.prompt = name
        return asked

    @property
    def title(self) -> str:
        return self.what.partition(":")[0]


def groups_of(rule: "Rule", pairs: Pairs) -> Iterator[Group]:
    """The terms of a score as groups of answers, whose weights make the parts of the score equal."""
    every = list(rule.terms(rule.cases(pairs)))
    counted = {id(case) for term in every if term.headline for case in term.cases}
    terms = [term for term in every if term.headline or not any(id(case) in counted for case in term.cases)]
    totals: Counter[str] = Counter()
    for term in terms:
        totals[term.part] += term.of
    for term in terms:
        weight = 1.0 if len(totals) == 1 else 1 / (totals[term.part] or 1)
        own = [(case.answer, case.label) for case in term.cases]
        yield Group(term.name, own, term.categories, term.got, term.of, weight, term.cluster)


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")


def register(benchmark: type[Benchmark]) -> type[Benchmark]:
    """Class decorator that adds a benchmark, and the formats of its labels."""
    one = BENCHMARKS.add(benchmark())
    if one.entries:
        LABEL_FORMATS.add(LabelFormat(one.name, one.label_files, (one.name,), one.entries))
    if one.of_row:
        add_rows(one.name, one.of_row)
    return benchmark


def by_kind(values: Sequence[tuple[str, float]]) -> Scores:
    """The scores of a benchmark whose questions are of several kinds, from (kind, accuracy of an answer)."""
    accuracy = percent(sum(value for _, value in values), len(values))
    kinds = percent_by(sorted((kind, value) for kind, value in values if kind))
    return {"accuracy": accuracy, "by_kind": kinds, "total": len(values)}
