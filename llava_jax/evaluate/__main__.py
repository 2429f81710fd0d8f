"""Answers questions about pictures with a model, has answers judged, scores them, and compares runs."""

from llava_jax.cli import dispatch, run

COMMANDS = {  # what is typed: the module whose `main` is called, and what it does
    "predict": ("llava_jax.evaluate.predict", "answers to the questions of any benchmark: `predict BENCH`"),
    "reference llava-bench": ("llava_jax.evaluate.reference", "answers of a text-only model, from descriptions"),
    "judge llava-bench": (
        "llava_jax.evaluate.judge:main",
        "reviews of answers beside the reference's, by a language model",
    ),
    "judge mm-vet": ("llava_jax.evaluate.mm_vet_judge", "grades of open answers"),
    "judge scienceqa": ("llava_jax.evaluate.ensemble_judge", "a third opinion where two models' answers differ"),
    "score llava-bench": ("llava_jax.evaluate.llava_bench", "relative scores of reviews by a judge"),
    "score": ("llava_jax.evaluate.score", "accuracy of answers to VQAv2, POPE, MME, ...: `score BENCH`"),
    "submission": ("llava_jax.evaluate.submission", "answers in the form that a benchmark's server takes"),
    "questions scienceqa": (
        "llava_jax.evaluate.scienceqa_data:main",
        "problems to LLaVA JSON: training data and questions",
    ),
    "score scienceqa": ("llava_jax.evaluate.scienceqa", "accuracy by subject, kind and grade"),
    "score scienceqa-ensemble": (
        "llava_jax.evaluate.ensemble:main",
        "the same of two models together, as in the paper",
    ),
    "report": ("llava_jax.evaluate.report", "runs side by side, with confidence intervals, pictures and answers"),
}


def main(argv: list[str] | None = None) -> int | None:
    return dispatch("python -m llava_jax.evaluate", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    run(main)
