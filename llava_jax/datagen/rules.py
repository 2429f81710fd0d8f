"""The faults of answers besides their form, and the requests to repair each."""

import re
from collections.abc import Iterator

from llava_jax.cli import UserError
from llava_jax.data.unsupported import foreign_mark
from llava_jax.datagen.parsing import Fault, Turns

# reason: the message that asks the model to repair its answer
REPAIRS = {
    "wrong-form": "That is not in the form that was asked for: {detail}. Write it again in exactly that form.",
    "empty": "Something is missing: {detail}. Write it again in full.",
    "cut-off": "That was cut off before its end. Write it again, shorter, so that it ends.",
    "refusal": "No picture has to be looked at for this: what was written above is enough. Write it.",
    "mentions-context": "Write it again as one who looks at the picture, without speaking of what was given: {detail}.",
    "marks": "Write it again without {detail}.",
    "wrong-language": "Write it again in {language}.",
}
# Not repaired: near-duplicate, since the model does not know the other samples, and refused-by-server.


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_MARKS = _any(r"<image>|</?s>|<(?:pad|unk|bos|eos|im_start|im_end|im_patch)>",
              r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>")  # fmt: skip
_ENDS = (".", "!", "?", "…", "。", "！", "？", ")", "]", '"', "'", "”", "’", "»")

_GIVEN = r"(?:captions?|descriptions?|sentences?|annotations?|bounding boxes|boxes|coordinates|context|texts?|list)"
_FROM = r"(?:based on|according to|judging by|(?:as )?(?:stated|mentioned|described|given|listed) (?:in|by))"
_MENTIONS = _any(
    r"\bcaptions?\b",
    r"\bbounding[- ]box",
    r"\b(?:box|object|normali[sz]ed) coordinates?\b|\bcoordinates of\b",
    r"\[\s*[01]?\.\d+\s*,|\b0\.\d{3}\b",
    rf"\b{_FROM} (?:the|these|those|your|all) (?:\w+ )?{_GIVEN}\b",
    rf"\b(?:provided|given) {_GIVEN}\b",
    r"\b(?:the|these|those) (?:descriptions?|sentences?|annotations?) (?:say|state|mention|describe|suggest|indicate)",
    r"\b(?:not|isn['’]t|aren['’]t) (?:explicitly )?(?:mentioned|specified)\b",
)
_I_AM = r"\bi(?: am|['’]m) "
_REFUSALS = _any(
    rf"^{_I_AM}(?:very |really |so |truly )?(?:sorry|afraid)\b",
    r"^(?:sorry|apologies|unfortunately),? (?:but )?i\b",
    r"^i apologi[sz]e\b",
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|text-based)\b",
    rf"{_I_AM}(?:just |only )?an ai\b",
    rf"(?:{_I_AM}(?:unable|not able) to|\bi (?:cannot|can['’]?t|can not|won['’]t|will not)) "
    r"(?:assist|help with|comply|fulfil|provide|see|view|access|look at|generate|create|write|describe|answer)",
    r"\b(?:do not|don['’]t) have (?:the ability|access)",
)

MIN_LETTERS = 40  # to detect a language
MAX_READ = 400  # characters that the language is detected from


def find_fault(turns: Turns, language: str | None) -> Fault | None:
    """The first fault of an answer's turns. `language` is an ISO 639-1 code, None for any."""
    return next(_faults(turns, language), None)


def _faults(turns: Turns, language: str | None) -> Iterator[Fault]:
    for question, answer in turns:
        for text, asks in ((question, True), (answer, False)):
            if mark := _MARKS.search(text):
                yield Fault("marks", mark[0])
            if foreign := foreign_mark(text, asks):  # the sample would be refused where it is read
                yield Fault("marks", foreign)
        if refusal := find_refusal(answer):
            yield refusal
        for text in (question, answer):
            if mention := _MENTIONS.search(text):
                yield Fault("mentions-context", mention[0])
    if not turns[-1][1].endswith(_ENDS):
        yield Fault("cut-off", f"it ends with {turns[-1][1][-20:]!r}")
    text = " ".join(answer for _, answer in turns)[:MAX_READ]
    if language and (found := detect_language(text)) not in (language, None):
        yield Fault("wrong-language", found)


def find_refusal(text: str) -> Fault | None:
    refusal = _REFUSALS.search(text.strip())
    return Fault("refusal", refusal[0]) if refusal else None


def check_language(language: str) -> None:
    """Raises `UserError` for an unknown code. Loads the model, so that no answer has to wait for it."""
    import py3langid

    known = sorted(code for code, _ in py3langid.rank("Which languages are there?"))
    if language not in known:
        raise UserError(f"--language {language}: any, or one of {', '.join(known)}")


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, None if it is too short to detect."""
    if sum(map(str.isalpha, text)) < MIN_LETTERS:
        return None
    import py3langid  # only here: its model takes a second to load

    return py3langid.classify(text)[0]
