"""MMBench and MMBench-CN: questions with options, each asked several times with its options rotated."""

import base64
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, by_key, check_asked, percent, percent_by, question_id
from llava_jax.evaluate.benchmark import LETTER, LETTER_CN, Benchmark, Labels, groups_of, register
from llava_jax.evaluate.label_formats import field, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.rule_options import mmbench_lmms, vlmevalkit
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Case, Reading, Rule, Term
from llava_jax.evaluate.sheets import read_sheet, xlsx

LETTERS = "ABCD"
ROUND = 1_000_000  # rows whose index differs by a multiple of it are rotations of the same question
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


class Label(NamedTuple):
    question: str  # the same in all rounds
    options: tuple[tuple[str, str], ...]  # letters and texts
    right: str
    category: str


def choose(text: str, options: Mapping[str, str]) -> str:
    """The option that an answer chooses, by MMBench's rules without a language model; empty if there is none.

    It is the only one whose letter is a word of the answer (except `A` in more than three words, which may be an
    article), else the only one whose text is in the answer.
    """
    words = text.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):
        return letters[0]
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def _rule(what: str, read: Callable[[str, Mapping[str, str]], tuple[str, str]]) -> Rule:
    """A rule under which a question is right if all its rounds are."""

    def reading(text: str, label: Label) -> Reading:
        letter, why = read(text, dict(label.options))
        return Reading(float(letter == label.right), letter if letter not in ("", "Z") else None, why)

    def terms(cases: Sequence[Case]) -> Iterator[Term]:
        questions: dict[str, list[Case]] = defaultdict(list)
        for case in cases:
            questions[case.label.question].append(case)
        for question, rounds in questions.items():
            right, category = float(all(case.reading.score for case in rounds)), rounds[0].label.category
            yield Term(question, tuple(rounds), right, categories=(category,) if category else ())

    return Rule(f"right in all rotations; {what}", reading, terms)


def _with_nan(text: str, options: Mapping[str, str]) -> tuple[str, str]:
    """In lmms-eval a question with fewer options has others whose text is `nan`."""
    return mmbench_lmms(text, dict.fromkeys(LETTERS, "nan") | options)


RULES = {
    OFFICIAL: _rule("the only letter, not A in more than three words, else the only option's text; no judge",
                    lambda text, options: (choose(text, options), "the only letter or the only option's text")),
    LMMS: _rule("as official, and letters with marks around them; absent options are 'nan'; no judge", _with_nan),
    VLMEVAL: _rule("the only letter, among the last four words, else the only option's text; no judge", vlmevalkit),
}  # fmt: skip


def _chosen(answer: Answer, label: Label) -> str:
    return answer.read(lambda text: choose(text, dict(label.options)), "")


class Row(NamedTuple):
    """A line of MMBench's table."""

    index: int
    where: str
    values: dict[str, str]

    @property
    def options(self) -> list[str]:
        texts = [self.values.get(letter, "") for letter in LETTERS]
        return texts[: next((i for i, text in enumerate(texts) if _absent(text)), len(texts))]


def _absent(text: str) -> bool:
    return text.lower() in ("", "nan", "none")


def read(path: str) -> list[Row]:
    rows = []
    for where, values in read_sheet(path):
        try:
            row = Row(int(field(values, "index", where, str)), where, {k: v or "" for k, v in values.items()})
        except ValueError as error:
            raise UserError(f"{where}: the index {values['index']} is no number") from error
        if not _absent(row.values.get("E", "")):
            raise UserError(f"{where}: has an option E: MMBench has up to four, is it the table of another benchmark?")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def _rotated(row: Row, right: str, turn: int) -> Label:
    options = row.options[turn:] + row.options[:turn]
    letter = LETTERS[(LETTERS.index(right) - turn) % len(options)]
    category = row.values.get("category", "")
    return Label(str(row.index % ROUND), tuple(zip(LETTERS, options, strict=False)), letter, category)


def _with_options(row: Row, options: Sequence[str]) -> str:
    hint = row.values.get("hint", "")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([] if _absent(hint) else [hint]), row.values["question"], *lines])


