"""Outcomes: the score of each question, with its texts, in one file for each benchmark and run. `report` compares them.

The score of a set of questions is the sum of `score` in percent of the sum of `of`, both times `weight`. If answers are
right or wrong, `of` is 1; if a judge compares them with a reference, `of` is the reference's score. Answers that could
not be judged have 0 of 0.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import IDS, Answer
from llava_jax.evaluate.benchmark import Benchmark, Group
from llava_jax.evaluate.lines import Line, read_lines, write_lines
from llava_jax.evaluate.questions import Question, key_of

SUFFIX = ".outcomes.jsonl"


class Outcome(NamedTuple):
    """The score of a question in a run. Texts are for people, and may be empty."""

    question_id: str
    categories: tuple[str, ...]
    score: float
    of: float = 1.0
    weight: float = 1.0
    question: str = ""
    image: str = ""
    answer: str = ""
    reference: str = ""
    judgement: str = ""
    judge: str = ""
    prompt_hash: str = ""
    cluster: str = ""  # what questions about the same image share; outcomes without it are independent

    @property
    def percent(self) -> float | None:
        return 100 * self.score / self.of if self.of else None


TEXTS = ("question_id", "question", "image", "answer", "reference", "judgement", "judge", "prompt_hash", "cluster")


def write_outcomes(path: epath.PathLike, outcomes: Iterable[Outcome]) -> None:
    """Writes a file and makes its folder. Raises `UserError` unless the name ends with `SUFFIX`."""
    if not str(path).endswith(SUFFIX):
        raise UserError(f"{path}: has to be called BENCHMARK{SUFFIX}, by which `report` finds it")
    try:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    write_lines(path, (outcome._asdict() for outcome in outcomes))


def read_run(directory: str) -> dict[str, dict[str, Outcome]]:
    """The outcomes in a directory, by benchmark and question. Raises `UserError` if there are none."""
    files = sorted(file for file in epath.Path(directory).iterdir() if file.name.endswith(SUFFIX))
    if not files:
        raise UserError(f"{directory}: has no *{SUFFIX}: `score` writes them with --outcomes")
    return {file.name.removesuffix(SUFFIX): _read(file) for file in files}


def _read(file: epath.Path) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for line in read_lines(file):
        outcome = _outcome(line)
        if outcome.question_id in outcomes:
            raise UserError(f"{line.where}: question {outcome.question_id} is there a second time")
        outcomes[outcome.question_id] = outcome
    if not outcomes:
        raise UserError(f"{file}: holds no outcomes")
    return outcomes


def _outcome(line: Line) -> Outcome:
    try:
        outcome = Outcome(**line.value)
        numbers = {name: float(getattr(outcome, name)) for name in ("score", "of", "weight")}
        texts = {name: str(getattr(outcome, name)) for name in TEXTS}
        return outcome._replace(categories=tuple(map(str, outcome.categories)), **numbers, **texts)
    except (TypeError, ValueError) as error:
        raise UserError(f"{line.where}: is no outcome: {error}") from error


# ------------------------------------------------------------------------------------- of answers with their labels

MEANS = ("accuracy", "score")  # scores that are means over answers, so that a single answer has them, too


def outcomes_of(
    benchmark: Benchmark, pairs: Sequence[tuple[Answer, Any]], lines: Sequence[Line], asked: Sequence[Question]
) -> Iterator[Outcome]:
    """The outcome of each answer, or of each group of answers that the benchmark scores together."""
    line_at = {line.where: line.value for line in lines}
    images = {question.key: question.images for question in asked}
    groups = list(benchmark.groups(pairs) if benchmark.groups else _each(benchmark, pairs, line_at))
    named = Counter(group.name for group in groups)
    seen: Counter[str] = Counter()
    for group in groups:
        own = [line_at[answer.where] for answer, _ in group.pairs]
        known = next((images.get(key_of(line), ()) for line in own if {"prompt", "question_id"} <= line.keys()), ())
        question = _together(line.get("prompt", "") for line in own)
        name = group.name if named[group.name] == 1 else f"{group.name}: {question}"  # ids may be those of images
        seen[name] += 1
        yield Outcome(
            name if seen[name] == 1 else f"{name} ({seen[name]})",  # a question may be repeated
            group.categories,
            score=group.score,
            of=group.of,
            weight=group.weight,
            question=question,
            image=known[0] if known and isinstance(known[0], str) else "",
            answer=_together(
                "" if answer.absent else Answer.of(line.get("text", answer.value), "").value
                for line, (answer, _) in zip(own, group.pairs, strict=True)
            ),
            reference=_together(getattr(label, "right", "") for _, label in group.pairs),
            judgement=_together(line.get("content", "") for line in own),
            judge=str(own[0].get("judge", "")),
            prompt_hash=str(own[0].get("prompt_hash", "")),
            cluster=group.cluster,
        )


def _each(
    benchmark: Benchmark, pairs: Sequence[tuple[Answer, Any]], line_at: Mapping[str, dict[str, Any]]
) -> Iterator[Group]:
    """A group of each single answer."""
    for answer, label in pairs:
        scores = benchmark.score([(answer, label)])
        value = next(scores[name] for name in MEANS if name in scores)
        share, of = (0.0, 0.0) if value is None else (value / 100, 1.0)
        cluster = getattr(label, "image", "")
        name = _name(line_at[answer.where])
        yield Group(name, [(answer, label)], _categories(scores), share, of, cluster=cluster)


def _together(texts: Iterator[Any]) -> str:
    return "\n\n".join(str(text) for text in texts if text != "")


def _name(line: dict[str, Any]) -> str:
    """The id of a question, with its category since ids may repeat in other categories."""
    ident = next(str(line[name]) for name in (*IDS, "doc_id") if name in line)
    return " ".join([ident, *([str(line["category"])] if "category" in line else [])])


def _categories(scores: dict[str, Any]) -> tuple[str, ...]:
    """The categories of a single answer: those that have a number in its scores."""
    return tuple(
        category
        for name, parts in scores.items()
        if name.startswith("by_") or name == "by"
        for category, value in parts.items()
        if value is not None
    )
