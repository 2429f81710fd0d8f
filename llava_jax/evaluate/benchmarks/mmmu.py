"""MMMU and MMMU-Pro: questions of college exams, with options or, in MMMU, a short answer."""

import json
import re
from collections.abc import Iterable, Sequence

from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate import rule_options as read
from llava_jax.evaluate.benchmark import LETTER, SHORT, register
from llava_jax.evaluate.dataset_files import LETTERS, Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.matching import UNREAD, chosen, matched
from llava_jax.evaluate.rule_texts import mmmu_open
from llava_jax.evaluate.ruled import CHOICE, VLMEVAL_API, RuledBenchmark, lettered
from llava_jax.evaluate.ruled_judge import matcher
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Case, Reading, Rule, Term, each

ID = re.compile(r"(dev|validation|test)_(.+)_\d+")
IMAGE = re.compile(r"<image (\d)>")
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
                           "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
                            "Materials Mechanical_Engineering",
}  # fmt: skip
DOMAIN = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}


def _subject(line: Line, ident: str) -> str:
    found = ID.fullmatch(ident)
    return (
        found[2] if found else str(files.first(line.value, "subject", "category", "subfield") or "").replace(" ", "_")
    )


def _options(item: Item) -> int:
    return max(1, len(item.options))


# --------------------------------------------------------------------------------------------------------------- MMMU


def official(text: str, item: Item) -> Reading:
    if item.options:
        return chosen(read.mmmu(text, item.by_letter), item)
    return mmmu_open(text, item.answers)


def lmms_eval(text: str, item: Item) -> Reading:
    """lmms-eval has the right answer to an open question as one text, also if that is a list in Python's notation."""
    if item.options:
        return chosen(read.mmmu(text, item.by_letter, words=False), item)
    return mmmu_open(text, [str(item.more.get("answer"))])


def with_options(item: Item) -> Item:
    """An open question has two options for VLMEvalKit: the right answer, and "Other Answers"."""
    if item.options:
        return item
    right = str(item.more.get("answer"))
    letter = right if right in LETTERS and right else "A"
    return item._replace(options=(right, "Other Answers"), answers=(letter,))


class _Exam(RuledBenchmark):
    """What MMMU and MMMU-Pro share: `<image 1>` in texts."""

    def placed(self, text: str, images: tuple[files.Image, ...]) -> tuple[tuple[files.Image, ...], str]:
        """The first image only (official), those that the text names in their order (the toolkits), or these in the
        places where it names them (VLMEvalKit for models behind an API)."""
        if self.prompt == OFFICIAL:
            return images[:1], ""
        named = [int(number) - 1 for number in IMAGE.findall(text)]
        if not named or max(named) >= len(images):
            return images, ""
        if self.prompt == VLMEVAL_API:
            return tuple(images[place] for place in named), IMAGE.sub("<image>", text)
        return (tuple(images[place] for place in sorted(set(named))) if self.prompt == LMMS else images), ""

    def submission(self, lines: Sequence[Line], own: str | Sequence[str] | None) -> bytes:
        """The object of answers by id that the server takes: of questions with options, the letter."""
        if own is None:
            return super().submission(lines, own)
        read = self.rules[OFFICIAL].read
        said = {
            ident: (read(answer.text, item).said or "") if answer.text and item.options else answer.text or ""
            for ident, (item, answer) in self.handed_in(lines, own).items()
        }
        return json.dumps(said, indent=1).encode() + b"\n"


def _mmmu_prompt(item: Item) -> str:
    asks = f"{lettered(item)}\n\n{LETTER}" if item.options else f"\n\n{SHORT}"
    return f"{item.question}{asks}"


def _official_prompt(item: Item) -> str:
    options = "".join(f"({letter}) {option}\n" for letter, option in item.by_letter.items())
    return f"{item.question}\n\n{options}\n\n{LETTER}" if item.options else f"{item.question}\n\n{SHORT}"


