"""Short answers as the VQA challenges write them, so that "Two." and "2" are the same, and their soft accuracy.

Published numbers depend on every quirk of the challenges' code, so they are all here: a full stop stays only before a
digit (and from the 33rd on), marks become spaces or nothing depending on whether any of them stands beside a space,
and of contractions some are mended to what nobody writes.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

_MENDED = Path(__file__).with_name("contractions.txt")
CONTRACTIONS = dict(pair.split(":") for pair in _MENDED.read_text("utf-8").split())
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
STOP = re.compile(r"\.(?!\d)")
MOST_STOPS = 32  # that are taken out: the challenges' code passes a flag of that value where the count goes


@functools.lru_cache(1 << 17)
def official(text: str) -> str:
    """An answer as the VQA challenge compares it."""
    return _words(_without_marks(_on_one_line(text)))


@functools.lru_cache(1 << 17)
def submitted(text: str) -> str:
    """An answer as the published models submitted theirs to the challenges, and as TextVQA compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_without_marks(_on_one_line(text.strip())))


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    number = COMMA_IN_NUMBER.search(text) is not None
    without = text
    for mark in MARKS:
        if mark in text:
            nothing = number or f"{mark} " in text or f" {mark}" in text
            without = without.replace(mark, "" if nothing else " ")
    return STOP.sub("", without, count=MOST_STOPS)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str | None, answers: Sequence[str]) -> float:
    """Of an answer, or None, beside those of people: a third for each of them who says the same, at most 1, on average
    over leaving out each of them in turn."""
    same = list(answers).count(answer)
    # Left out is one of those who say the same, or one of the others.
    people = len(answers)
    return (same * min(1.0, (same - 1) / 3) + (people - same) * min(1.0, same / 3)) / people
