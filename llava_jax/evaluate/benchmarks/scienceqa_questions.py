"""Converts ScienceQA to LLaVA JSON: training data, and the questions of a split.

A format such as QCM-LEA says what the question and the answer contain: Q question, C context, M choices; L lecture, E
explanation (ScienceQA's `solution`), A answer. LEPA has headings, and `###` before the answer. Format v1.5 is that of
the v1.5 release's file of questions: each option has a line, and the answer is a letter.
"""

import argparse
import json
import re

from etils import epath

from llava_jax.cli import Parser, UserError, say
from llava_jax.evaluate.benchmarks.scienceqa_scores import (
    OPTIONS,
    SCORED,
    Problem,
    add_problems,
    labelled,
    read_problems,
)
from llava_jax.files.writing import atomic_list

EPILOG = """examples (the paper's training data and its questions):
  python -m llava_jax.evaluate questions scienceqa --problems problems.json --splits pid_splits.json \\
    --split train --format QCM-LEPA --output train.json
  python -m llava_jax.evaluate questions scienceqa --problems problems.json --splits pid_splits.json \\
    --split test --format QCM-LEPA --output test.json

Images are named `ID/image.png`, relative to ScienceQA's folder images/SPLIT. The models of the v1.5 release answer
questions in format v1.5, which their file llava_test_CQM-A.json has (format CQM-A is another one)."""
V1_5 = "v1.5"
FIELDS = (*SCORED, "question", "lecture", "solution")
QUESTION = re.compile(r"(QCM|CQM)(LE|EL|L|E)?|QC(LE|EL|L|E)M")  # explanations in the question: upper bounds
ANSWER = re.compile(r"A(LE|EL|L|E)?|(LE|EL|L|E)A|LEPA")
LINES = {"Q": "Question: {question}", "C": "Context: {context}", "M": "Options: {choices}"}


def sample(ident: str, problem: Problem, form: str) -> dict:
    """The sample of a problem, with the same bytes as by the original's converter."""
    question, answer = convert(problem, form)
    images = {"image": f"{ident}/{problem['image']}"} if problem["image"] else {}
    if images:
        question = f"<image>\n{question}" if form == V1_5 else f"{question}\n<image>"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": ident} | images | {"conversations": turns}


def convert(problem: Problem, form: str) -> tuple[str, str]:
    """The question and the answer in a format that `check_format` accepts."""
    if form == V1_5:
        return _plain(problem), OPTIONS[problem["answer"]]
    asked, said = form.split("-")
    return _unlabelled(_question(problem, asked), "Question: "), _unlabelled(_answer(problem, said), "Answer: ")


def _plain(problem: Problem) -> str:
    """The question exactly as in the v1.5 release: the hint, if there is one, the question and lettered options."""
    hint = str(problem["hint"] or "").strip()
    options = [f"{letter}. {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False)]
    return "\n".join([*([f"Context: {hint}"] if hint else []), problem["question"], *options])


def _unlabelled(text: str, label: str) -> str:
    """The text without double spaces and without its label, of which all occurrences go, as in the published data."""
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):  # of nothing
        text = text.replace("BECAUSE:", "").strip()
    return text.replace(label, "") if text.startswith(label) else text


def _question(problem: Problem, form: str) -> str:
    texts = {
        "question": problem["question"],
        "context": str(problem["hint"] or "").strip() or "N/A",
        "choices": " ".join(labelled(problem)),
    }
    lines = []
    for part in re.findall(r"[QCM]|[LE]+", form):
        lines.append(LINES[part].format(**texts) if part in LINES else f"BECAUSE: {_reasons(problem, part)}")
    return "\n".join(lines)


def _answer(problem: Problem, form: str) -> str:
    letter = OPTIONS[problem["answer"]]
    if form == "LEPA":
        headed = {"LECTURE": problem["lecture"], "SOLUTION": problem["solution"]}
        parts = [f"{heading}: {text}\n" for heading, text in headed.items() if text.strip()]
        return "".join([*parts, "###\n", f"ANSWER: {letter}."])
    answer = f"The answer is {letter}."
    if form == "A":
        return f"Answer: {answer}"
    reasons = _reasons(problem, form.strip("A"))
    return f"Answer: {answer} BECAUSE: {reasons}" if form.startswith("A") else f"Answer: {reasons} {answer}"


def _reasons(problem: Problem, letters: str) -> str:
    return " ".join({"L": problem["lecture"], "E": problem["solution"]}[letter] for letter in letters)


def check_format(form: str) -> str:
    """Raises `UserError` for an unknown format."""
    asked, _, said = form.partition("-")
    if form == V1_5:
        return form
    if not QUESTION.fullmatch(asked) or not ANSWER.fullmatch(said):
        raise UserError(f"--format {form}: is not of the kind QCM-LEA, QCM-LEPA, QCM-ALE, CQM-A, QCML-A, nor {V1_5}")
    return form


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    check_format(args.format)
    problems = read_problems(args.problems, args.splits, args.split, FIELDS)
    with atomic_list(epath.Path(args.output), lines=False) as add:
        for ident, problem in problems.items():
            add(json.dumps(sample(ident, problem, args.format)).encode())
    say(f"{len(problems)} samples: {args.output}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate questions scienceqa", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add_problems(parser, required=True, help="train, val, test, minitrain, ...")
    add("--format", default="QCM-LEPA", metavar="Q-A", help=f"QCM-LEPA, the paper's, by default; {V1_5}, the release's")
    add("--output", required=True, metavar="F", help="LLaVA JSON")
    return parser.parse_args(argv)
