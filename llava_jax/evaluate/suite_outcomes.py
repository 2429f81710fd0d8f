"""What came of each question of a benchmark that is scored by labels, to compare runs."""

from collections.abc import Iterator, Sequence
from typing import Any

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmark import Benchmark
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.evaluate.questions import Question, key_of

OF_ONE = ("accuracy", "single", "score")  # scores that are means over answers, so that one answer has them, too


def outcomes_of(
    benchmark: Benchmark, pairs: Sequence[tuple[Answer, Any]], lines: Sequence[Line], asked: Sequence[Question]
) -> Iterator[Outcome]:
    """Of each answer: the score of it alone. Raises `UserError` for a benchmark that scores only several together."""
    line_at = {line.where: line for line in lines}
    pictures = {question.key: question.pictures for question in asked}
    for answer, label in pairs:
        line, scores = line_at[answer.where].value, benchmark.score([(answer, label)])
        name = next((name for name in OF_ONE if name in scores), None)
        if name is None:
            raise UserError(f"{benchmark.what}: is scored by several answers together, which --outcomes cannot tell")
        known = pictures.get(key_of(line), ()) if "prompt" in line else ()
        yield Outcome(
            _name(line),
            _categories(scores),
            score=(scores[name] or 0.0) / 100,
            of=float(scores[name] is not None),
            question=str(line.get("prompt", "")),
            image=known[0] if known and isinstance(known[0], str) else "",
            answer=str(line.get("text", answer.value)),
            reference=str(getattr(label, "right", "")),
            judgement=str(line.get("content", "")),
            judge=str(line.get("judge", "")),
            prompt_hash=str(line.get("prompt_hash", "")),
        )


def _name(line: dict[str, Any]) -> str:
    """What tells a question from others, where ids repeat in categories or rounds."""
    ident = next(str(line[name]) for name in ("question_id", "questionId", "id", "image") if name in line)
    return " ".join([ident, *(str(line[name]) for name in ("category", "round_id") if name in line)])


def _categories(scores: dict[str, Any]) -> tuple[str, ...]:
    """Those of which a single answer's scores have a number."""
    return tuple(
        category
        for name, parts in scores.items()
        if name.startswith("by_")
        for category, value in parts.items()
        if value is not None
    )
