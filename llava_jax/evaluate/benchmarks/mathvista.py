"""MathVista: questions about figures, whose answers are an option, a number or a list.

The toolkits have a language model extract the answer from a text (`judge mathvista`). Without its replies, only answers
that need no extraction are read: the option or the number alone.
"""

import json
import re
from collections.abc import Iterator, Sequence

from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import TEXTS, by_key
from llava_jax.evaluate.benchmark import LETTER, register
from llava_jax.evaluate.dataset_files import LETTERS, Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.rule_options import alone, vlmevalkit
from llava_jax.evaluate.rule_texts import distance
from llava_jax.evaluate.ruled import VLMEVAL_API, RuledBenchmark, lettered
from llava_jax.evaluate.ruled_judge import RuledJudge
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Reading, Rule

CHOICE, INTEGER, FLOAT, LIST = "multi_choice", "integer", "float", "list"
QUICK = re.compile(r'The answer is "(.*)"\.')
BRACKETS = re.compile(r"\(([a-zA-Z])\)")
QUERY = re.compile(r"Hint: .*?\nQuestion: (.*?)(?:\nChoices:\n.*)?", re.DOTALL)
FACETS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
EXAMPLES = {
    CHOICE: "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    INTEGER: "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, "
             "at the end.",
    FLOAT: "Hint: Please answer the question requiring a floating-point number with {} decimal place{} and provide the "
           "final value, e.g., {}, at the end.",
    LIST: "Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, "
          "2, 3], [1.2, 1.3, 1.4], at the end.",
}  # fmt: skip
FORMS = {
    CHOICE: LETTER,
    INTEGER: "Answer the question using a single integer number.",
    FLOAT: "Answer the question using a single floating-point number with {} decimal place{}.",
    LIST: "Answer the question using a Python list.",
}


def _hint(hints: dict[str, str], item: Item) -> str:
    many = _precision(item) == 2
    return hints[item.kind].format("two" if many else "one", "s" if many else "", "1.23, 1.34, 1.45" if many else
                                   "1.2, 1.3, 1.4")  # fmt: skip


def _precision(item: Item) -> int:
    return int(float(item.more.get("precision") or 0))


def _question(item: Item) -> str:
    unit = item.more.get("unit")
    return f"{item.question} (Unit: {unit})" if unit else item.question


def query(item: Item) -> str:
    """The official query, which the Hub's file and VLMEvalKit's table have as a column."""
    if item.more.get("query"):
        return item.more["query"]
    choices = f"\nChoices:{lettered(item, '({}) {}')}" if item.options else ""
    return f"{_hint(EXAMPLES, item)}\nQuestion: {_question(item)}{choices}"


def _form_prompt(item: Item) -> str:
    return f"{_question(item)}{lettered(item)}\n{_hint(FORMS, item)}"


# --------------------------------------------------------------------------------------------------------------- rules


def extracted(text: str, item: Item) -> tuple[str, str]:
    """The answer in a text, and how it was found: as it is, by a language model, or quoted."""
    if item.kind == CHOICE and text in item.options:
        return text, "the text of an option"
    for kind, number in ((INTEGER, int), (FLOAT, float)):
        if item.kind == kind:
            try:
                return str(number(text)), "the number alone"
            except ValueError:
                pass
    if item.reply is not None:
        none = item.reply.strip().rstrip(".") == "Z" and "Z" not in item.options  # as the judge is asked to write
        return "" if none else item.reply, "extracted by a judge"
    found = QUICK.search(text)
    return (found[1], 'after "The answer is"') if found else ("", "")


def direct(text: str, item: Item) -> str:
    """What is read of an answer without an extraction: (X), or the letter alone, or the number alone."""
    if item.kind == CHOICE:
        found, text = BRACKETS.findall(text), text.strip()
        return found[0].upper() if found else text if text in item.options else alone(text, item.by_letter)[0]
    return text.strip().rstrip(".") if item.kind in (INTEGER, FLOAT) else text.strip()


def normalized(extraction: str, item: Item, precision: int | float) -> str | None:
    """The official `normalize_extracted_answer`: the option that a letter names, or else the most similar one; a number
    in the form of the right answer."""
    try:
        if item.kind == CHOICE:
            found = BRACKETS.findall(extraction)
            letter = found[0].upper() if found else extraction.strip()
            if letter in LETTERS[: len(item.options)] and len(letter) == 1:
                return item.options[LETTERS.index(letter)]
            return min(item.options, key=lambda option: distance(letter, option))
        if item.kind == INTEGER:
            return str(int(float(extraction)))
        return str(round(float(extraction), precision)) if item.kind == FLOAT else extraction
    except (ValueError, OverflowError, TypeError):
        return None


def official(text: str, item: Item) -> Reading:
    """An empty extraction is wrong, as with the script's `--ignore_empty_extractions`."""
    said, why = _normal(text, item, _precision(item))
    return Reading(float(said == item.answers[0]), said, why)