@register
class Mmmu(_Exam):
    name, what = "mmmu", "MMMU: right answers to questions of 30 subjects"
    label_files = "the Hub's Parquet (one file for each subject or all), VLMEvalKit's TSV"
    unscored = ("dev",)
    judge = matcher(with_options)
    prompts = {OFFICIAL: _official_prompt, LMMS: _mmmu_prompt, **CHOICE}
    rules = {
        OFFICIAL: Rule("(X), else X as a word, else an option's text; open answers by contained texts and equal "
                       f"numbers; {UNREAD}", official, guesses=_options),
        LMMS: Rule("(X), else X before a space, else X., else an option's text; open answers as the official rule; "
                   f"{UNREAD}", lmms_eval, guesses=_options),
        VLMEVAL: Rule("the only letter, else the only option's text; open questions have the options of the right "
                      "answer and 'Other Answers'; no judge unless its replies are in the answers",
                      lambda text, item: matched(text, with_options(item))),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        row = line.value
        ident, right = str(files.first(row, *files.IDS) or number), row.get("answer")
        subject, found = _subject(line, ident), ID.fullmatch(ident)
        split = str(row.get("split") or (found[1] if found else ""))
        kind = split if split in ("dev", "test") else ""
        categories = tuple(filter(None, (DOMAIN.get(subject, ""), subject)))
        options = tuple(files.options(row)) if row.get("question_type", "multiple-choice") == "multiple-choice" else ()
        answers = (str(right),) if options else tuple(files.listing(right))
        answers = answers if right is not None else ()
        return files.item(line, number, options=options, answers=answers, categories=categories, kind=kind)


# ----------------------------------------------------------------------------------------------------------- MMMU-Pro

DIRECT = "Answer with the option letter from the given choices directly."
VISION, FOUR, STANDARD = "vision", "standard (4 options)", "standard"


def pro_lmms_eval(text: str, item: Item) -> Reading:
    """Answers to the vision set are compared as they are."""
    if item.kind == VISION:
        right = text in item.answers
        return Reading(float(right), text if text in item.by_letter else None, "the whole answer is the letter")
    return lmms_eval(text, item)


def pro_terms(cases: Sequence[Case]) -> Iterable[Term]:
    """The headline is the mean of the standard set with ten options and the vision set, if both are there."""
    kinds = {case.label.kind for case in cases}
    headline = kinds - {FOUR} or kinds
    for term in each(cases):
        kind = term.cases[0].label.kind
        yield term._replace(part=kind, headline=kind in headline, name=f"{kind} {term.name}")


def _pro_prompt(item: Item) -> str:
    return DIRECT if item.kind == VISION else f"{item.question}{lettered(item)}\n\n{DIRECT}"


def _pro_vlmevalkit(item: Item) -> str:
    direct = "Answer directly with the option letter from the given choices. "
    if item.kind == VISION:
        return f"Answer the following multiple-choice question in the image. {direct}"
    return f"Question: {item.question}\nOptions:{lettered(item)}\n{direct}"


@register
class MmmuPro(_Exam):
    name, what = "mmmu-pro", "MMMU-Pro: right options, the mean of the standard and the vision set"
    label_files = "the Hub's Parquet of one set or several, VLMEvalKit's TSV"
    max_new_tokens = 256
    sets = (VISION, FOUR, STANDARD)
    judge = matcher()
    prompts = {LMMS: _pro_prompt, OFFICIAL: _pro_prompt, VLMEVAL: _pro_vlmevalkit, VLMEVAL_API: _pro_vlmevalkit}
    rules = {
        OFFICIAL: Rule(f"the only letter after the last 'Answer:', else as lmms-eval's MMMU; {UNREAD}",
                       lambda text, item: chosen(read.mmmu_pro(text, item.by_letter), item), pro_terms,
                       guesses=_options),
        LMMS: Rule(f"as its MMMU; answers to the vision set have to be the letter alone; {UNREAD}", pro_lmms_eval,
                   pro_terms, guesses=_options),
        VLMEVAL: Rule("the only letter, else the only option's text", matched, pro_terms),
        "vlmevalkit-cot": Rule("of the only line that starts with 'Answer:'; as vlmevalkit",
                               lambda text, item: matched(read.cot(text), item), pro_terms),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        row = line.value
        ident = str(files.first(row, *files.IDS) or number)
        vision = "question" not in row or "MMMU_Pro_V" in line.where
        kind = VISION if vision else FOUR if "4 options" in line.where or "_4c" in line.where else STANDARD
        subject = _subject(line, ident)
        categories = tuple(filter(None, (kind, DOMAIN.get(subject, ""), subject)))
        question = "" if vision else files.text(line, "question")
        answers, options = (files.text(line, "answer"),), tuple(files.options(row))
        return files.item(line, number, question=question, options=options, answers=answers, categories=categories,
                          kind=kind)  # fmt: skip
