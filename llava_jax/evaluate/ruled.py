"""Benchmarks of the tables of 2025 and 2026: a file of questions with images inside, prompts by toolkit, and a rule of
scoring by toolkit. A subclass says how a row becomes an `Item`, and has the two tables."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import Answer, check_asked, question_id
from llava_jax.evaluate.benchmark import (
    LETTER,
    LETTER_CN,
    SHORT,
    Benchmark,
    Group,
    Labels,
    Pairs,
    Scores,
    groups_of,
)
from llava_jax.evaluate.dataset_files import LETTERS, Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL
from llava_jax.evaluate.toolkit_rows import Row, labels_of, target_of

VLMEVAL_API = "vlmevalkit-api"  # its prompt for models behind an API, which is another one than LLaVA's
# Fields with what a judge said of an answer; `content` is last, since lmms-eval's logs have the judge's prompt in it.
REPLIES = ("review", "extraction", "res", "extracted", "gpt4v_output_gpt_check", "content")
DIRECTLY = "Answer the question directly."
Prompt = Callable[[Item], str]


# ----------------------------------------------------------------------------------------------------------- prompts


def lettered(item: Item, form: str = "{}. {}") -> str:
    """The options, one a line, each line after a line break."""
    return "".join("\n" + form.format(*option) for option in zip(LETTERS, item.options, strict=False))


def vlmevalkit_choice(item: Item) -> str:
    """The prompt of VLMEvalKit's LLaVA class for questions with options."""
    hint = f"{item.more['hint']}\n" if item.more.get("hint") else ""
    text = f"{hint}{item.question}{lettered(item)}"
    chinese = any("\u4e00" <= mark <= "\u9fff" for mark in text)
    asks = (LETTER_CN if chinese else LETTER) if item.options else ("请直接回答问题。" if chinese else DIRECTLY)
    return f"{text}\n{asks}"


def vlmevalkit_api_choice(item: Item) -> str:
    hint = f"Hint: {item.more['hint']}\n" if item.more.get("hint") else ""
    asks = (
        f"\nOptions:{lettered(item)}\nPlease select the correct answer from the options above. " if item.options else ""
    )
    return f"{hint}Question: {item.question}{asks}\n"


def bare(item: Item) -> str:
    return item.question


def short_answer(item: Item) -> str:
    return f"{item.question}\n{SHORT}"


CHOICE = {VLMEVAL: vlmevalkit_choice, VLMEVAL_API: vlmevalkit_api_choice}