def lmms_eval(text: str, item: Item) -> Reading:
    """As official, without white space at the ends. But `precision` is used as it is: with the 1.0 of the Hub's file,
    which is no integer, Python cannot round, and no decimal number is right."""
    said, why = _normal(text.strip(), item, item.more.get("precision") or 0)
    return Reading(float(said is not None and said.strip() == item.answers[0].strip()), said, why)


def _normal(text: str, item: Item, precision: int | float) -> tuple[str | None, str]:
    extraction, why = extracted(text, item)
    extraction, why = (extraction, why) if why else (direct(text, item), "without an extraction")
    return normalized(extraction, item, precision) if extraction.strip() else None, why


def vlmeval(text: str, item: Item) -> Reading:
    """VLMEvalKit's `post_check`, of the answer, else of a judge's reply. Lists are never right."""
    for said, why in ((text, "as it is"), (item.reply or "", "extracted by a judge")):
        if item.kind == CHOICE:
            letter, step = vlmevalkit(said, item.by_letter)
            if letter and (letter != "Z" or item.reply is None):
                right = item.more.get("answer_option") or LETTERS[item.options.index(item.answers[0])]
                return Reading(float(letter == right), None if letter == "Z" else letter, step)
        elif item.kind in (INTEGER, FLOAT):
            number = int if item.kind == INTEGER else float
            try:
                value = number(said)
            except ValueError:
                continue
            if value == number(item.answers[0]) or item.reply is None or said != text:
                return Reading(float(value == number(item.answers[0])), str(value), why)
    return Reading(0.0, None, "lists are never right" if item.kind == LIST else "no answer read")


PROMPT = (
    "A model answered a question about a figure. Write only its final answer, without any other word: the letter of "
    "the option that it chooses, or the number or the Python list that it gives. Write Z if it gives none.\n\n"
    "Question:\n{question}\n\nAnswer of the model:\n{answer}\n\nFinal answer:"
)
WITHOUT = "without a judge's replies only the option or the number alone is read"


@register
class MathVista(RuledBenchmark):
    name, what = "mathvista", "MathVista: right options and numbers, extracted by a judge"
    label_files = "the official `testmini.json`, the Hub's Parquet, VLMEvalKit's TSV"
    max_new_tokens = 1024
    fields = ("text", "response", *TEXTS)  # in its scripts' output, `prediction` is the extracted answer
    prompts = {LMMS: _form_prompt, OFFICIAL: query, VLMEVAL: query, VLMEVAL_API: query}
    judge = RuledJudge(PROMPT, query, lambda text, item: not extracted(text, item)[1])
    rules = {
        OFFICIAL: Rule(f"the option by its letter, else the most similar one; rounded numbers; {WITHOUT}", official),
        LMMS: Rule(f"as official, with the precision as it is in the file; {WITHOUT}", lmms_eval),
        VLMEVAL: Rule(f"the only letter, else the only option's text; numbers as they are; lists are wrong; {WITHOUT}",
                      vlmeval),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        """VLMEvalKit's table has the query in place of the question."""
        row = line.value
        question, unit = files.text(line, "question"), row.get("unit")
        if found := QUERY.fullmatch(question):
            row = {"query": question} | row
            question = found[1].removesuffix(f" (Unit: {unit})")
        facets = {**row, **(row["metadata"] if isinstance(row.get("metadata"), dict) else {})}
        categories = [f"{name}: {value}" for name in FACETS for value in files.listing(facets.get(name))]
        kind = CHOICE if files.text(line, "question_type") == CHOICE else files.text(line, "answer_type")
        options = tuple(files.options(row)) if kind == CHOICE else ()
        right = row.get("answer")
        ident = str(files.first(row, "pid", "id", "index", "question_id") or number)
        answers = (str(right),) if right is not None else ()
        return files.item(line._replace(value=row), number, id=ident, question=question, options=options,
                          answers=answers, categories=tuple(categories), kind=kind)  # fmt: skip

    def questions(self, path: str) -> Iterator[Question]:
        """Kinds of answers are no categories of questions."""
        return (question._replace(extra={}) for question in super().questions(path))

    def submission(self, lines: Sequence[Line], own: str | Sequence[str] | None) -> bytes:
        """The object of responses by id whose answers MathVista's script extracts."""
        answers = by_key(lines, self.answer_id, self.fields) if own is None else {}
        found = {ident: ({}, answer) for ident, answer in answers.items()}
        if own is not None:
            found = {ident: (item.more, answer) for ident, (item, answer) in self.handed_in(lines, own).items()}
        said = {ident: problem | {"response": answer.text or ""} for ident, (problem, answer) in found.items()}
        return json.dumps(said, indent=1, default=str).encode() + b"\n"
