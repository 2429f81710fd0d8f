"""MMStar, AI2D and RealWorldQA: questions with options about an image."""

import re
from collections.abc import Iterable, Sequence

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate import rule_options as read
from llava_jax.evaluate.benchmark import LETTER, register
from llava_jax.evaluate.dataset_files import LETTERS, Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.matching import chosen, matched
from llava_jax.evaluate.ruled import CHOICE, RuledBenchmark, bare, lettered
from llava_jax.evaluate.ruled_judge import matcher
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Case, Reading, Rule, Term, each

ABCD = tuple("ABCD")
MATCHER = "the only letter, else the only option's text; no judge unless its replies are in the answers"


# -------------------------------------------------------------------------------------------------------------- MMStar

IN_QUESTION = re.compile(r"\b([A-D]): (.*?)(?=,? *\n?[B-D]: |$)", re.DOTALL)


def by_axis(cases: Sequence[Case]) -> Iterable[Term]:
    """Every value is the mean over the 18 axes."""
    return (term._replace(part=term.categories[-1]) for term in each(cases))


def _star_prompt(item: Item) -> str:
    return f"{item.question.strip()}{lettered(item)}\n{LETTER.removesuffix('.')}"


def _with_options(item: Item) -> Item:
    """The item with the options that its question ends with, if it has no others."""
    if item.options:
        return item
    _, _, end = item.question.rpartition("Options:")
    found = tuple(text.strip() for _, text in IN_QUESTION.findall(end))
    if len(found) < 2:
        raise UserError(f"question {item.id}: has no options: give VLMEvalKit's own table as --labels")
    return item._replace(options=found)


@register
class MmStar(RuledBenchmark):
    name, what = "mmstar", "MMStar: right options, in six categories"
    label_files = "the Hub's Parquet, VLMEvalKit's TSV"
    judge = matcher(_with_options)
    prompts = {LMMS: _star_prompt, **CHOICE}
    rules = {
        OFFICIAL: Rule("the right letter is the first character, or follows '(', 'option ' or 'the answer is '",
                       lambda text, item: chosen(read.mmstar(text, item.answers[0]), item)),
        LMMS: Rule("the letter in the form with the highest priority; means over the 18 axes",
                   lambda text, item: chosen(read.lmms_eval(text, ABCD), item), by_axis),
        VLMEVAL: Rule(MATCHER, lambda text, item: matched(text, _with_options(item))),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        axis = files.text(line, "l2_category", "l2-category")
        categories = (*filter(None, [str(line.value.get("category") or "")]), axis)
        answers = (files.text(line, "answer").strip().upper(),)
        return files.item(line, number, answers=answers, categories=categories)


# ---------------------------------------------------------------------------------------------------------------- AI2D


def _ai2d_prompt(item: Item) -> str:
    return f"{item.question}{lettered(item)}\n{LETTER}"


@register
class Ai2d(RuledBenchmark):
    name, what = "ai2d", "AI2D: right options, about diagrams"
    label_files = "the Hub's Parquet, VLMEvalKit's TSV (AI2D_TEST, or AI2D_TEST_NO_MASK, which is easier)"
    max_new_tokens = 16
    judge = matcher()
    shares_images = True
    prompts = {LMMS: _ai2d_prompt, **CHOICE}
    rules = {
        OFFICIAL: Rule("the letter alone, in any case and with any punctuation (its authors publish no scorer)",
                       lambda text, item: chosen(read.alone(text.strip(), item.by_letter), item)),
        LMMS: Rule("X. at the start, else the letter alone", lambda text, item: chosen(read.ai2d(text, item.by_letter),
                                                                                     item)),
        VLMEVAL: Rule(MATCHER, matched),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        """The Hub has the right option's number, others its letter."""
        options, right = tuple(files.options(line.value)), files.text(line, "answer")
        letter = LETTERS[int(right)] if right.isdecimal() else right
        if letter not in LETTERS[: len(options)]:
            raise UserError(f"{line.where}: the answer {right} is none of its {len(options)} options")
        return files.item(line, number, options=options, answers=(letter,))


# --------------------------------------------------------------------------------------------------------- RealWorldQA

ASKS = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


def _plain(text: str) -> str:
    return text.lower().strip().rstrip(".")


def world_official(text: str, item: Item) -> Reading:
    return Reading(float(_plain(text) == item.answers[0].strip().lower()), text, "the answer alone")


def world_lmms_eval(text: str, item: Item) -> Reading:
    if item.answers[0].strip().upper() in ABCD:
        return chosen(read.lmms_eval(text, ABCD), item)
    return world_official(text, item)


def _asked(item: Item) -> Item:
    """The item with the options in its question."""
    options = item.options or tuple(option for _, option in ASKS.findall(item.question))
    if not options:
        raise UserError(f"question {item.id}: has no options: give VLMEvalKit's own table as --labels")
    return item._replace(options=options)


@register
class RealWorldQa(RuledBenchmark):
    name, what = "realworldqa", "RealWorldQA: right letters, words and numbers"
    label_files = "the Hub's Parquet, VLMEvalKit's TSV"
    max_new_tokens = 16
    judge = matcher(_asked)
    prompts = {LMMS: lambda item: item.question.strip() + lettered(item), OFFICIAL: bare, **CHOICE}
    rules = {
        OFFICIAL: Rule("the answer alone, in any case, with or without a full stop (its authors publish no scorer)",
                       world_official),
        LMMS: Rule("letters: the one in the form with the highest priority; other answers alone, in any case",
                   world_lmms_eval),
        VLMEVAL: Rule(MATCHER, lambda text, item: matched(text, _asked(item))),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        return files.item(line, number, answers=(files.text(line, "answer").strip(),))