class RuledBenchmark(Benchmark):
    """A benchmark that is asked and scored as several toolkits do it. A subclass has `item` and the tables.

    Attributes:
      prompts: of each toolkit; the prompt has all text after the question, so there is no suffix.
      shares_images: whether several questions share an image that only its content identifies.
      unscored: kinds of items that are neither asked nor scored, if there are others.
      sets: the kinds of items that have ids of their own, where the `category` of an answer tells its set.
      prediction: the field of a submission that has the answer.
    """

    prompts: Mapping[str, Prompt] = {}
    prompt = LMMS
    default_rule = OFFICIAL
    several_files = True
    shares_images = False
    unscored: Sequence[str] = ()
    sets: Sequence[str] = ()
    prediction = "prediction"

    def __init_subclass__(cls) -> None:
        cls.rule = cls.rules.get(cls.default_rule)

    def item(self, line: Line, number: int) -> Item:
        """The item in a row. Each benchmark has its own."""
        raise NotImplementedError

    def entries(self, path: str) -> list[Item]:
        return [item for item, _ in self.read(path)]

    def read(self, path: str, images: bool = False) -> Iterator[tuple[Item, tuple[files.Image, ...]]]:
        """The items of a file with their images, which are read on demand, or if they tell what is shared."""
        own = images or self.shares_images
        found = files.numbered(path, own)
        by_index: dict[str, str] = {}
        if own and str(path).endswith((".tsv", ".xlsx")):
            found = list(found)
            by_index = {str(line.value.get("index")): str(line.value.get("image")) for _, line in found}
        kept: dict[str, tuple[files.Image, ...]] = {}  # equal images are in memory once
        for number, line in found:
            item, shown = self.item(line, number), files.images(line.value, line.where, by_index) if own else ()
            if shown and (images or not item.cluster):
                name = files.fingerprint(shown)
                shown = kept.setdefault(name, shown) if images else ()
                if self.shares_images and not item.cluster:
                    item = item._replace(cluster=name)
            yield item._replace(cluster=item.cluster or f"{item.kind} {item.id}"), shown

    def _scored(self, items: Sequence[Item]) -> set[str]:
        """The kinds that are asked and scored: all but `unscored`, or these if there are no others."""
        kinds = {item.kind for item in items}
        return kinds.difference(self.unscored) or kinds

    def questions(self, path: str) -> Iterator[Question]:
        found = list(self.read(path, images=True))
        kinds = self._scored([item for item, _ in found])
        for item, images in found:
            if item.kind in kinds:
                if not images and self.shows(item):
                    raise UserError(f"{item.where}: has no image: is it a table of predictions, which lacks them?")
                text = self.prompts[self.prompt](item)
                shown, marked = self.placed(text, images)
                extra = {"category": item.kind} if item.kind else {}
                yield Question(item.id, text, shown, extra, marked)

    def shows(self, item: Item) -> bool:
        """Whether a question is about an image, as all are but some of HallusionBench."""
        return True

    def placed(self, text: str, images: tuple[files.Image, ...]) -> tuple[tuple[files.Image, ...], str]:
        """The images that are shown with a prompt, and the prompt with `<image>`s if these are not at its beginning."""
        return images, ""

    def answer_id(self, line: Line) -> str:
        """The id of the question that a line answers."""
        return question_id(line)

    def labels(self, entries: Sequence[Item], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        kinds = self._scored(entries)
        rows = [Row(item.id, (item._replace(number=0, where=""),), _right(item), item.number, item.kind, item.where)
                for item in entries]  # fmt: skip
        found = labels_of(rows, self.answer_id, self.target, self.sets)
        replies = {found.key(line): str(reply) for line in lines
                   if (reply := files.first(line.value, *REPLIES)) is not None}  # fmt: skip
        scored = {key: item._replace(reply=replies.get(key)) for key, item in found.items() if item.kind in kinds}
        return Labels(scored, found.key, skipped=found.keys() - scored.keys())

    def target(self, line: Line) -> str:
        """The right answer in a line of lmms-eval's log."""
        return target_of(line)

    def score(self, pairs: Pairs) -> Scores:
        return self.rules[self.default_rule].scores(self.default_rule, pairs)

    def groups(self, pairs: Pairs) -> Iterator[Group]:
        return groups_of(self.rules[self.default_rule], pairs)

    def handed_in(self, lines: Sequence[Line], own: str | Sequence[str]) -> dict[str, tuple[Item, Answer]]:
        """The answers by question id, with their items in the benchmark's own files."""
        own = [own] if isinstance(own, str) else own
        found = self.read_labels(own, lines, ())
        answers = found.answers(lines, self.fields)
        check_asked(answers, found, ", ".join(own))
        if len({found[key].id for key in answers}) < len(answers):
            kinds = ", ".join(sorted({found[key].kind for key in answers}))
            raise UserError(f"{', '.join(own)}: have several sets ({kinds}): hand in each by itself")
        return {found[key].id: (found[key], answer) for key, answer in answers.items()}

    def submission(self, lines: Sequence[Line], own: str | Sequence[str] | None) -> bytes:
        """The rows of the benchmark's own file without images, with the answers, as VLMEvalKit reads them."""
        if own is None:
            raise UserError(
                "--labels: the benchmark's own file is needed, since its rows are handed in with the answers"
            )
        rows = [
            {name: value for name, value in item.more.items() if name not in files.IMAGES}
            | {"index": item.more.get("index", ident), self.prediction: answer.text or ""}
            for ident, (item, answer) in self.handed_in(lines, own).items()
        ]
        return json.dumps(rows, ensure_ascii=False, default=str).encode() + b"\n"


def _right(item: Item) -> list[str]:
    """What lmms-eval's logs may have as the right answer."""
    return [*item.answers, str(list(item.answers)), item.right[3:]] if item.answers else []
