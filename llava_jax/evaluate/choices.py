"""Questions with options: MMBench, MMBench-CN (each asked again with its options rotated) and SEED-Bench."""

import base64
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import IDS, Answer, by_key, check_asked, percent, percent_by, question_id, read_json
from llava_jax.evaluate.benchmark import LETTER, Benchmark, Judged, Labels, by_kind, field, listed, of_files, unique
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.sheets import read_sheet, xlsx

LETTERS = "ABCD"
LETTER_CN = "请直接回答选项字母。"
ROUND = 1_000_000  # rows of MMBench whose index differs by multiples of it ask the same with rotated options
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


class Label(NamedTuple):
    question: str  # the same in all rounds
    options: tuple[tuple[str, str], ...]  # letters and texts
    right: str
    category: str


def choose(text: str, options: Mapping[str, str]) -> str:
    """The option that an answer means, as MMBench tells without a language model: the only one whose letter is a word
    of it (no `A` in more than three words, which may be an article), or whose text is in it; empty where there is none.
    """
    words = text.translate(PUNCTUATION).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):
        return letters[0]
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else ""


def _chosen(answer: Answer, label: Label) -> str:
    return answer.read(lambda text: choose(text, dict(label.options)), "")


def score_mmbench(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """A question counts as right if it's answered right in all its rounds (`circular`); `single` is over all answers.
    `failed` answers tell no option."""
    chosen = [_chosen(answer, label) for answer, label in pairs]
    right = [option == label.right for option, (_, label) in zip(chosen, pairs, strict=True)]
    rounds: dict[str, list[bool]] = defaultdict(list)
    for one, (_, label) in zip(right, pairs, strict=True):
        rounds[label.question].append(one)
    whole = {question: all(of_question) for question, of_question in rounds.items()}
    asked = sorted({(label.category, label.question) for _, label in pairs})
    return {
        "circular": percent(sum(whole.values()), len(whole)),
        "single": percent(sum(right), len(right)),
        "by_category": percent_by((category, whole[question]) for category, question in asked),
        "questions": len(whole),
        "total": len(pairs),
        "failed": chosen.count(""),
    }


def judged_mmbench(pairs: Sequence[tuple[Answer, Label]]) -> Iterator[Judged]:
    """Each question: right if it is in all its rounds."""
    questions: dict[str, list[tuple[Answer, Label]]] = defaultdict(list)
    for answer, label in pairs:
        questions[label.question].append((answer, label))
    for question, rounds in questions.items():
        right = all(_chosen(answer, label) == label.right for answer, label in rounds)
        yield Judged(question, rounds, (rounds[0][1].category,), float(right))


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


def _rows(path: str) -> list[Row]:
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


def mmbench_labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    """Each row of the table; where rounds are told by the answers (`round_id`), each rotation of its rows."""
    in_answers = any(line.value.get("round_id") for line in lines)

    def labels() -> Iterator[tuple[str, Label, str]]:
        for path in paths:
            for row in _rows(path):
                right = row.values.get("answer", "")
                if right not in LETTERS[: len(row.options)] or not right:
                    raise UserError(f"{row.where}: question {row.index}: its answer {right!r} is none of its options")
                for turn in range(len(row.options) if in_answers else 1):
                    yield str(row.index + turn * ROUND), _rotated(row, right, turn), row.where

    def key(line: Line) -> str:
        index, turn = question_id(line), line.value.get("round_id") or 0
        numbers = index.isdecimal() and str(turn).isdecimal()
        return str(int(index) + int(turn) * ROUND) if numbers else f"{index}, round {turn}"

    return Labels(unique(labels()), key)


def _rotated(row: Row, right: str, turn: int) -> Label:
    options = row.options[turn:] + row.options[:turn]
    letter = LETTERS[(LETTERS.index(right) - turn) % len(options)]
    category = row.values.get("category", "")
    return Label(str(row.index % ROUND), tuple(zip(LETTERS, options, strict=False)), letter, category)


def mmbench_questions(path: str) -> Iterator[Question]:
    """All rounds: the rows, and their rotations where no rows have them."""
    rows = _rows(path)
    pictures = {row.index: row.values.get("image", "") for row in rows}
    in_rows = any(row.index >= ROUND for row in rows)
    for row in rows:
        picture = row.values.get("image", "")
        if picture.isdigit() and int(picture) in pictures:  # the same as another row's
            picture = pictures[int(picture)]
        for turn in range(1 if in_rows else len(row.options)):
            options = row.options[turn:] + row.options[:turn]
            extra = {} if in_rows else {"round_id": turn}
            yield Question(row.index, _with_options(row, options), (_decoded(picture, row.where),), extra)


def _with_options(row: Row, options: Sequence[str]) -> str:
    hint = row.values.get("hint", "")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([] if _absent(hint) else [hint]), row.values["question"], *lines])


