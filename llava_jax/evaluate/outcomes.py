"""What came of each question: the form in which all benchmarks' scores are compared, one file a benchmark and run.

The score of any set of questions is the sum of `score` in percent of the sum of `of`, each times its `weight`. Where
answers are right or wrong `of` is 1; where a judge compares them with a reference it is what that got. What could not
be judged has 0 of 0.
"""

from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.lines import Line, read_lines, write_lines

SUFFIX = ".outcomes.jsonl"


class Outcome(NamedTuple):
    """What a run made of a question. Texts are for people, and may be empty."""

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

    @property
    def percent(self) -> float | None:
        return 100 * self.score / self.of if self.of else None


TEXTS = ("question_id", "question", "image", "answer", "reference", "judgement", "judge", "prompt_hash")


def write_outcomes(path: epath.PathLike, outcomes: Iterable[Outcome]) -> None:
    """Writes a file, in a folder that it makes. Its name has to end as `read_run` expects."""
    if not str(path).endswith(SUFFIX):
        raise UserError(f"{path}: has to be called BENCHMARK{SUFFIX}, by which `report` finds it")
    try:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    write_lines(path, (outcome._asdict() for outcome in outcomes))


def read_run(directory: str) -> dict[str, dict[str, Outcome]]:
    """The outcomes in a directory, by benchmark and question. Raises `UserError` where there are none."""
    files = sorted(file for file in epath.Path(directory).iterdir() if file.name.endswith(SUFFIX))
    if not files:
        raise UserError(f"{directory}: has no *{SUFFIX}: `score` writes them with --outcomes")
    return {file.name.removesuffix(SUFFIX): _read(file) for file in files}


def _read(file: epath.Path) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for line in read_lines(file):
        outcome = _outcome(line)
        if outcome.question_id in outcomes:
            raise UserError(f"{line.where}: question {outcome.question_id} stands there for the second time")
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
