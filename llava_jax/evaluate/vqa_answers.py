"""Short answers as the VQA challenges write them, so that "Two." and "2" are the same, and their soft accuracy.

Published numbers depend on every quirk of the challenges' code, so they are all here: a full stop stays only before a
digit (and from the 33rd on), marks become spaces or nothing depending on whether any of them stands beside a space,
and of contractions some are mended to what nobody writes.
"""

import functools
import re
from collections.abc import Sequence

_MENDED = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
    I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
    somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
    someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _MENDED.split())
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