def _decoded(picture: str, where: str) -> bytes:
    if not picture:
        raise UserError(f"{where}: has no image: the table of predictions lacks them; ask the table of questions")
    try:
        return base64.b64decode(picture, validate=True)
    except ValueError as error:
        raise UserError(f"{where}: its image is no base64") from error


def submit_mmbench(lines: Sequence[Line], own: str | None) -> bytes:
    """The table of MMBench's server: without pictures, with a prediction a row."""
    if own is None:
        raise UserError("--labels: MMBench's table of questions is needed, since its server wants it with the answers")
    if any(line.value.get("round_id") for line in lines):
        raise UserError(f"{own}: asks each question once; MMBench's server wants its table with rows for the rounds")
    answers = by_key(lines, question_id)
    rows = _rows(own)
    check_asked(answers, dict.fromkeys(str(row.index) for row in rows), own)
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    names = [name for name in rows[0].values if name not in dropped]
    table: list[list[Any]] = [[*names[:6], "prediction", *names[6:]]]
    for row in rows:
        values = [row.index if name == "index" else row.values[name] for name in names]
        answer = answers.get(str(row.index))
        table.append([*values[:6], answer and answer.text, *values[6:]])
    return xlsx(table)


# ----------------------------------------------------------------------------------------------------------------- SEED


class SeedLabel(NamedTuple):
    right: str
    kind: str
    medium: str  # image, video


def score_seed(pairs: Sequence[tuple[Answer, SeedLabel]]) -> dict[str, Any]:
    """The share of answers that are exactly the right letter, as published. `failed` answers are no letter."""
    read = [(answer.read(str.strip, ""), label) for answer, label in pairs]
    scores = by_kind([(label.kind, said == label.right) for said, label in read])
    by_medium = percent_by((label.medium, said == label.right) for said, label in read)
    failed = sum(said not in set(LETTERS) for said, _ in read)
    return {"accuracy": scores.pop("accuracy")} | by_medium | scores | {"failed": failed}


def seed_labels(path: str) -> Iterator[tuple[str, SeedLabel, str]]:
    value = read_json(path)
    kinds = {str(number): name for name, number in field(value, "question_type", path, dict).items()}
    for where, entry in listed(value, "questions", path):
        kind = str(field(entry, "question_type_id", where))
        medium = str(entry.get("data_type", "image"))
        label = SeedLabel(field(entry, "answer", where, str), kinds.get(kind, kind), medium)
        yield str(field(entry, "question_id", where)), label, where


def seed_questions(path: str) -> Iterator[Question]:
    """Those about pictures; the frames of videos, as the v1.5 release cut them out, are in its file of questions."""
    for where, entry in listed(read_json(path), "questions", path):
        if entry.get("data_type", "image") != "image":
            continue
        options = [f"{letter}. {field(entry, f'choice_{letter.lower()}', where)}" for letter in LETTERS]
        text = "\n".join([field(entry, "question", where), *options])
        yield Question(field(entry, "question_id", where), text, (str(field(entry, "data_id", where)),))


def submit_seed(lines: Sequence[Line], own: str | None) -> bytes:
    """Of `own`, SEED-Bench's JSON, all questions have to be among the answers, and no others."""
    answers = by_key(lines, question_id)
    if own:
        check_asked(answers, unique(seed_labels(own)), own)
    ids = {question_id(line): line.get(*IDS) for line in lines}
    rows = [{"question_id": ids[ident], "prediction": answer.text or ""} for ident, answer in answers.items()]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


MMBENCH = Benchmark(
    "MMBench: right in all rounds", mmbench_questions, LETTER, labels=mmbench_labels, score=score_mmbench,
    judged=judged_mmbench, submission=submit_mmbench,
)  # fmt: skip
MMBENCH_CN = dataclasses.replace(MMBENCH, what="MMBench-CN: the same in Chinese", suffix=LETTER_CN)
SEED = Benchmark(
    "SEED-Bench: right letters", seed_questions, LETTER, labels=of_files(seed_labels), score=score_seed,
    submission=submit_seed, ids=r"v?\d+",
)  # fmt: skip
