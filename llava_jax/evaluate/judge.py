"""Asks a language model what a benchmark wants to know of it: to judge answers, or to write reference answers.

Each benchmark says its prompts, how replies are read, and what is written (`model_task.py`).
"""

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.cli import Parser, UserError, say
from llava_jax.evaluate.benchmarks import find, listing
from llava_jax.evaluate.lines import write_lines
from llava_jax.evaluate.model_task import Case, ModelTask
from llava_jax.llm_api.options import add_api_arguments, add_output_arguments, ledger_directory, work

if TYPE_CHECKING:
    from llava_jax.llm_api.asking import Outcome

RESUMES = "The same command resumes where it was interrupted and pays for no reply twice: a ledger keeps all of them."


def main(argv: Sequence[str]) -> None:
    """`judge BENCH`."""
    _run("judge", "Has a language model judge answers.", argv)


def reference(argv: Sequence[str]) -> None:
    """`reference BENCH`."""
    _run("reference", "Has a text-only language model write reference answers from descriptions of images.", argv)


def _run(command: str, what: str, argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        parser = Parser(prog=f"python -m llava_jax.evaluate {command}", description=what,
                        epilog=f"benchmarks ({command} BENCH --help has its options):\n{listing(command)}")  # fmt: skip
        parser.add_argument("benchmark", metavar="BENCH", help="one of those below")
        parser.parse_args(argv)
    task: ModelTask = getattr(find(argv[0], command), command)
    args = _parse(command, argv[0], task, argv[1:])
    files, instructions = task.prompts(args)
    if not any(files):
        raise UserError(f"{args.output}: there is nothing to ask")
    hash_ = hashlib.sha256(json.dumps(instructions, sort_keys=True).encode()).hexdigest()
    for model in args.models:
        outcomes = _ask(args, task, model, [case for cases in files for case in cases], hash_)
        for number, cases in enumerate(files if outcomes else ()):
            some, outcomes = outcomes[: len(cases)], outcomes[len(cases) :]
            _write(args, task, _output(args, model, number), cases, some, {"judge": model, "prompt_hash": hash_})


def _ask(
    args: argparse.Namespace, task: ModelTask, model: str, cases: Sequence[Case], hash_: str
) -> "list[Outcome | None]":
    """The outcome of each case, or None if there is nothing to ask. A dry run prints an estimate and returns []."""
    from llava_jax.llm_api.asking import Task, ask_all, forecast  # openai takes a second to load

    tasks = [
        Task(case.name, case.made, partial(task.read, case.about), not task.cut_counts)
        for case in cases
        if case.messages
    ]
    settings = work(args, model)
    if args.dry_run:
        say(f"{model}: {forecast(settings, tasks)}")
        return []
    directory = ledger_directory(args) / (_slug(model) if task.several else "")
    asked = iter(ask_all(settings, tasks, directory, {"prompt_hash": hash_}, f"asking {model}"))
    return [next(asked) if case.messages else None for case in cases]


def _write(
    args: argparse.Namespace,
    task: ModelTask,
    path: Path,
    cases: Sequence[Case],
    outcomes: "Sequence[Outcome | None]",
    by: dict[str, str],
) -> None:
    from llava_jax.llm_api.asking import told

    asked = [(case, outcome) for case, outcome in zip(cases, outcomes, strict=True) if outcome]
    failed = [(case, outcome) for case, outcome in asked if outcome.value is None]
    if failed and not task.failed:
        case, outcome = failed[0]
        raise UserError(f"question {case.name}: no answer ({outcome.reason}); {_advice(outcome, args.attempts)}")
    write_lines(path, (task.line(case.about, outcome, by) for case, outcome in zip(cases, outcomes, strict=True)))
    told_failed = f", {len(failed)} of them {task.failed}{told([outcome for _, outcome in asked])}"
    say(f"{path}: {len(cases)} {task.writes}{told_failed if task.failed else ''}", file=sys.stderr)


def _advice(outcome: "Outcome", attempts: int) -> str:
    from llava_jax.llm_api.asking import CUT, LONGER
    from llava_jax.llm_api.errors import REFUSED

    if outcome.open or outcome.reason.startswith(REFUSED):
        return "the same command asks again"
    return LONGER if outcome.reason == CUT else f"give more --attempts than {attempts}"


def _output(args: argparse.Namespace, model: str, number: int) -> Path:
    """The file of a model's repeat: the output itself if there is only one."""
    output = Path(args.output)
    parts = [_slug(model)] * (len(args.models) > 1) + [str(number + 1)] * (args.repeats > 1)
    return output.with_name(".".join([output.stem, *parts]) + output.suffix)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)


def _parse(command: str, name: str, task: ModelTask, argv: Sequence[str]) -> argparse.Namespace:
    prog = f"python -m llava_jax.evaluate {command} {name}"
    parser = Parser(prog=prog, description=f"{inspect.getdoc(task)}\n\n{RESUMES}", epilog=task.epilog)
    task.add_arguments(parser)
    add = parser.add_argument
    option, count = "--judge" if command == "judge" else "--model", "+" if task.several else 1
    add(option, required=True, nargs=count, dest="models", metavar="MODEL", help="a language model; it sees no images")
    parser.set_defaults(repeats=1)
    if task.several:
        add("--repeats", type=int, metavar="N", help="of all prompts, with a file for each (default: 1)")
    add_output_arguments(parser, task.writes)
    add_api_arguments(parser, temperature=task.temperature, max_tokens=task.max_tokens)
    args: Any = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats has to be 1 or more")
    if len(set(map(_slug, args.models))) < len(args.models):
        raise UserError(f"{option}: a model is given twice; --repeats N has each of them repeat its work")
    return args
