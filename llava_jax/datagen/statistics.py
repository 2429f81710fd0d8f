"""The statistics of instruction data for its report: lengths, turns, kinds of questions, first words, objects."""

import array
import functools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llava_jax.data.sources import Sample
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.instructions import DETAILED
from llava_jax.datagen.objects import Finder

FIRST_WORDS = 3
# kind of a question: its pattern; the first one that matches the words after the last comma counts
QUESTIONS = {
    "how many": r"\bhow (many|much)\b|\bnumber of\b",
    "colour": r"\bcolou?rs?\b",
    "where": r"^where\b|\bwhat (is|are) the (location|place|setting|position)\b|\bwhich (side|direction)\b",
    "when": r"^when\b|\bwhat (time|season|year)\b",
    "who": r"^who(se|m)?\b",
    "why": r"^why\b|\breasons?\b|\bpurpose\b",
    "doing what": r"\bwhat\b.*\bdoing\b|\bactivit(y|ies)\b",
    "how": r"^how\b",
    "yes or no": r"^(is|are|was|were|do|does|did|can|could|has|have|had|will|would|should|may|might)\b",
    "what or which": r"\b(what|which)\b",
    "a request": r"[.!]$",
    "other": "",
}
_QUESTIONS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in QUESTIONS.items()}
_DESCRIBE = re.compile(r"\bdescri(be|ption)\b|\bin detail\b|\bdetailed\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Claims(NamedTuple):
    """The objects that a sample's answers name, and those of its image."""

    supported: frozenset[str]
    unsupported: dict[str, str]  # category: the word in the answers
    boxes: frozenset[str]  # categories that have boxes
    covered: frozenset[str]  # those of them that the sample names


def kind_of(sample: Sample) -> str:
    """conversation: several questions; detail: one that asks for a description; reasoning: any other one."""
    questions = questions_of(sample)
    if len(questions) > 1:
        return "conversation"
    return "detail" if questions and (questions[0] in DETAILED or _DESCRIBE.search(questions[0])) else "reasoning"


def questions_of(sample: Sample) -> list[str]:
    return [text.replace(IMAGE_TOKEN, "").strip() for role, text in sample.turns if role == "user"]


def question_kind(question: str) -> str:
    end = question.rpartition(", ")[2]
    return next(kind for kind, pattern in _QUESTIONS.items() if pattern.search(end))


class Facts:
    """The objects in the boxes and captions of images, in a few numbers for each image.

    An image is found by its name or by the last part of it. Contexts of the same image are merged.
    """

    def __init__(self, contexts: Iterable[Context], finder: Finder):
        self.finder = finder
        self._bits = {category: 1 << bit for bit, category in enumerate(finder.categories)}
        self._images: dict[str, tuple[int, int, int]] = {}  # number of its context, categories of boxes, of captions
        for number, context in enumerate(contexts):
            boxes = self._mask(box.category.lower() for box in context.boxes)
            captions = self._mask(finder.named(" . ".join(context.captions)))
            known = self._images.get(context.image, (number, 0, 0))
            self._images[context.image] = (known[0], known[1] | boxes, known[2] | captions)

    def number(self, image: str) -> int:
        """The number of the context of an image that has one."""
        return self._find(image)[0]

    def claims(self, sample: Sample) -> Claims | None:
        """The objects of a sample, None if it has no image, or one without a context."""
        found = [self._find(image) for image in sample.images]
        if not found or None in found:
            return None
        merged = [functools.reduce(operator.or_, (image[kind] for image in found)) for kind in (1, 2)]
        boxes, captions = map(self._categories, merged)
        supported, unsupported = set(), {}
        for role, text in sample.turns:
            for word, categories in self.finder.mentions(text) if role == "assistant" else ():
                if true := [category for category in categories if category in boxes or category in captions]:
                    supported.add(true[0])
                else:
                    unsupported.setdefault(categories[0], word)
        covered = boxes & self.finder.named(" . ".join(text for _, text in sample.turns))
        return Claims(frozenset(supported), unsupported, boxes, covered)

    def _find(self, image: str) -> tuple[int, int, int] | None:
        return self._images.get(image) or self._images.get(image.rpartition("/")[2])

    def _mask(self, categories: Iterable[str]) -> int:
        return functools.reduce(operator.or_, map(self._bits.get, categories), 0)

    def _categories(self, mask: int) -> frozenset[str]:
        return frozenset(category for category, bit in self._bits.items() if mask & bit)


@dataclass
class Objects:
    """How many samples name objects with and without support. Counters are by category."""

    samples: int = 0  # whose image has a context
    with_unsupported: int = 0
    boxed: Counter[str] = field(default_factory=Counter)  # whose image has such a box
    covered: Counter[str] = field(default_factory=Counter)  # those of them that name it
    supported: Counter[str] = field(default_factory=Counter)  # that claim such an object
    unsupported: Counter[str] = field(default_factory=Counter)

    def add(self, claims: Claims) -> None:
        self.samples += 1
        self.with_unsupported += bool(claims.unsupported)
        self.boxed.update(claims.boxes)
        self.covered.update(claims.covered)
        self.supported.update(claims.supported)
        self.unsupported.update(claims.unsupported.keys())


class Lengths:
    """The number of questions of each sample of a kind, and the number of words of questions and of answers."""

    def __init__(self) -> None:
        self.questions, self.question_words, self.answer_words = (array.array("I") for _ in range(3))

    def add(self, sample: Sample) -> None:
        questions = questions_of(sample)
        self.questions.append(len(questions))
        self.question_words.extend(len(question.split()) for question in questions)
        self.answer_words.extend(len(text.split()) for role, text in sample.turns if role == "assistant")


def describe(numbers: array.array) -> dict[str, float]:
    """Mean, quantiles and maximum of numbers; zeros for none."""
    values = np.frombuffer(numbers, np.uint32) if numbers else np.zeros(1)
    p50, p90 = np.quantile(values, (0.5, 0.9), method="nearest").tolist()
    return {"mean": float(values.mean()), "median": p50, "90 %": p90, "most": int(values.max())}


class Statistics:
    """All statistics, updated sample by sample."""

    def __init__(self, facts: Facts | None, kind: str | None = None):
        self.facts = facts
        self.kind = kind  # of all samples; None infers it from each
        self.lengths: dict[str, Lengths] = defaultdict(Lengths)
        self.questions: Counter[str] = Counter()
        self.first_words: Counter[tuple[str, ...]] = Counter()
        self.objects = Objects()

    def add(self, sample: Sample) -> tuple[str, Claims | None]:
        """Returns the kind of the sample and what it claims."""
        kind = self.kind or kind_of(sample)
        self.lengths[kind].add(sample)
        for question in questions_of(sample):
            self.questions[question_kind(question)] += 1
            self.first_words[tuple(word.lower() for word in _WORD.findall(question)[:FIRST_WORDS])] += 1
        claims = self.facts.claims(sample) if self.facts else None
        if claims:
            self.objects.add(claims)
        return kind, claims


class Branch(NamedTuple):
    """A word, the number of questions with it in this place, and the words that follow."""

    word: str
    count: int
    branches: tuple["Branch", ...]


def tree(first_words: dict[tuple[str, ...], int], limit: int) -> tuple[Branch, ...]:
    """The first words of questions as a tree: the most common branches of each node first, and only so many."""
    after: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for words, count in first_words.items():
        if words:
            after[words[0]][words[1:]] += count
    ordered = sorted(after.items(), key=lambda item: (-item[1].total(), item[0]))[:limit]
    return tuple(Branch(word, rest.total(), tree(rest, limit)) for word, rest in ordered)
