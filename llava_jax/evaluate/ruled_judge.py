"""A language model reads or grades the answers to a benchmark, where its toolkits have one do so."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, answer_lines, join, refuse_questions
from llava_jax.evaluate.dataset_files import Image, Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.model_task import Case, ModelTask
from llava_jax.evaluate.questions import data_url
from llava_jax.evaluate.rule_options import vlmevalkit

if TYPE_CHECKING:
    from llava_jax.evaluate.ruled import RuledBenchmark
    from llava_jax.llm_api.asking import Outcome


class Asked(NamedTuple):
    answer: Answer
    item: Item
    line: Line


class RuledJudge(ModelTask):
    """Has a language model read or grade answers. `score --answers` takes the lines it writes, under every rule."""

    epilog = """example:
  python -m llava_jax.evaluate judge mathvista --answers answers.jsonl --labels testmini.json --judge gpt-4o \\
    --output judged.jsonl
  python -m llava_jax.evaluate score mathvista --answers judged.jsonl --labels testmini.json --as lmms-eval

Instructions are this package's own, so that scores differ a little from those of the toolkits' judges. An endpoint of a
local model serves as well as any other: python -m llava_jax.serve."""
    writes, failed = "judgements", "failed"
    cut_counts = True

    def __init__(
        self,
        prompt: str,
        question: Callable[[Item], str],
        needs: Callable[[str, Item], Any] = lambda text, item: True,
        images: bool = False,
        seen: Callable[[Item], Item] = lambda item: item,
    ):
        """
        Args:
          prompt: with `{question}`, `{options}`, `{reference}` and `{answer}`.
          needs: (answer, item) -> whether the judge is asked.
          images: whether the judge sees the image.
          seen: the item as the judge sees it, such as with the options that its question ends with.
        """
        self.prompt, self.question, self.needs, self.images, self.seen = prompt, question, needs, images, seen

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner = owner

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--answers", required=True, metavar="F", help="answers to judge")
        parser.add_argument("--labels", required=True, nargs="+", metavar="F", help="the benchmark's own files")

    def prompts(self, args: argparse.Namespace) -> tuple[list[list[Case]], Any]:
        benchmark: RuledBenchmark = self.owner()
        lines = answer_lines(args.answers)
        refuse_questions(lines)
        labels = benchmark.read_labels(args.labels, lines, ())
        joined = join(labels.answers(lines), labels, args.answers)
        line_at = {line.where: line for line in lines}
        shown = dict(self._shown(benchmark, args.labels)) if self.images else {}
        cases = []
        for answer, item in joined.pairs:
            asked = answer.text is not None and item.reply is None
            messages = None
            if asked and self.needs(answer.text, seen := self.seen(item)):
                messages = partial(self._messages, answer.text, seen, shown.get(item.id, ()))
            name = f"{item.kind} {item.id}".strip()  # sets may have the same ids
            cases.append(Case(name, messages, Asked(answer, item, line_at[answer.where])))
        return [cases], self.prompt

    def _shown(self, benchmark: "RuledBenchmark", labels: Sequence[str]) -> Iterator[tuple[str, Sequence[Image]]]:
        """The images of each question. Raises `UserError` for one that is not in the file."""
        for path in labels:
            for item, images in benchmark.read(path, images=True):
                if not images or isinstance(images[0], str):
                    raise UserError(f"{item.where}: has no image inside, which the judge has to see")
                yield item.id, images

    def _messages(self, answer: str, item: Item, images: Sequence[Image]) -> list[dict[str, Any]]:
        options = "\n".join(f"{letter}. {text}" for letter, text in item.by_letter.items())
        text = self.prompt.format(
            question=self.question(item), options=options, answer=answer,
            reference=item.more.get("gt_answer_details") or item.right,
        )  # fmt: skip
        if not images:
            return [{"role": "user", "content": text}]
        parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    def line(self, about: Asked, outcome: "Outcome | None", by: Mapping[str, str]) -> dict[str, Any]:
        """The answer's line with the judge's reply in `content`, if the judge was asked."""
        replied = {"content": outcome.shown} | by if outcome and outcome.value is not None else {}
        return {"question_id": about.item.id} | about.line.value | replied


CHOOSES = (
    "A model answered a question that has options. Write only the letter of the option that its answer means, or Z if "
    "it means none of them.\n\nQuestion: {question}\nOptions:\n{options}\nAnswer: {answer}\nLetter:"
)


def matcher(seen: Callable[[Item], Item] = lambda item: item) -> RuledJudge:
    """A judge of the option that an answer chooses, where VLMEvalKit's matcher finds none among those of `seen`."""

    def needs(text: str, item: Item) -> bool:
        return bool(item.options) and not vlmevalkit(text, item.by_letter)[0]

    return RuledJudge(CHOOSES, lambda item: item.question, needs, seen=seen)
