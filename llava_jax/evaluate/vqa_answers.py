"""Normalization of short answers by the VQA challenges, so that "Two." and "2" are the same, and soft accuracy.

Published numbers depend on every quirk of the challenges' code, so all of them are here: a full stop stays only before
a digit (and from the 33rd on); punctuation becomes a space or nothing depending on whether any occurrence is next to a
space; some contractions are corrected to words that do not exist.
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
MAX_STOPS = 32  # that are removed: the challenges' code passes a flag of this value as the count


@functools.lru_cache(1 << 17)
def official(text: str) -> str:
    """An answer as the VQA challenge compares it."""
    return words(without_marks(on_one_line(text)))


@functools.lru_cache(1 << 17)
def submitted(text: str) -> str:
    """An answer as the published models submitted it to the challenges, and as TextVQA compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return words(without_marks(on_one_line(text.strip())))


def on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_marks(text: str, stop: re.Pattern[str] = STOP) -> str:
    number = COMMA_IN_NUMBER.search(text) is not None
    without = text
    for mark in MARKS:
        if mark in text:
            nothing = number or f"{mark} " in text or f" {mark}" in text
            without = without.replace(mark, "" if nothing else " ")
    return stop.sub("", without, count=MAX_STOPS)


def words(text: str) -> str:
    numbered = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def soft_accuracy(answer: str | None, answers: Sequence[str]) -> float:
    """The soft accuracy of an answer, or of None: min(1, n/3) for n people who give the same answer, averaged over
    leaving out each person in turn."""
    same = list(answers).count(answer)
    # The person left out is one of the n who agree, or one of the others.
    people = len(answers)
    return (same * min(1.0, (same - 1) / 3) + (people - same) * min(1.0, same / 3)) / people