def _decoded(image: str, where: str) -> bytes:
    if not image:
        raise UserError(f"{where}: has no image: the table of predictions lacks them; ask the table of questions")
    try:
        return base64.b64decode(image, validate=True)
    except ValueError as error:
        raise UserError(f"{where}: its image is no base64") from error


@register
class MMBench(Benchmark):
    name, what = "mmbench", "MMBench: right in all rotations of the options"
    label_files, entries = "MMBench's table with `answer`", staticmethod(read)
    suffix = LETTER
    own_fields = ("round_id",)
    rules = RULES
    groups = staticmethod(partial(groups_of, RULES[OFFICIAL]))  # the rounds of a question, which all have to be right

    def questions(self, path: str) -> Iterator[Question]:
        """All rounds: the rows, and their rotations unless these are rows of their own."""
        rows = read(path)
        images = {row.index: row.values.get("image", "") for row in rows}
        in_rows = any(row.index >= ROUND for row in rows)
        for row in rows:
            image = row.values.get("image", "")
            if image.isdigit() and int(image) in images:  # the index of another row with the same image
                image = images[int(image)]
            for turn in range(1 if in_rows else len(row.options)):
                options = row.options[turn:] + row.options[:turn]
                extra = {} if in_rows else {"round_id": turn}
                yield Question(row.index, _with_options(row, options), (_decoded(image, row.where),), extra)

    def labels(self, rows: Sequence[Row], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """A label for each row; if the answers have rounds (`round_id`), one for each rotation of each row."""
        in_answers = any(line.value.get("round_id") for line in lines)

        def each() -> Iterator[tuple[str, Label, str]]:
            for row in rows:
                right = row.values.get("answer", "")
                if right not in LETTERS[: len(row.options)] or not right:
                    raise UserError(f"{row.where}: question {row.index}: its answer {right!r} is none of its options")
                for turn in range(len(row.options) if in_answers else 1):
                    yield str(row.index + turn * ROUND), _rotated(row, right, turn), row.where

        def key(line: Line) -> str:
            index, turn = question_id(line), line.value.get("round_id") or 0
            numbers = index.isdecimal() and str(turn).isdecimal()
            return str(int(index) + int(turn) * ROUND) if numbers else f"{index}, round {turn}"

        return Labels(unique(each()), key)

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """A question is right if all its rounds are (`circular`); `single` is the share of right answers. `failed`
        answers choose no option."""
        chosen = [_chosen(answer, label) for answer, label in pairs]
        right = [option == label.right for option, (_, label) in zip(chosen, pairs, strict=True)]
        whole = [("".join(group.categories), group.score) for group in self.groups(pairs)]
        return {
            "circular": percent(sum(score for _, score in whole), len(whole)),
            "single": percent(sum(right), len(right)),
            "by_category": percent_by(sorted(whole)),
            "questions": len(whole),
            "total": len(pairs),
            "failed": chosen.count(""),
        }

    def submission(self, lines: Sequence[Line], own: str | None) -> bytes:
        """The table that MMBench's server takes: without images, with a prediction in each row."""
        if own is None:
            raise UserError(
                "--labels: MMBench's table of questions is needed, since its server wants it with the answers"
            )
        if any(line.value.get("round_id") for line in lines):
            raise UserError(
                f"{own}: asks each question once; MMBench's server wants its table with rows for the rounds"
            )
        answers = by_key(lines, question_id)
        rows = read(own)
        check_asked(answers, dict.fromkeys(str(row.index) for row in rows), own)
        dropped = ("hint", "category", "source", "image", "comment", "l2-category")
        names = [name for name in rows[0].values if name not in dropped]
        table: list[list[Any]] = [[*names[:6], "prediction", *names[6:]]]
        for row in rows:
            values = [row.index if name == "index" else row.values[name] for name in names]
            answer = answers.get(str(row.index))
            table.append([*values[:6], answer and answer.text, *values[6:]])
        return xlsx(table)


@register
class MMBenchCn(MMBench):
    name, what = "mmbench-cn", "MMBench-CN: the same in Chinese"
    suffix = LETTER_CN
