"""Reviews: what a judge wrote about two answers to a question, and the two scores that stand in its first line.

A file holds one a line: `question_id`, `category`, `content` (of the judge), `tuple` (the scores of the reference and
of the model). Ours have besides these `judge`, `prompt_hash` and, where the model's answer was shown first, `swapped`.
"""

import math
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.lines import Line, once, read_lines
from llava_jax.llm_api.thinking import after_thinking

FAILED = (-1.0, -1.0)  # what files have for scores where a review had none
LOWEST = 1.0  # that a judge gives
Scores = tuple[float, float]


class Review(NamedTuple):
    question_id: str
    category: str | None
    scores: Scores | None  # of the reference and of the model; None where the judge gave none
    swapped: bool  # whether the model's answer was shown first
    judge: str | None  # the judge's model
    prompt_hash: str | None  # of the judge's instructions
    content: str = ""  # what the judge wrote
    absent: str = ""  # why there was no answer of the model: its score is the lowest, whatever the judge gave


def parse_scores(content: str, exactly: bool = False) -> Scores | None:
    """The two numbers that the first line consists of, separated by spaces or commas.

    `exactly` as the original reads it: what follows each space is a number, so that a second space is a fault.
    """
    words = content.split("\n")[0].replace(",", " ").split(" " if exactly else None)
    try:
        return _valid([float(word) for word in words])
    except ValueError:
        return None


def _valid(scores: Any) -> Scores | None:
    """Two numbers that can be scores."""
    if not isinstance(scores, list) or len(scores) != 2:
        return None
    if not all(type(score) in (int, float) and math.isfinite(score) and score >= 0 for score in scores):
        return None
    return float(scores[0]), float(scores[1])


def read_reviews(
    path: epath.PathLike, partial: bool = False, reparse: bool = False, exactly: bool = False
) -> list[Review]:
    """The reviews of a file. The scores are those that it stores, or with `reparse` those that its texts give.

    Args:
      partial: whether a last line that was cut off is left out.
      exactly: reads texts as the original does, see `parse_scores`.

    Raises:
      UserError: at a line that is no review, at another review of a question (in the same order of the answers), at
        reviews of several judges.
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
