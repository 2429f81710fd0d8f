"""Answers the questions of benchmarks with a model, has answers judged, scores them, and compares runs."""

from llava_jax.cli import dispatch, run
from llava_jax.evaluate.benchmarks import BENCHMARKS

COMMANDS = {  # command: the function that is called with its options (default: `main`), and what it does
    "predict": ("llava_jax.evaluate.predict", "answers to the questions of a benchmark: `predict BENCH`"),
    "score": ("llava_jax.evaluate.score", "scores of answers: `score BENCH`"),
    "explain": ("llava_jax.evaluate.explain", "answers that toolkits score differently: `explain BENCH`"),
    "judge": ("llava_jax.evaluate.judge", "a language model judges answers: `judge BENCH`"),
    "agreement": ("llava_jax.evaluate.agreement", "how far two judges agree about the same answers"),
    "reference": ("llava_jax.evaluate.judge:reference", "a text-only model writes reference answers"),
    "submission": ("llava_jax.evaluate.submission", "answers in the format of a benchmark's server"),
    "suite": ("llava_jax.evaluate.suite", "answers and scores the benchmarks of a table: `suite v1.5`, `suite 2026`"),
    "report": ("llava_jax.evaluate.report", "compares runs: confidence intervals, chart, images and answers"),
}
for benchmark in BENCHMARKS.values():
    COMMANDS |= benchmark.commands


def main(argv: list[str] | None = None) -> int | None:
    return dispatch("python -m llava_jax.evaluate", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    run(main)
