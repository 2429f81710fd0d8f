"""How toolkits read the chosen option in an answer. Each function returns (letter, step); the letter is "" if it finds
none. Options are texts by letter."""

import re
import string
from collections.abc import Mapping, Sequence

from llava_jax.evaluate.answers import API_FAILED

Options = Mapping[str, str]
Choice = tuple[str, str]

NONE = ("", "no option found")
REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def stripped(text: str, marks: str) -> str:
    """The text without these marks at its ends, which are removed one after the other as the toolkits do."""
    for mark in marks:
        text = text.strip(mark)
    return text


def by_text(text: str, options: Options) -> Choice:
    """The only option whose text the answer has, in any case."""
    lower = text.lower()
    named = [letter for letter, option in options.items() if option.lower() in lower]
    return (named[0], "the only option whose text it has") if len(named) == 1 else NONE


def vlmevalkit(text: str, options: Options) -> Choice:
    """`can_infer` of VLMEvalKit's matching_util.py: a letter that is the only one, else an option's text."""
    if API_FAILED not in text:
        if refusal := next((words for words in REFUSALS if words in text), ""):
            return "Z", f"refuses: {refusal!r}"
        words = text.translate(MARKS).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0], "the only letter, among the last four words"
        if not letters and "Z" in words:
            return "Z", "the word Z"
    if len(text.lower()) > 2 * sum(map(len, options.values())):
        return "", "longer than twice all options"
    return by_text(text, options)


PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
FORMATS = (("(%s)", "(A)", 6), ("%s.", "A.", 5), ("%s:", "A:", 4), ("%s)", "A)", 3), ("%s ", "A and a space", 2))


def lmms_eval(text: str, letters: Sequence[str]) -> Choice:
    """`extract_mcq_answer` of lmms-eval: the candidate whose form has the highest priority, of these the last one."""
    text = f" {stripped(text.strip(), ',.!?;:' + chr(39) + chr(34))} "
    found: list[tuple[int, int, str, str]] = []  # priority, position, letter, step
    for form, step, priority in FORMATS:
        found += [(priority, text.rfind(form % x), x, step) for x in letters if form % x in text]
    lower = text.lower()
    for phrase in PHRASES:
        if (start := lower.find(phrase)) >= 0:
            places = [(text.find(letter, start + len(phrase)), letter) for letter in letters]
            found += [(7, place, letter, f"after {phrase!r}") for place, letter in places if place >= 0]
    bare = text.strip()
    found += [(10, 0, x, "at the start") for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    found += [(9, len(text) - 1, x, "at the end") for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    found = found or [(0, text.rfind(x), x, "a capital anywhere") for x in letters if x in text]
    if not found:
        return NONE
    _, _, letter, step = max(found, key=lambda candidate: candidate[:2])  # of equal ones the first, as a stable sort
    return letter, step


def mmmu(text: str, options: Options, words: bool = True) -> Choice:
    """MMMU's `parse_multi_choice_response`: (X), else X as a word, else the text of an option; the last of several.

    `words` is false for the copies in MMMU-Pro and lmms-eval, which take X before a space, then X before a full stop.
    """
    text = f" {stripped(text, ',.!?;:' + chr(39))} "
    forms = ["(%s)", " %s "] if words else ["(%s)", "%s ", "%s."]
    for form in forms:
        if letters := [letter for letter in options if form % letter in text]:
            places = [text.rfind(("(%s)" if form == "(%s)" else " %s ") % letter) for letter in letters]
            return letters[places.index(max(places))], form % "X"
    lower = text.lower()
    if len(text.split()) > 5 and (named := [x for x, option in options.items() if option.lower() in lower]):
        places = [lower.rfind(options[letter].lower()) for letter in named]
        return named[places.index(max(places))], "the text of an option"
    return NONE


def mmmu_pro(text: str, options: Options) -> Choice:
    """MMMU-Pro's `parse_multi_choice_response`: the only letter after the last "Answer:", else as `mmmu`."""
    _, found, after = text.rpartition("Answer:")
    letters = [letter for letter in options if found and letter in after]
    return (letters[0], "after 'Answer:'") if len(letters) == 1 else mmmu(text, options, words=False)


def cot(text: str) -> str:
    """VLMEvalKit's `cot_postproc`: what the only line that starts with "Answer:" says."""
    lines = [line for line in map(str.strip, text.strip().split("\n")) if line.startswith("Answer:")]
    if len(lines) != 1:
        return text
    capitals = {mark for mark in lines[0][1:] if mark in string.ascii_uppercase} | {"A"}
    return capitals.pop() if len(capitals) == 1 else lines[0][7:]


def mmstar(text: str, right: str) -> Choice:
    """MMStar's own rule, which only knows places where the right letter may be; else the letter is the first one."""
    lower = text.lower().strip().replace("\n", " ")
    for start in ("", "(", "option ", "the answer is "):
        if lower.startswith(start) and lower[len(start) : len(start) + 1] == right.lower():
            return right, f"after {start!r}" if start else "the first character"
    said = re.match(r"(?:\(|option |the answer is )?([a-d])(?![a-z])", lower)
    return (said[1].upper(), "another letter") if said else NONE


AI2D = re.compile(r"^\s*([A-Z])\.")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def alone(text: str, options: Options) -> Choice:
    """The letter alone, in any case and with any punctuation: lmms-eval's `exact_match`, which ignores both."""
    said = text.lower().translate(PUNCTUATION).upper()
    return (said, "the letter alone") if said in options else NONE


def ai2d(text: str, options: Options) -> Choice:
    """lmms-eval's filter of AI2D: a capital and a full stop at the start, else the letter `alone`."""
    found = AI2D.match(text)
    return (found[1], "X. at the start") if found else alone(text, options)


BRACKETED = (("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""), (":", ","),
             (":", "."), (":", ")"), (":", ")."))  # fmt: skip


def mmbench_lmms(text: str, options: Options) -> Choice:
    """lmms-eval's `can_infer` of MMBench: letters A to E as words (A not if there are more than three), then with marks
    around them, then an option's text."""
    words = text.split()
    if API_FAILED not in text:
        letters = [letter for letter in "ABCDE" if letter in words]
        if len(letters) == 1 and not ("A" in words and len(words) > 3):
            return letters[0], "the only letter"
        for before, after in BRACKETED:
            letters = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
            if len(letters) == 1:
                return letters[0], f"the only {before}X{after}"
    return by_text(text, options)


def scienceqa_lmms(text: str) -> Choice:
    """lmms-eval's rule of ScienceQA: the letter alone in any case, or a capital and a full stop at the start."""
    text = text.strip()
    if len(text) == 1:
        return text.upper(), "the letter alone"
    return (text[0], "X. at the start") if text[:1].isupper() and text[1:2] == "." else NONE
