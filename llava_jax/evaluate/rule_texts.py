"""How toolkits compare short answers: numbers with a tolerance, edit distances, contained texts, and yes or no."""

import functools
import re
from collections.abc import Sequence

from llava_jax.evaluate.rules import Reading
from llava_jax.evaluate.vqa_answers import ARTICLES, CONTRACTIONS, NUMBERS

# ---------------------------------------------------------------------------------------------------------- numbers


def to_float(text: str) -> float | None:
    """A number, or a percentage as a share, as pix2struct reads them; None for others, such as those with commas."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(text: str, right: str) -> Reading:
    """ChartQA's relaxed accuracy: numbers may differ by 5%, other texts in case only. Zero is compared as a text."""
    said, target = to_float(text), to_float(right)
    if said is not None and target:
        return Reading(float(abs(said - target) / abs(target) <= 0.05), text, f"numbers: {said:g} and {target:g}")
    return Reading(float(text.lower() == right.lower()), text, "texts without case")


# ------------------------------------------------------------------------------------------------------------- ANLS


@functools.lru_cache(1 << 15)
def distance(first: str, second: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(second) + 1))
    for i, mark in enumerate(first, 1):
        above, row = row, [i]
        for j, other in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (mark != other)))
    return row[-1]


def anls(text: str, right: Sequence[str]) -> Reading:
    """Average normalized Levenshtein similarity: of the nearest right answer; below a half it is 0. The distance
    ignores case and repeated white space, but is divided by the length of the texts as they are."""
    said, values = _plain(text), []
    for one in right:
        length, wanted = max(len(one.upper()), len(text.upper())), _plain(one)
        far = abs(len(wanted) - len(said)) > length / 2  # at least this distance, which counts as 0
        values.append(1.0 if far else distance(wanted, said) / length if length else 0.0)
    score = 1 - min(values)
    return Reading(score if score >= 0.5 else 0.0, text, f"similarity {score:.3f}")


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


# --------------------------------------------------------------------------------------------------------- contained


def contains(text: str, right: Sequence[str], formula: bool, fold: bool = False) -> Reading:
    """OCRBench: whether the answer contains a right one, of formulas without spaces, of others without case.

    Args:
      fold: whether full-width characters equal ASCII, as in lmms-eval.
    """

    def plain(text: str) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        text = folded(text) if fold else text
        return text.lower().strip().replace("\n", " ")

    text = plain(text.strip() if fold else text)
    found = next((one for one in right if plain(one) in text), None)
    return Reading(float(found is not None), text, "contains it" if found is not None else "contains no right answer")


def folded(text: str) -> str:
    """Full-width characters as ASCII."""
    return "".join(chr(ord(x) - 0xFEE0) if 0xFF01 <= ord(x) <= 0xFF5E else " " if x == "\u3000" else x for x in text)


# --------------------------------------------------------------------------------------------------------- yes or no

VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
STOP = re.compile(r"(?<!\d)\.(?!\d)")


@functools.lru_cache(1 << 17)
def without_marks(text: str) -> str:
    """VLMEvalKit's `process_punctuation`, which keeps a full stop next to a digit."""
    number, result = COMMA_IN_NUMBER.search(text) is not None, text
    for mark in VQA_MARKS:
        nothing = number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if nothing else " ")
    return STOP.sub("", result, count=re.UNICODE.value)  # the flag of 32 is passed as the count


def yes_or_no(text: str) -> str | None:
    """VLMEvalKit's `YOrN_Extraction`: the one of the words yes and no that the answer has; None if both or neither."""
    words = without_marks(text.lower()).split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else None


@functools.lru_cache(1 << 17)
def vqa_words(text: str) -> str:
    """VLMEvalKit's `process_answer` for TextVQA: its own punctuation step, then numbers, articles and contractions."""
    text = without_marks(text.replace("\n", " ").replace("\t", " ").strip())
    words = [word for word in (NUMBERS.get(word, word) for word in text.lower().split()) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


# --------------------------------------------------------------------------------------------- MMMU's open questions

THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = set(":,.!?;'")


def mmmu_values(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; a single character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def mmmu_candidates(text: str) -> list[str | float]:
    """What an answer may say: the shortest rest of each line after a key such as `is `, and the numbers in it."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    said = []
    for number, line in enumerate(lines, 1):
        keys = KEYS if number < len(lines) else (*KEYS, "=")
        shortest = ""
        for key in keys:
            rest = line.rpartition(key)[2].strip()
            if key in line and (not shortest or len(rest) < len(shortest)):
                shortest = rest
        if shortest and shortest not in TRIVIAL:
            said.append(shortest)
    said = said or [text]
    numbers = [number for one in said for form in (THOUSANDS, SCIENTIFIC, SIMPLE) for number in form.findall(one)]
    return [value for one in [*said, *numbers] for value in mmmu_values(one)]


def mmmu_open(text: str, right: Sequence[str]) -> Reading:
    """Right if a right text is contained in a candidate, or a right number equals one."""
    said = mmmu_candidates(text)
    wanted = [value for one in right for value in mmmu_values(one)]
    numbers = [value for value in wanted if isinstance(value, float)]
    texts = [value for value in wanted if isinstance(value, str)]
    for one in said:
        if one in numbers if isinstance(one, float) else any(value in one for value in texts):
            return Reading(1.0, str(one), "the number" if isinstance(one, float) else "contains it")
    return Reading(0.0, str(said[0]), "no candidate is right")
