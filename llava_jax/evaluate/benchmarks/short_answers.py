"""ChartQA, DocVQA, InfographicVQA and OCRBench: short answers that are read in charts, documents and other images."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from llava_jax.cli import UserError, short
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import by_key
from llava_jax.evaluate.benchmark import register
from llava_jax.evaluate.dataset_files import Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.rule_texts import anls, contains, relaxed
from llava_jax.evaluate.ruled import VLMEVAL_API, RuledBenchmark, bare, short_answer
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Reading, Rule

SHORT_ANSWER = {VLMEVAL: short_answer, VLMEVAL_API: short_answer}
RELAXED = "a number may differ by 5%, other texts only in case"


def first(text: str, item: Item) -> Reading:
    """Compares with the right answer as it is in the file, also if it looks like a list."""
    right = files.first(item.more, "answer", "label")
    return relaxed(text, str(right[0] if isinstance(right, list) else right))


def best(text: str, item: Item) -> Reading:
    """The best of the right answers, after white space at both ends is removed."""
    return max((relaxed(text.strip(), one) for one in item.answers), key=lambda reading: reading.score)


def _short(line: Line, number: int, **fields: Any) -> Item:
    """The item in a row. Raises `UserError` for one with options."""
    if files.options(line.value):
        raise UserError(f"{line.where}: has options: is it a file of another benchmark?")
    return files.item(line, number, **fields)


@register
class ChartQa(RuledBenchmark):
    name, what = "chartqa", "ChartQA: relaxed accuracy, of human and of augmented questions"
    label_files = "the official `test_human.json` and `test_augmented.json`, the Hub's Parquet, VLMEvalKit's TSV"
    max_new_tokens = 16
    shares_images = True
    sets = ("human", "augmented")
    prompts = {LMMS: lambda item: f"{item.question}\nAnswer the question with a single word.", **SHORT_ANSWER}
    rules = {
        OFFICIAL: Rule(f"pix2struct's: {RELAXED}", first),
        LMMS: Rule(RELAXED, first),
        VLMEVAL: Rule(f"{RELAXED}; without white space at the ends", best),
    }

    def item(self, line: Line, number: int) -> Item:
        row, own = line.value, "imgname" in line.value
        source = files.first(row, "type", "human_or_machine", "split", "category")
        name = PurePath(line.where).name if source is None else str(source)
        kind = "human" if "human" in name or name == "0" else "augmented"
        if kind == "augmented" and not own and not re.search("augment|machine|^1$", name):
            raise UserError(f"{line.where}: {short(name)!r} is no kind of ChartQA: is it a file of another benchmark?")
        cluster = str(row["imgname"]) if own else ""
        return _short(line, number, categories=(kind,), cluster=cluster, kind=kind if own else "")


def nearest(text: str, item: Item) -> Reading:
    return anls(text, item.answers)


class _Documents(RuledBenchmark):
    max_new_tokens = 32
    shares_images = True
    kinds: Sequence[str] = ()  # columns with the kinds of a question
    page: Sequence[str] = ()  # columns that identify the image
    prompts = {LMMS: short_answer, **SHORT_ANSWER}
    rules = {
        OFFICIAL: Rule("the challenge's ANLS: similarity to the nearest answer, 0 below a half", nearest),
        LMMS: Rule("ANLS", nearest),
        VLMEVAL: Rule("ANLS", nearest),
    }

    def item(self, line: Line, number: int) -> Item:
        row = line.value
        kinds = tuple(kind for name in self.kinds for kind in files.listing(row.get(name)))
        page = "_".join(str(row[name]) for name in self.page if row.get(name) is not None)
        ident = str(files.first(row, "questionId", *files.IDS) or number)
        return _short(line, number, id=ident, categories=kinds, cluster=page)

    def submission(self, lines: Sequence[Line], own: str | Sequence[str] | None) -> bytes:
        """The array that the challenge's server takes."""
        answers = by_key(lines, self.answer_id) if own is None else \
            {ident: answer for ident, (_, answer) in self.handed_in(lines, own).items()}  # fmt: skip
        rows = [{"questionId": int(ident) if ident.isdecimal() else ident, "answer": answer.text or ""}
                for ident, answer in answers.items()]  # fmt: skip
        return json.dumps(rows, ensure_ascii=False).encode() + b"\n"


@register
class DocVqa(_Documents):
    name, what = "docvqa", "DocVQA: ANLS"
    label_files = "the challenge's JSON, the Hub's Parquet, VLMEvalKit's TSV"
    kinds, page = ("question_types",), ("ucsf_document_id", "ucsf_document_page_no")


@register
class InfoVqa(_Documents):
    name, what = "infovqa", "InfographicVQA: ANLS"
    label_files = DocVqa.label_files
    kinds, page = ("answer_type",), ("image_url", "image_local_name")


# ------------------------------------------------------------------------------------------------------------ OCRBench

FORMULAS, HME = "Handwritten Mathematical Expression Recognition", "HME100k"
RECOGNITION = ("Regular", "Irregular", "Artistic", "Handwriting", "Digit String", "Non-Semantic")
TEXT = "Text Recognition"


def ocr(text: str, item: Item, fold: bool = False) -> Reading:
    """Formulas are told by the data set or by the type of a question: files have either."""
    told = item.categories[0] == FORMULAS or HME in (item.more.get("dataset_name"), item.more.get("dataset"))
    return contains(text, item.answers, told, fold)


@register
class OcrBench(RuledBenchmark):
    name, what = "ocrbench", "OCRBench: the number of answers, of 1,000, that contain a right one"
    label_files = "the official `OCRBench.json`, the Hub's Parquet, VLMEvalKit's TSV"
    prompts = {LMMS: lambda item: item.question.strip(), OFFICIAL: bare, VLMEVAL: bare, VLMEVAL_API: bare}
    prediction = "predict"
    rules = {
        OFFICIAL: Rule("contains a right answer, in any case; of HME100k without spaces, in the same case",
                       ocr, counts=True),
        LMMS: Rule("as official, and full-width characters equal ASCII; in points, where it prints thousandths",
                   partial(ocr, fold=True), counts=True),
        VLMEVAL: Rule("contains a right answer, in any case; of handwritten formulas without spaces, in the same case",
                      ocr, counts=True),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        row = line.value
        kind = str(files.first(row, "type", "question_type", "category") or "")
        categories = (kind, TEXT) if kind.startswith(RECOGNITION) else (kind,)
        return _short(line, number, categories=categories)
