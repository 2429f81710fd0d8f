"""What came of each question of a benchmark that is scored by labels, to compare runs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.benchmark import Benchmark, Judged
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.evaluate.questions import Question, key_of

OF_ONE = ("accuracy", "score")  # scores that are means over answers, so that one answer has them, too


def outcomes_of(
    benchmark: Benchmark, pairs: Sequence[tuple[Answer, Any]], lines: Sequence[Line], asked: Sequence[Question]
) -> Iterator[Outcome]:
    """Of each answer or, where the benchmark scores several together, of these."""
    line_at = {line.where: line.value for line in lines}
    pictures = {question.key: question.pictures for question in asked}
    every = list(benchmark.judged(pairs) if benchmark.judged else _each(benchmark, pairs, line_at))
    named = Counter(judged.name for judged in every)
    for judged in every:
        own = [line_at[answer.where] for answer, _ in judged.pairs]
        known = next((pictures.get(key_of(line), ()) for line in own if "prompt" in line), ())
        question = _together(line.get("prompt", "") for line in own)
        yield Outcome(
            judged.name if named[judged.name] == 1 else f"{judged.name}: {question}",  # ids may be those of pictures
            judged.categories,
            score=judged.score,
            of=judged.of,
            weight=judged.weight,
            question=question,
            image=known[0] if known and isinstance(known[0], str) else "",
            answer=_together(
                "" if answer.absent else Answer.of(line.get("text", answer.value), "").value
                for line, (answer, _) in zip(own, judged.pairs, strict=True)
            ),
            reference=_together(getattr(label, "right", "") for _, label in judged.pairs),
            judgement=_together(line.get("content", "") for line in own),
            judge=str(own[0].get("judge", "")),
            prompt_hash=str(own[0].get("prompt_hash", "")),
        )


def _each(
    benchmark: Benchmark, pairs: Sequence[tuple[Answer, Any]], line_at: Mapping[str, dict[str, Any]]
) -> Iterator[Judged]:
    """Each answer, with the score of it alone."""
    for answer, label in pairs:
        scores = benchmark.score([(answer, label)])
        value = next(scores[name] for name in OF_ONE if name in scores)
        share, of = (0.0, 0.0) if value is None else (value / 100, 1.0)
        yield Judged(_name(line_at[answer.where]), [(answer, label)], _categories(scores), share, of)


def _together(texts: Iterator[Any]) -> str:
    return "\n\n".join(str(text) for text in texts if text != "")


def _name(line: dict[str, Any]) -> str:
    """What tells a question from others, where ids repeat in categories."""
    ident = next(str(line[name]) for name in ("question_id", "questionId", "id", "image") if name in line)
    return " ".join([ident, *([str(line["category"])] if "category" in line else [])])


def _categories(scores: dict[str, Any]) -> tuple[str, ...]:
    """Those of which a single answer's scores have a number."""
    return tuple(
        category
        for name, parts in scores.items()
        if name.startswith("by_")
        for category, value in parts.items()
        if value is not None
    )
