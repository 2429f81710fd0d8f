"""Has a language model grade answers to MM-Vet from 0 to 1, beside what is right; `score mm-vet` takes the grades.

The same command goes on where it was interrupted; no grade is paid twice. Grades by another judge or by other
instructions than the benchmark's own are not comparable with published ones.
"""

import argparse
import functools
import sys
from typing import Any

from llava_jax.cli import Parser, say
from llava_jax.evaluate.answers import WHOLE, answer_lines, by_key, join, refuse_questions
from llava_jax.evaluate.benchmark import field
from llava_jax.evaluate.judging import ask, prompt_hash, read_prompt
from llava_jax.evaluate.lines import Line, write_lines
from llava_jax.evaluate.mm_vet import PREFIX, key, parse_grade, read_own
from llava_jax.llm_api.asking import Outcome, Task, told
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.options import add_api_arguments, add_output_arguments

EPILOG = """example:
  python -m llava_jax.evaluate judge mm-vet --answers answers.jsonl --labels mm-vet.json --judge gpt-4-0613 \\
    --output grades.jsonl
  python -m llava_jax.evaluate score mm-vet --answers grades.jsonl --labels mm-vet.json"""
SYSTEM = "You grade answers to questions about pictures by comparing them with what is right."
PROMPT = read_prompt("mm_vet_judge.txt")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    labels = _labels(args.labels)
    lines = answer_lines(args.answers)
    refuse_questions(lines)
    answers = by_key(lines, key)
    joined = join(answers, labels, args.answers, partial=False, advice=WHOLE)
    graded = {ident: pair for ident, pair in zip(labels, joined.pairs, strict=True) if not pair[0].absent}
    tasks = [
        Task(ident, functools.partial(messages, label, answer.text), parse_grade, whole=False)  # the grade comes first
        for ident, (answer, label) in graded.items()
    ]
    hash_ = prompt_hash([SYSTEM, PROMPT])
    outcomes = ask(args, args.judge, tasks, hash_, "grading by")
    if outcomes is None:
        return
    found = dict(zip(graded, outcomes, strict=True))

    def grade(ident: str) -> dict[str, Any]:
        answer = answers[ident]
        outcome = found.get(ident, Outcome(None, 0.0, answer.absent))  # no answer is a wrong one
        line = {
            "question_id": f"{PREFIX}{ident}",
            "prompt": labels[ident].get("question"),
            "text": answer.text,
            "content": outcome.shown,
            "grade": outcome.value if outcome.value is not None else -1,
            "judge": args.judge,
            "prompt_hash": hash_,
        }
        return line | ({"metadata": {"no_answer": answer.absent}} if answer.absent else {})

    write_lines(args.output, map(grade, labels))
    failed = sum(outcome.value is None for outcome in outcomes)
    say(f"{args.output}: {len(labels)} grades, {failed} of them failed{told(outcomes)}", file=sys.stderr)


def messages(label: Line, answer: str) -> list[Message]:
    """What the judge is sent."""
    content = PROMPT.format(question=label.get("question"), right=label.get("answer"), answer=answer)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _labels(path: str) -> dict[str, Line]:
    """The entries of mm-vet.json by id, without its prefix."""
    found = {}
    for where, ident, entry in read_own(path):
        for name in ("question", "answer"):
            field(entry, name, where)
        found[ident.removeprefix(PREFIX)] = Line(where, entry)
    return found


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate judge mm-vet", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--answers", required=True, metavar="F", help="JSONL of question_id, text")
    add("--labels", required=True, metavar="F", help="MM-Vet's mm-vet.json")
    add("--judge", required=True, metavar="MODEL", help="a language model, which needs no eyes")
    add_output_arguments(parser, "grades")
    add_api_arguments(parser, temperature=0.0, max_tokens=16)
    return parser.parse_args(argv)
