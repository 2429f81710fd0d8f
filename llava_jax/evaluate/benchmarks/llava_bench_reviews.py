"""Reviews: a judge's text about two answers to a question, and the two scores in its first line.

A file has one a line: `question_id`, `category`, `content` (the judge's text), `tuple` (the scores of the reference and
of the model). `judge llava-bench` adds `judge`, `prompt_hash` and, if the model's answer was shown first, `swapped`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import answer_of
from llava_jax.evaluate.benchmarks.llava_bench_files import read_by_id
from llava_jax.evaluate.lines import Line, once, read_lines
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.llm_api.thinking import after_thinking

FAILED = (-1.0, -1.0)  # in files, for a review without scores
LOWEST = 1.0  # score of a judge
Scores = tuple[float, float]


class Review(NamedTuple):
    question_id: str
    category: str | None
    scores: Scores | None  # of the reference and of the model; None if the judge gave none
    swapped: bool  # whether the model's answer was shown first
    judge: str | None  # the judge's model
    prompt_hash: str | None  # of the judge's instructions
    content: str = ""  # the judge's text
    absent: str = ""  # the reason why the model gave no answer: its score is then the lowest


def parse_scores(content: str, exactly: bool = False) -> Scores | None:
    """The two numbers in the first line, separated by spaces or commas, if it has nothing else.

    `exactly` reads it as the original does, for which two spaces in a row are an error.
    """
    words = content.split("\n")[0].replace(",", " ").split(" " if exactly else None)
    try:
        return _valid([float(word) for word in words])
    except ValueError:
        return None


def _valid(scores: Any) -> Scores | None:
    """The scores if they are two numbers from 0 on."""
    if not isinstance(scores, list) or len(scores) != 2:
        return None
    if not all(type(score) in (int, float) and math.isfinite(score) and score >= 0 for score in scores):
        return None
    return float(scores[0]), float(scores[1])


def read_reviews(
    path: epath.PathLike, partial: bool = False, reparse: bool = False, exactly: bool = False
) -> list[Review]:
    """The reviews of a file. Scores are the stored ones, or with `reparse` those in the texts.

    Args:
      partial: skips a last line that is cut off.
      exactly: reads texts as the original does, see `parse_scores`.

    Raises:
      UserError: for a line that is no review, two different reviews of a question in the same order of the answers, or
        reviews by several judges.
    """
    items = []
    for line in read_lines(path, partial):
        review = _review(line, reparse, exactly)
        if items and (review.judge, review.prompt_hash) != (items[0][1].judge, items[0][1].prompt_hash):
            raise UserError(f"{line.where}: is by another judge than the lines before; give each a file of its own")
        items.append(((review.question_id, review.swapped), review, line.where))
    if not items:
        raise UserError(f"{path}: holds no reviews")
    found = once(items, "question {key} was reviewed in {first} already, and otherwise", name=lambda key: key[0])
    return [review for review, _ in found.values()]


def _review(line: Line, reparse: bool, exactly: bool) -> Review:
    stored = None if reparse else line.value.get("tuple", line.value.get("score"))
    swapped = bool(line.value.get("swapped", False))
    content = line.get("content", "text") if stored is None else line.value.get("content", line.value.get("text", ""))
    if not isinstance(content, str):
        raise UserError(f"{line.where}: question {line.get('question_id')}: its content is no text")
    content = after_thinking(content) or ""
    if stored is None:
        scores = parse_scores(content, exactly)
        scores = scores[::-1] if scores and swapped else scores
    elif isinstance(stored, list) and len(stored) == 2 and all(type(score) in (int, float) for score in stored):
        scores = _valid(stored)
    else:
        raise UserError(f"{line.where}: question {line.get('question_id')}: its tuple {stored} is not two numbers")
    absent = str(line.value.get("no_answer", ""))
    if scores and absent:
        scores = (scores[0], min(scores[1], LOWEST))
    return Review(
        line.text("question_id"),
        None if line.value.get("category") is None else str(line.value["category"]),
        scores,
        swapped,
        line.value.get("judge"),
        line.value.get("prompt_hash"),
        content,
        absent,
    )


# ----------------------------------------------------------------------------------------------- outcomes, for `report`

Texts = Mapping[str, Line]  # lines of a file by question id


def outcomes(
    files: Sequence[Sequence[Review]], questions: Texts, answers: str | None, references: str | None
) -> Iterator[Outcome]:
    """The outcome of each question: the sums over all its reviews. Texts of the files `answers` and `references` are
    added if they are given."""
    said, right = read_by_id(answers), read_by_id(references)
    reviews: dict[str, list[Review]] = {}
    for review in (review for file in files for review in file):
        reviews.setdefault(review.question_id, []).append(review)
    for ident, own in reviews.items():
        scored = [review.scores for review in own if review.scores]
        asked = questions[ident].value if ident in questions else {}
        yield Outcome(
            ident,
            () if own[0].category is None else (own[0].category,),
            score=sum(model for _, model in scored),
            of=sum(reference for reference, _ in scored),
            question=str(asked.get("text", "")),
            image=str(asked.get("image", "")),
            answer=_said(said, ident),
            reference=_said(right, ident),
            judgement="\n\n".join(review.content for review in own),
            judge=own[0].judge or "",
            prompt_hash=own[0].prompt_hash or "",
        )


def _said(lines: Texts, ident: str) -> str:
    """An answer without its thinking."""
    return answer_of(lines[ident], ("text",)).text or "" if ident in lines else ""
