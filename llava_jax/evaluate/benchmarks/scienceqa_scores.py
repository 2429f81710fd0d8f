"""ScienceQA's problems, the options that answers choose, and accuracy in the nine columns of the paper's table."""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, count_absent, is_lines, join, percent, read_answers, read_json
from llava_jax.evaluate.benchmark import ScoreCommand
from llava_jax.evaluate.label_formats import field
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.evaluate.rule_options import scienceqa_lmms, vlmevalkit
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL
from llava_jax.evaluate.sheets import is_sheet

OPTIONS = "ABCDE"
FAILED = -1
SAYS = re.compile(r"The answer is ([A-Z]).")  # as in the original, any character has to follow the letter

Problem = Mapping[str, Any]
COLUMNS: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda problem: problem["subject"] == "natural science",
    "SOC": lambda problem: problem["subject"] == "social science",
    "LAN": lambda problem: problem["subject"] == "language science",
    "TXT": lambda problem: bool(problem["hint"]),
    "IMG": lambda problem: bool(problem["image"]),
    "NO": lambda problem: not problem["hint"] and not problem["image"],
    "G1-6": lambda problem: problem["grade"] in {f"grade{grade}" for grade in range(1, 7)},
    "G7-12": lambda problem: problem["grade"] in {f"grade{grade}" for grade in range(7, 13)},
    "Avg": lambda problem: True,
}
SCORED = ("choices", "answer", "hint", "image", "grade", "subject")  # fields of a problem
TEXTS = ("question", "lecture", "solution", "grade", "subject")
STORED = ("results", "outputs")  # of a result JSON: indices, and the texts from which they were read


def extract(text: str, choices: int) -> int:
    """The index of the option that a text names; `FAILED` if it names none, several, or one that does not exist."""
    if len(text) == 1 and text in OPTIONS:
        letter = text
    elif len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        letter = text[0]
    else:
        said = SAYS.findall(text)
        letter = said[0] if len(said) == 1 else ""
    index = OPTIONS.find(letter) if letter else FAILED
    return index if index < choices else FAILED


def score(pairs: list[tuple[int, Problem]]) -> dict[str, Any]:
    """The columns in percent, and counts, from chosen options and their problems."""
    right = [(problem, index == problem["answer"]) for index, problem in pairs]
    columns = {}
    for name, belongs in COLUMNS.items():
        outcomes = [outcome for problem, outcome in right if belongs(problem)]
        columns[name] = percent(sum(outcomes), len(outcomes))
    correct = sum(outcome for _, outcome in right)
    return columns | {"correct": correct, "total": len(right), "failed": sum(i == FAILED for i, _ in pairs)}


def outcomes(answers: Mapping[str, Answer], problems: Mapping[str, Problem], rule: str = OFFICIAL) -> Iterator[Outcome]:
    """The outcome of each answered problem, to compare runs."""
    for ident, problem in problems.items():
        if ident not in answers:
            continue
        option, right = choice(answers[ident], problem, rule), problem["answer"]
        yield Outcome(
            ident,
            tuple(name for name, belongs in COLUMNS.items() if name != "Avg" and belongs(problem)),
            score=float(option == right),
            question="\n".join([problem.get("question", ""), *labelled(problem)]),
            image=f"{ident}/{problem['image']}" if problem["image"] else "",
            answer="" if answers[ident].absent else str(answers[ident].value),
            reference=labelled(problem)[right],
        )


