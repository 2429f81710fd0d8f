"""Has a language model settle the problems of ScienceQA on which a model and a second one differ.

The same command goes on where it was interrupted; no verdict is paid twice. `score scienceqa-ensemble` takes what is
written.
"""

import argparse
import functools
import sys

from llava_jax.cli import Parser, UserError, say
from llava_jax.evaluate.ensemble import add_arguments, read_pairs
from llava_jax.evaluate.judging import ask, prompt_hash, read_prompt
from llava_jax.evaluate.lines import write_lines
from llava_jax.evaluate.scienceqa import FAILED, OPTIONS, Problem, extract, read_results
from llava_jax.llm_api.asking import Task, told
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.options import add_api_arguments, add_output_arguments

EPILOG = """example:
  python -m llava_jax.evaluate judge scienceqa --ours answers.jsonl --other gpt4.json --problems problems.json \\
    --splits pid_splits.json --judge gpt-4-0314 --output judged.jsonl"""
SYSTEM = "You answer questions of science exams. You reason with care and end with a single option."
PROMPT = read_prompt("scienceqa_judge.txt")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    pairs = {ident: pair for ident, pair in read_pairs(args).items() if pair.differ}
    ours, other = (read_results(path, stored=("outputs",)) for path in (args.ours, args.other))  # the judge sees texts
    if not pairs:
        raise UserError(f"{args.ours}: nothing to judge: both give the same option to every problem")
    tasks = [
        Task(ident, functools.partial(messages, pair.problem, ours[ident].text or "", other[ident].text or ""),
             functools.partial(_option, len(pair.problem["choices"])))
        for ident, pair in pairs.items()
    ]  # fmt: skip
    hash_ = prompt_hash([SYSTEM, PROMPT])
    outcomes = ask(args, args.judge, tasks, hash_, "judging by")
    if outcomes is None:
        return
    verdicts = (
        {"question_id": ident, "text": outcome.shown, "judge": args.judge, "prompt_hash": hash_}
        for ident, outcome in zip(pairs, outcomes, strict=True)
    )
    write_lines(args.output, verdicts)
    failed = sum(outcome.value is None for outcome in outcomes)
    say(f"{args.output}: {len(outcomes)} verdicts, {failed} of them without an option{told(outcomes)}", file=sys.stderr)


def messages(problem: Problem, ours: str, other: str) -> list[Message]:
    """What the judge is sent."""
    options = " ".join(f"({letter}) {text}" for letter, text in zip(OPTIONS, problem["choices"], strict=False))
    question = f"Question: {problem['question']}\nContext: {problem['hint'] or 'none'}\nOptions: {options}\n"
    content = PROMPT.format(question=question, ours=ours, other=other)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _option(choices: int, text: str) -> int | None:
    option = extract(text, choices)
    return None if option == FAILED else option


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate judge scienceqa", description=__doc__, epilog=EPILOG)
    add_arguments(parser)
    add = parser.add_argument
    add("--judge", required=True, metavar="MODEL", help="in the paper the second model itself")
    add_output_arguments(parser, "verdicts")
    add_api_arguments(parser, temperature=0.0, max_tokens=1024)
    return parser.parse_args(argv)
