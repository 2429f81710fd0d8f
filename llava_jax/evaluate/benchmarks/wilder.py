"""LLaVA-Bench-Wilder: a judge's scores of answers, in percent of the reference's, which counts as 10."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.benchmark import register
from llava_jax.evaluate.benchmarks.llava_bench_reviews import parse_scores
from llava_jax.evaluate.dataset_files import Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.ruled import RuledBenchmark, bare
from llava_jax.evaluate.ruled_judge import RuledJudge
from llava_jax.evaluate.rules import LMMS, OFFICIAL, Case, Reading, Rule, Term

PROMPT = (
    "Two assistants answered a question about the image. Rate how helpful, relevant, accurate and detailed each answer "
    "is, from 1 to 10. Assistant 1 is right and has 10. Write a first line with the two scores only, separated by a "
    "space, that of Assistant 1 first. Then explain them.\n\n[Question]\n{question}\n\n[Assistant 1]\n{reference}\n\n"
    "[Assistant 2]\n{answer}"
)


def lmms_scores(reply: str) -> tuple[float, float] | None:
    """As lmms-eval reads them, for which two separators in a row are an error."""
    return parse_scores(reply.partition("\n")[0].strip(), exactly=True)


def review(text: str, item: Item, read: Callable = parse_scores) -> Reading:
    scores = read(item.reply) if item.reply is not None else None
    return Reading(0.0, None if scores is None else f"{scores[0]:g} {scores[1]:g}", "judge")


def terms(
    cases: Sequence[Case], read: Callable = parse_scores, failed: tuple[float, float] = (0.0, 0.0)
) -> Iterable[Term]:
    """The scores of both, as a share. `failed` are those without a review; an absent answer has 1 of 10. Raises
    `UserError` if no answer has a review."""
    if cases and all(case.label.reply is None for case in cases):
        raise UserError(f"{cases[0].answer.where}: has no review, nor has any other answer: `judge wilder` writes them")
    for case in cases:
        scores = read(case.label.reply) if case.label.reply is not None else None
        if case.answer.absent:
            scores = (10.0, 1.0)
        reference, model = scores or failed
        yield Term(case.label.id, (case,), model, reference, "", case.label.categories, case.label.cluster)


@register
class Wilder(RuledBenchmark):
    name, what = "wilder", "LLaVA-Bench-Wilder: scores by a judge, relative to the reference"
    label_files = "the Hub's Parquet"
    max_new_tokens = 4096
    prompts = {LMMS: bare, OFFICIAL: bare}
    judge = RuledJudge(PROMPT, bare, images=True)
    rules = {
        OFFICIAL: Rule("a judge's scores in percent of the reference's; reviews without scores are left out", review,
                       terms),
        LMMS: Rule("as official, and reviews without scores count as -1 for both",
                   partial(review, read=lmms_scores), partial(terms, read=lmms_scores, failed=(-1.0, -1.0)),
                   rounds=True),
    }  # fmt: skip

    def target(self, line: Line) -> str:
        return str(line.value.get("ans1", ""))

    def item(self, line: Line, number: int) -> Item:
        category = str(files.first(line.value, "Category", "category") or "")
        return files.item(line, number, options=(), answers=(files.text(line, "Answer", "answer"),),
                          categories=(category,) if category else ())  # fmt: skip
