"""ScienceQA with a model and a second one, such as GPT-4, together, as in the paper: scores and a judge."""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import join
from llava_jax.evaluate.benchmark import ScoreCommand
from llava_jax.evaluate.benchmarks.scienceqa_scores import (
    FAILED,
    STORED,
    Problem,
    add_problems,
    choice,
    extract,
    labelled,
    read_problems,
    read_results,
    score,
    table,
)
from llava_jax.evaluate.lines import read_lines
from llava_jax.evaluate.model_task import Case, ModelTask, chat, read_prompt
from llava_jax.evaluate.outcomes import Outcome as Scored
from llava_jax.llm_api.cost import Message

if TYPE_CHECKING:
    from llava_jax.llm_api.asking import Outcome


class Pair(NamedTuple):
    """The options that the two models chose for a problem."""

    problem: Problem
    ours: int
    other: int
    absent: tuple[str, str] = ("", "")  # the reasons why there is no answer of ours, and of the other

    @property
    def differ(self) -> bool:
        return self.ours != self.other


def read_pairs(args: argparse.Namespace) -> dict[str, Pair]:
    """The options of both models by problem. They are read from texts if there are any, since older result JSONs store
    a guess as the index of a text without an option. Raises `UserError` if either model lacks an answer."""
    problems = read_problems(args.problems, args.splits, args.split)
    joined = [join(read_results(path, stored=STORED[::-1]), problems, path).pairs for path in (args.ours, args.other)]
    return {
        ident: Pair(problem, choice(ours, problem), choice(other, problem), (ours.absent, other.absent))
        for (ident, problem), (ours, _), (other, _) in zip(problems.items(), *joined, strict=True)
    }


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ours", required=True, metavar="F", help="the model's answers, in a form that `score scienceqa` takes")
    add("--other", required=True, metavar="F", help="those of the second model, such as GPT-4")
    add_problems(parser)


# ------------------------------------------------------------------------------------------------------------ scoring


def complement(pair: Pair) -> int:
    return pair.ours if pair.other == FAILED else pair.other


def decide(pair: Pair, verdict: int) -> int:
    """The option of both; if they differ the judge's, or ours if the judge has none."""
    if not pair.differ:
        return pair.ours
    return pair.ours if verdict == FAILED else verdict


def _absent(pairs: Iterable[Pair]) -> dict[str, int]:
    """The number of absent answers of each model by reason: `ours_empty`, `other_cut_off`."""
    whose = zip(("ours", "other"), zip(*(pair.absent for pair in pairs), strict=True), strict=True)
    return dict(Counter(f"{name}_{why}" for name, reasons in whose for why in reasons if why))


def _verdicts(path: str, differing: Mapping[str, Problem]) -> dict[str, int]:
    """The judge's options. Raises `UserError` unless it judged exactly the problems on which the two models differ."""
    answers = read_results(path)
    for ident, answer in answers.items():
        if ident not in differing:
            raise UserError(
                f"{answer.where}: judges problem {ident}, on which the two do not differ: made of other files?"
            )
    if not differing:
        return {}
    joined = join(answers, differing, path)
    return {ident: choice(answer, problem) for ident, (answer, problem) in zip(differing, joined.pairs, strict=True)}


def _judge(path: str) -> dict[str, str]:
    """The judge's model and the hash of its instructions. Raises `UserError` for lines by several judges."""
    known: dict[str, Any] = {}
    for line in read_lines(path):
        judge = {name: line.value[name] for name in ("judge", "prompt_hash") if name in line.value}
        if known and judge != known:
            raise UserError(f"{line.where}: is by another judge than the lines before")
        known = judge
    return known


class ScoreEnsemble(ScoreCommand):
    name, what = "scienceqa-ensemble", "ScienceQA: accuracy of two models together, as in the paper"
    epilog = """examples:
  python -m llava_jax.evaluate score scienceqa-ensemble --ours answers.jsonl --other gpt4.json \\
    --problems problems.json --splits pid_splits.json
  ... --judged judged.jsonl --json

As complement, the second model answers, and the first one only if the second gives no option. With a judge, the option
of both stands. If they differ, it is the judge's, or the first model's if the judge gives none. `upper` is the share of
problems for which at least one of the two models is right."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_files(parser)
        help_ = "the verdicts of `judge scienceqa`; without them the complement is scored"
        parser.add_argument("--judged", metavar="F", help=help_)

    def score(self, args: argparse.Namespace) -> tuple[dict[str, Any], Iterable[Scored]]:
        pairs = read_pairs(args)
        differing = {ident: pair.problem for ident, pair in pairs.items() if pair.differ}
        if args.judged:
            verdicts = _verdicts(args.judged, differing)
            chosen = [decide(pair, verdicts.get(ident, FAILED)) for ident, pair in pairs.items()]
            known = {"judge_failed": sum(verdict == FAILED for verdict in verdicts.values()), **_judge(args.judged)}
        else:
            chosen, known = [complement(pair) for pair in pairs.values()], {}
        scores = score([(option, pair.problem) for option, pair in zip(chosen, pairs.values(), strict=True)])
        right = sum(pair.problem["answer"] in (pair.ours, pair.other) for pair in pairs.values())
        scores |= {
            "scheme": "judge" if args.judged else "complement",
            "differ": len(differing),
            "other_failed": sum(pair.other == FAILED for pair in pairs.values()),
            "upper": round(100 * right / len(pairs), 2),
            **_absent(pairs.values()),
            **known,
        }
        return scores, ()

    def table(self, scores: Mapping[str, Any]) -> str:
        return table(scores, separator="\n", count="{name}: {value}")


# ------------------------------------------------------------------------------------------------------------ judging

SYSTEM = "You answer questions of science exams. You reason with care and end with a single option."
PROMPT = read_prompt("scienceqa_judge.txt")


class Judge(ModelTask):
    """Has a language model decide the problems of ScienceQA on which a model and a second one differ. `score
    scienceqa-ensemble` takes the verdicts. In the paper the judge is the second model itself."""

    epilog = """example:
  python -m llava_jax.evaluate judge scienceqa --ours answers.jsonl --other gpt4.json --problems problems.json \\
    --splits pid_splits.json --judge gpt-4-0314 --output judged.jsonl"""
    writes, failed = "verdicts", "without an option"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_files(parser)

    def prompts(self, args: argparse.Namespace) -> tuple[list[list[Case]], Any]:
        """A prompt for each problem on which the two models differ. It shows texts, not options."""
        pairs = {ident: pair for ident, pair in read_pairs(args).items() if pair.differ}
        ours, other = (read_results(path, stored=("outputs",)) for path in (args.ours, args.other))
        if not pairs:
            raise UserError(f"{args.ours}: nothing to judge: both give the same option to every problem")
        cases = [
            Case(ident, messages(pair.problem, ours[ident].text or "", other[ident].text or ""), (ident, pair.problem))
            for ident, pair in pairs.items()
        ]
        return [cases], [SYSTEM, PROMPT]

    def read(self, about: tuple[str, Problem], text: str) -> int | None:
        option = extract(text, len(about[1]["choices"]))
        return None if option == FAILED else option

    def line(self, about: tuple[str, Problem], outcome: "Outcome", by: Mapping[str, str]) -> dict[str, Any]:
        return {"question_id": about[0], "text": outcome.shown, **by}


def messages(problem: Problem, ours: str, other: str) -> list[Message]:
    options, context = " ".join(labelled(problem)), problem["hint"] or "none"
    question = f"Question: {problem['question']}\nContext: {context}\nOptions: {options}\n"
    return chat(SYSTEM, PROMPT.format(question=question, ours=ours, other=other))
