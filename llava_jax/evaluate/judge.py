"""Has a language model compare a model's answers to LLaVA-Bench with the reference's: a review of each question.

The judge sees the picture as words only. What it wrote is kept in a ledger beside the output: the same command goes on
where it was interrupted, and pays for no review twice.
"""

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_jax.cli import Parser, UserError, say
from llava_jax.evaluate.bench_files import Answer, Question, read_answers, read_questions
from llava_jax.evaluate.judging import RULES, SYSTEM, Answered, ask, messages, read_rules, rules_hash
from llava_jax.evaluate.lines import write_lines
from llava_jax.evaluate.reviews import FAILED, parse_scores
from llava_jax.llm_api.asking import Outcome, Task, told
from llava_jax.llm_api.cost import Message
from llava_jax.llm_api.options import add_api_arguments, add_output_arguments

EPILOG = """examples:
  python -m llava_jax.evaluate judge llava-bench --questions questions.jsonl --context context.jsonl \\
    --reference answers_gpt4.jsonl --answers answers.jsonl --judge gpt-4-0314 --output reviews.jsonl
  ... --judge gpt-4-0314 gpt-4o --both-orders --repeats 3 --prices 30 60 --budget 20

Each judge and each repeat writes a file of its own (reviews.gpt-4o.2.jsonl), to be scored together or apart."""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    questions = read_questions(args.questions, args.context)
    reference, model = (read_answers(path, questions) for path in (args.reference, args.answers))
    if absent := [ident for ident, answer in reference.items() if answer.absent]:
        raise UserError(f"{args.reference}: question {absent[0]}: the reference, which counts as 100, has no answer")
    rules = read_rules(args.rule_file) if args.rule_file else RULES
    hash_ = rules_hash(rules, [question.category for question in questions.values()], args.system)
    cases = [(ident, swapped) for ident in questions for swapped in ((False, True) if args.both_orders else (False,))]

    def prompt(ident: str, swapped: bool) -> list[Message]:
        question = questions[ident]
        answer = model[ident].text or ""  # what the judge is shown where there is none; the score of that is the lowest
        item = Answered(question.context, question.text, reference[ident].text, answer)
        return messages(item, rules[question.category], swapped, args.system)

    tasks = [
        Task(f"{ident}, {'swapped' if swapped else 'in order'}, repeat {repeat}",
             functools.partial(prompt, ident, swapped), parse_scores, whole=False)  # the scores come first
        for repeat in range(args.repeats)
        for ident, swapped in cases
    ]  # fmt: skip
    for judge in args.judge:
        outcomes = ask(args, judge, tasks, hash_, "judging by", _slug(judge))
        if outcomes is None:
            continue
        for repeat in range(args.repeats):
            part = outcomes[repeat * len(cases) :][: len(cases)]
            reviews = [
                _review(number, questions[ident], reference[ident], model[ident], swapped, outcome)
                | {"judge": judge, "prompt_hash": hash_}
                for number, ((ident, swapped), outcome) in enumerate(zip(cases, part, strict=True), 1)
            ]
            _write(_output(args, judge, repeat), reviews, told(part))


def _review(
    number: int, question: Question, reference: Answer, model: Answer, swapped: bool, outcome: Outcome
) -> dict[str, Any]:
    """A line of the original's form; the tuple is always of the reference and of the model, whichever came first."""
    first, second = (model, reference) if swapped else (reference, model)
    scores = outcome.value or FAILED
    review = {
        "id": number,
        "question_id": question.question_id,
        "answer1_id": first.answer_id,
        "answer2_id": second.answer_id,
        "category": question.category,
        "content": outcome.shown,
        "tuple": list(scores[::-1] if swapped else scores),
        "answer_model": model.model_id,
        "reference_model": reference.model_id,
    }
    return review | ({"swapped": True} if swapped else {}) | ({"no_answer": model.absent} if model.absent else {})


def _output(args: argparse.Namespace, judge: str, repeat: int) -> Path:
    """The file of a judge's repeat: the output itself where there is but one."""
    output = Path(args.output)
    parts = [_slug(judge)] * (len(args.judge) > 1) + [str(repeat + 1)] * (args.repeats > 1)
    return output.with_name(".".join([output.stem, *parts]) + output.suffix)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def _write(path: Path, reviews: Sequence[dict[str, Any]], more: str) -> None:
    write_lines(path, reviews)
    failed = sum(review["tuple"] == list(FAILED) for review in reviews)
    say(f"{path}: {len(reviews)} reviews, {failed} of them without scores{more}", file=sys.stderr)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate judge llava-bench", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--questions", required=True, metavar="F", help="JSONL of question_id, image, text, category")
    add("--context", required=True, metavar="F", help="JSONL of what is in each picture")
    add("--reference", required=True, metavar="F", help="JSONL of the answers that count as 100")
    add("--answers", required=True, metavar="F", help="JSONL of the answers to judge")
    add("--judge", required=True, nargs="+", metavar="MODEL", help="one or several judges")
    add("--rule-file", metavar="F", help="instructions to the judge, in the original's form (rule.json)")
    add("--system", metavar="TEXT", default=SYSTEM, help="system prompt of the judge")
    add("--both-orders", action="store_true", help="judge each question twice, with either answer first")
    add("--repeats", type=int, default=1, metavar="N", help="of all, each with a file of its own (default: 1)")
    add_output_arguments(parser, "reviews")
    add_api_arguments(parser, temperature=0.2, max_tokens=1024)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats has to be 1 or more")
    if len({_slug(judge) for judge in args.judge}) < len(args.judge):
        raise UserError("--judge: a judge is given twice; --repeats N has each judge repeat its work")
    return args
