"""Answers the questions of benchmarks with a model, has answers judged, scores them, and compares runs."""

import importlib
import sys

from llava_jax.cli import UserError, run
from llava_jax.evaluate.benchmarks import BENCHMARKS

COMMANDS = {  # command: module and function (default: main), called with the options that follow; what it does
    "predict": ("llava_jax.evaluate.predict", "answers to the questions of a benchmark: `predict BENCH`"),
    "score": ("llava_jax.evaluate.score", "scores of answers: `score BENCH`"),
    "judge": ("llava_jax.evaluate.judge", "a language model judges answers: `judge BENCH`"),
    "reference": ("llava_jax.evaluate.judge:reference", "a text-only model writes reference answers"),
    "submission": ("llava_jax.evaluate.submission", "answers in the format of a benchmark's server"),
    "report": ("llava_jax.evaluate.report", "compares runs: confidence intervals, chart, images and answers"),
} | {
    command: target
    for benchmark in BENCHMARKS.values()
    for command, target in (benchmark.commands or {}).items()
}  # fmt: skip


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    for words in (2, 1):
        if (command := " ".join(argv[:words])) in COMMANDS:
            module, _, function = COMMANDS[command][0].partition(":")
            return getattr(importlib.import_module(module), function or "main")(argv[words:])
    if {"-h", "--help"}.intersection(argv):  # also of `questions`, which needs the name of a benchmark
        print(_help())
        return 0
    print(_help(), file=sys.stderr)
    if argv:
        raise UserError(f"{' '.join(argv[:2])!r} is no command: see the list above")
    return 2


def _help() -> str:
    lines = [f"  {command:<26}{what}" for command, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m llava_jax.evaluate COMMAND ... (COMMAND --help has its options)", "", __doc__, "", *lines]
    )


if __name__ == "__main__":
    run(main)
