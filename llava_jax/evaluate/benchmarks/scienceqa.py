"""ScienceQA: accuracy, the conversion of its problems, and a second model with or without a judge."""

from llava_jax.evaluate.benchmark import LETTER, Benchmark, register
from llava_jax.evaluate.benchmarks.scienceqa_ensemble import Judge, ScoreEnsemble
from llava_jax.evaluate.benchmarks.scienceqa_scores import Score


@register
class ScienceQa(Benchmark):
    name, what = "scienceqa", "ScienceQA: accuracy in the nine columns of the paper"
    label_files = "`problems.json`, `pid_splits.json`"
    suffix = LETTER
    max_new_tokens = 1024
    judge = Judge()
    score_commands = (Score(), ScoreEnsemble())
    commands = {
        "questions scienceqa": (
            "llava_jax.evaluate.benchmarks.scienceqa_questions",
            "problems to LLaVA JSON: training data and questions",
        )
    }