def labelled(problem: Problem) -> list[str]:
    """The options with their letters: `(A) ...`."""
    return [f"({letter}) {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False)]


def _toolkit(read: Callable[[str, Mapping[str, str]], tuple[str, str]]) -> Callable[[str, Sequence[str]], int]:
    def index(text: str, choices: Sequence[str]) -> int:
        letter, _ = read(text, dict(zip(OPTIONS, choices, strict=False)))
        found = OPTIONS.find(letter) if letter else FAILED
        return found if found < len(choices) else FAILED

    return index


RULES: dict[str, Callable[[str, Sequence[str]], int]] = {  # (text, options) -> the index of the one it chooses
    OFFICIAL: lambda text, choices: extract(text, len(choices)),
    LMMS: _toolkit(lambda text, options: scienceqa_lmms(text)),
    VLMEVAL: _toolkit(vlmevalkit),
}


def choice(answer: Answer, problem: Problem, rule: str = OFFICIAL) -> int:
    """The option of an answer, which is a text or an index."""
    choices = len(problem["choices"])
    if isinstance(answer.value, bool) or not isinstance(answer.value, int):
        return answer.read(lambda text: RULES[rule](text, problem["choices"]), FAILED)
    return answer.value if 0 <= answer.value < choices else FAILED


def add_problems(parser: argparse.ArgumentParser, **split: Any) -> None:
    """Adds the options of `read_problems`; `split` are further settings of `--split`."""
    parser.add_argument("--problems", required=True, metavar="F", help="ScienceQA's problems.json")
    parser.add_argument("--splits", required=True, metavar="F", help="ScienceQA's pid_splits.json")
    parser.add_argument("--split", metavar="NAME", **split or {"default": "test", "help": "test by default"})


def read_problems(problems: str, splits: str, split: str, fields: Sequence[str] = SCORED) -> dict[str, Problem]:
    """The problems of a split by id, in its order. Raises `UserError` if one lacks a field."""
    ids, known = read_json(splits), read_json(problems)
    if not isinstance(ids, dict) or not isinstance(ids.get(split), list):
        names = ", ".join(ids) if isinstance(ids, dict) else "none"
        raise UserError(f"{splits}: has no split {split} (it has {names})")
    if not isinstance(known, dict):
        raise UserError(f"{problems}: is no object of problems by id")
    chosen = {}
    for ident in map(str, ids[split]):
        if ident not in known:
            raise UserError(f"{problems}: has no problem {ident}, which split {split} of {splits} names")
        if ident in chosen:
            raise UserError(f"{splits}: split {split} names problem {ident} twice")
        chosen[ident] = _checked(known[ident], fields, f"{problems}: problem {ident}")
    return chosen


def _checked(problem: Any, fields: Sequence[str], where: str) -> Problem:
    for name in fields:
        field(problem, name, where, str if name in TEXTS else object)
    answer, choices = problem["answer"], problem["choices"]
    if not isinstance(choices, list) or not 0 < len(choices) <= len(OPTIONS):
        raise UserError(f"{where}: `choices` is no list of 1 to {len(OPTIONS)} options")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(f"{where}: its answer {answer} is none of the {len(choices)} choices")
    return problem


def read_results(path: str, partial: bool = False, stored: Sequence[str] = STORED) -> dict[str, Answer]:
    """The answers of a file; in a result JSON, the first of the fields `stored` that it has."""
    whole = None if is_sheet(path) or is_lines(path) else read_json(path)
    if not isinstance(whole, dict) or not any(isinstance(whole.get(name), dict) for name in STORED):
        return read_answers(path, partial)
    name = next((name for name in stored if isinstance(whole.get(name), dict)), None)
    if name is None:
        raise UserError(f"{path}: stores no texts (`outputs`) that options could be read from")
    answers = {ident: Answer.of(value, f"{path}: question {ident}") for ident, value in whole[name].items()}
    return answers if name == "outputs" else {ident: _index(answer) for ident, answer in answers.items()}


def _index(answer: Answer) -> Answer:
    """A stored index, which may be a text."""
    if answer.absent:
        return answer
    try:
        return answer._replace(value=int(str(answer.value)))
    except ValueError:
        raise UserError(f"{answer.where}: {json.dumps(answer.value)[:40]} is no index of an option") from None


def table(scores: Mapping[str, Any], separator: str = ", ", count: str = "{value} {name}") -> str:
    """The columns, then the other scores in the format `count`."""
    shares = ("    -" if scores[name] is None else f"{scores[name]:5.2f}" for name in COLUMNS)
    counts = (count.format(name=name, value=value) for name, value in scores.items() if name not in COLUMNS)
    return "\n".join(["  ".join(f"{name:>5}" for name in COLUMNS), "  ".join(shares), separator.join(counts)])


class Score(ScoreCommand):
    name, what = "scienceqa", "ScienceQA: accuracy by subject, context and grade"
    epilog = """example:
  python -m llava_jax.evaluate score scienceqa --results answers.jsonl --problems problems.json --splits pid_splits.json

Columns: subjects (natural, social, language science); TXT has a hint, IMG has an image, NO has neither; grades; all.
An answer counts as `failed`, and as wrong, if no option can be read from it or if the question has no such option.
Options are read as in the original: the text is a letter, begins with `X. `, or says `The answer is X.` once.
"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        kinds = "a result JSON of the original ({results, outputs}), answers as JSONL, or one object {id: answer}"
        add("--results", "--answers", required=True, metavar="F", help=kinds)
        add_problems(parser)
        add("--reextract", action="store_true", help="for a result JSON, read the texts again instead of the indices")
        add("--as", dest="rule", choices=tuple(RULES), default=OFFICIAL, help="how a toolkit reads options (default: "
            "%(default)s)")  # fmt: skip
        add("--partial", action="store_true", help="score an incomplete set, and report how much is missing")
        add("--outcomes", metavar="F", help="write the outcome of each problem, for `report`: DIR/NAME.outcomes.jsonl")

    def score(self, args: argparse.Namespace) -> tuple[dict[str, Any], Iterable[Outcome]]:
        problems = read_problems(args.problems, args.splits, args.split)
        answers = read_results(args.results, args.partial, ("outputs",) if args.reextract else STORED)
        joined = join(answers, problems, args.results, args.partial)
        scores = score([(choice(answer, problem, args.rule), problem) for answer, problem in joined.pairs])
        scores |= count_absent(answer for answer, _ in joined.pairs) | joined.incomplete
        return scores, outcomes(answers, problems, args.rule)

    def table(self, scores: Mapping[str, Any]) -> str:
        return table(scores)
