"""Answers questions about pictures with a model, has answers judged, scores them, and compares runs."""

import importlib
import sys

from llava_jax.cli import UserError, run

COMMANDS = {  # what is typed: module with `main(argv)`, which is imported when it's called, and what it does
    "predict": ("llava_jax.evaluate.predict", "answers to the questions of any benchmark: `predict BENCH`"),
    "reference llava-bench": ("llava_jax.evaluate.reference", "answers of a text-only model, from descriptions"),
    "judge llava-bench": ("llava_jax.evaluate.judge", "reviews of answers beside the reference's, by a language model"),
    "judge mm-vet": ("llava_jax.evaluate.mm_vet_judge", "grades of open answers"),
    "judge scienceqa": ("llava_jax.evaluate.ensemble_judge", "a third opinion where two models' answers differ"),
    "score llava-bench": ("llava_jax.evaluate.llava_bench", "relative scores of reviews by a judge"),
    "score": ("llava_jax.evaluate.score", "accuracy of answers to VQAv2, POPE, MME, ...: `score BENCH`"),
    "submission": ("llava_jax.evaluate.submission", "answers in the form that a benchmark's server takes"),
    "questions scienceqa": ("llava_jax.evaluate.scienceqa_data", "problems to LLaVA JSON: training data and questions"),
    "score scienceqa": ("llava_jax.evaluate.scienceqa", "accuracy by subject, kind and grade"),
    "score scienceqa-ensemble": ("llava_jax.evaluate.ensemble", "the same of two models together, as in the paper"),
    "report": ("llava_jax.evaluate.report", "runs side by side, with confidence intervals, pictures and answers"),
}


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    for words in (2, 1):
        if (command := " ".join(argv[:words])) in COMMANDS:
            return importlib.import_module(COMMANDS[command][0]).main(argv[words:])
    if {"-h", "--help"}.intersection(argv):  # of `judge`, too, which takes the name of a benchmark
        print(_help())
        return 0
    print(_help(), file=sys.stderr)
    if argv:
        raise UserError(f"{' '.join(argv[:2])!r} is no command: see those above")
    return 2


def _help() -> str:
    lines = [f"  {command:<26}{what}" for command, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m llava_jax.evaluate COMMAND ... (COMMAND --help has its options)", "", __doc__, "", *lines]
    )


if __name__ == "__main__":
    run(main)
