"""Has a text-only language model answer LLaVA-Bench from descriptions of the pictures: the answers that count as 100.

The same command goes on where it was interrupted; no answer is paid twice.
"""

import argparse
import functools
import hashlib
import sys
from typing import Any

from llava_jax.cli import Parser, UserError, say
from llava_jax.evaluate.bench_files import Question, read_questions
from llava_jax.evaluate.judging import ask, prompt_hash, read_prompt
from llava_jax.evaluate.lines import write_lines
from llava_jax.llm_api.asking import CUT, LONGER, Outcome, Task
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.errors import REFUSED
from llava_jax.llm_api.options import add_api_arguments, add_output_arguments

EPILOG = """example:
  python -m llava_jax.evaluate reference llava-bench --questions questions.jsonl --context context.jsonl \\
    --model gpt-4-0314 --output answers_gpt4.jsonl"""
SYSTEM = read_prompt("reference_system.txt")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    questions = read_questions(args.questions, args.context)
    tasks = [
        Task(f"{ident}, reference", functools.partial(messages, question), str.strip)
        for ident, question in questions.items()
    ]
    hash_ = prompt_hash(SYSTEM)
    outcomes = ask(args, args.model, tasks, hash_, "answers of")
    if outcomes is None:
        return
    for ident, outcome in zip(questions, outcomes, strict=True):
        if outcome.value is None:
            raise UserError(f"question {ident}: no answer ({outcome.reason}); {_advice(outcome, args.attempts)}")
    answered = zip(questions.values(), outcomes, strict=True)
    write_lines(args.output, (_answer(question, outcome, args.model, hash_) for question, outcome in answered))
    say(f"{args.output}: {len(outcomes)} answers", file=sys.stderr)


def _advice(outcome: Outcome, attempts: int) -> str:
    if outcome.open or outcome.reason.startswith(REFUSED):
        return "the same command asks again"
    return LONGER if outcome.reason == CUT else f"give more --attempts than {attempts}"


def messages(question: Question) -> list[Message]:
    content = f"{question.context.strip()}\n\nQuestion: {question.text}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def _answer(question: Question, outcome: Outcome, model: str, hash_: str) -> dict[str, Any]:
    ident = hashlib.sha256(f"{model} {question.question_id} {outcome.value}".encode()).hexdigest()[:22]
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": outcome.value,
        "answer_id": ident,
        "model_id": model,
        "metadata": {"prompt_hash": hash_},
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate reference llava-bench", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--questions", required=True, metavar="F", help="JSONL of question_id, image, text, category")
    add("--context", required=True, metavar="F", help="JSONL of what is in each picture")
    add("--model", required=True, metavar="MODEL", help="a language model, which needs no eyes")
    add_output_arguments(parser, "answers")
    add_api_arguments(parser, temperature=0.2, max_tokens=1024)
    return parser.parse_args(argv)
