"""What language models do for LLaVA-Bench: `judge` scores two answers to each question, `reference` writes one of them.

Neither sees the images: both get a description of each.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import read_json
from llava_jax.evaluate.benchmarks.llava_bench_files import Answer, Question, read_answers, read_questions
from llava_jax.evaluate.benchmarks.llava_bench_reviews import FAILED, parse_scores
from llava_jax.evaluate.model_task import Case, ModelTask, chat, read_prompt
from llava_jax.llm_api.cost import Message

if TYPE_CHECKING:
    from llava_jax.llm_api.asking import Outcome

SYSTEM = "You compare answers to questions about pictures: carefully, exactly and without favour."
BOXES = (
    " and gives the place of each object as [x1, y1, x2, y2], the left, upper, right and lower edge as fractions of "
    "the width and height of the picture"
)
PROMPT = read_prompt("llava_bench_judge.txt")
COCO, WILD = ("conv", "detail", "complex"), ("llava_bench_conv", "llava_bench_detail", "llava_bench_complex")
REFERENCE_SYSTEM = read_prompt("reference_system.txt")


class Rule(NamedTuple):
    """The instructions for a category, and the role that they give to both assistants."""

    role: str
    prompt: str


RULES = {name: Rule("Assistant", PROMPT.format(boxes=BOXES, role="Assistant")) for name in COCO} | {
    name: Rule("Assistant", PROMPT.format(boxes="", role="Assistant")) for name in WILD
}


# -------------------------------------------------------------------------------------------------------------- judge


def messages(rule: Rule, system: str, question: Question, first: str, second: str) -> list[Message]:
    """The prompt in the original's layout, with the two answers in this order."""
    content = (
        f"[Context]\n{question.context}\n\n[Question]\n{question.text}\n\n"
        f"[{rule.role} 1]\n{first}\n\n[End of {rule.role} 1]\n\n"
        f"[{rule.role} 2]\n{second}\n\n[End of {rule.role} 2]\n\n"
        f"[System]\n{rule.prompt}\n\n"
    )
    return chat(system, content)


def read_rules(path: str) -> dict[str, Rule]:
    """The rules of a file in the original's form: `{category: {"role": ..., "prompt": ...}}`."""
    rules = read_json(path)
    try:
        return {name: Rule(str(rule["role"]), str(rule["prompt"])) for name, rule in rules.items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: is no {{"category": {{"role": ..., "prompt": ...}}}} in JSON: {error}') from error


def instructions(rules: Mapping[str, Rule], categories: Sequence[str], system: str) -> dict[str, list[Message]]:
    """The prompts without questions and answers. Raises `UserError` for a category that has no rule."""
    if missing := sorted(set(categories) - set(rules)):
        raise UserError(f"there is no rule for category {missing[0]}; there are {', '.join(sorted(rules))}")
    empty = Question("", "", "", "")
    return {name: messages(rules[name], system, empty, "", "") for name in sorted(set(categories))}


class Judged(NamedTuple):
    number: int
    question: Question
    reference: Answer
    model: Answer
    swapped: bool

    @property
    def shown(self) -> tuple[Answer, Answer]:
        """The answers in the order in which the judge sees them."""
        return (self.model, self.reference) if self.swapped else (self.reference, self.model)


class Judge(ModelTask):
    """Has a language model compare a model's answers to LLaVA-Bench with reference answers: a review of each question.
    The judge gets a description of each image."""

    epilog = """examples:
  python -m llava_jax.evaluate judge llava-bench --questions questions.jsonl --context context.jsonl \\
    --reference answers_gpt4.jsonl --answers answers.jsonl --judge gpt-4-0314 --output reviews.jsonl
  ... --judge gpt-4-0314 gpt-4o --both-orders --repeats 3 --prices 30 60 --budget 20

Each judge and each repeat writes a file of its own (reviews.gpt-4o.2.jsonl). `score` takes one or several of them."""
    writes, failed = "reviews", "without scores"
    cut_counts = True  # the scores come first
    several = True
    temperature = 0.2

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_questions(parser)
        add = parser.add_argument
        add("--reference", required=True, metavar="F", help="JSONL of the reference answers, which count as 100")
        add("--answers", required=True, metavar="F", help="JSONL of the answers to judge")
        add("--rule-file", metavar="F", help="instructions to the judge, in the original's form (rule.json)")
        add("--system", metavar="TEXT", default=SYSTEM, help="system prompt of the judge")
        add("--both-orders", action="store_true", help="judge each question twice, with either answer first")

    def prompts(self, args: argparse.Namespace) -> tuple[list[list[Case]], Any]:
        questions = read_questions(args.questions, args.context)
        reference, model = (read_answers(path, questions) for path in (args.reference, args.answers))
        if absent := [ident for ident, answer in reference.items() if answer.absent]:
            raise UserError(
                f"{args.reference}: question {absent[0]}: the reference, which counts as 100, has no answer"
            )
        rules = read_rules(args.rule_file) if args.rule_file else RULES
        shared = instructions(rules, [question.category for question in questions.values()], args.system)
        orders = (False, True) if args.both_orders else (False,)
        asked = [(ident, swapped) for ident in questions for swapped in orders]

        def case(number: int, ident: str, swapped: bool, repeat: int) -> Case:
            about = Judged(number, questions[ident], reference[ident], model[ident], swapped)
            texts = [answer.text or "" for answer in about.shown]
            name = f"{ident}, {'swapped' if swapped else 'in order'}, repeat {repeat}"
            return Case(name, messages(rules[about.question.category], args.system, about.question, *texts), about)

        repeats = range(args.repeats)
        return [[case(number, *one, repeat) for number, one in enumerate(asked, 1)] for repeat in repeats], shared

    def read(self, about: Judged, text: str) -> tuple[float, float] | None:
        return parse_scores(text)

    def line(self, about: Judged, outcome: "Outcome", by: Mapping[str, str]) -> dict[str, Any]:
        """A line in the original's form. The tuple always has the reference's score first."""
        (first, second), scores = about.shown, outcome.value or FAILED
        review = {
            "id": about.number,
            "question_id": about.question.question_id,
            "answer1_id": first.answer_id,
            "answer2_id": second.answer_id,
            "category": about.question.category,
            "content": outcome.shown,
            "tuple": list(scores[::-1] if about.swapped else scores),
            "answer_model": about.model.model_id,
            "reference_model": about.reference.model_id,
        }
        marks = {"swapped": about.swapped, "no_answer": about.model.absent}
        return review | {name: value for name, value in marks.items() if value} | by


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", required=True, metavar="F", help="JSONL of question_id, image, text, category")
    parser.add_argument("--context", required=True, metavar="F", help="JSONL with a description of each image")


# ---------------------------------------------------------------------------------------------------------- reference


class Reference(ModelTask):
    """Has a text-only language model answer LLaVA-Bench from descriptions of the images: these answers count as 100."""

    epilog = """example:
  python -m llava_jax.evaluate reference llava-bench --questions questions.jsonl --context context.jsonl \\
    --model gpt-4-0314 --output answers_gpt4.jsonl"""
    writes = "answers"
    temperature = 0.2

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_questions(parser)

    def prompts(self, args: argparse.Namespace) -> tuple[list[list[Case]], Any]:
        questions = read_questions(args.questions, args.context).items()
        cases = [Case(f"{ident}, reference", self.messages(question), question) for ident, question in questions]
        return [cases], REFERENCE_SYSTEM

    def messages(self, question: Question) -> list[Message]:
        return chat(REFERENCE_SYSTEM, f"{question.context.strip()}\n\nQuestion: {question.text}")

    def line(self, about: Question, outcome: "Outcome", by: Mapping[str, str]) -> dict[str, Any]:
        model = by["judge"]
        ident = hashlib.sha256(f"{model} {about.question_id} {outcome.value}".encode()).hexdigest()[:22]
        return {
            "question_id": about.question_id,
            "prompt": about.text,
            "text": outcome.value,
            "answer_id": ident,
            "model_id": model,
            "metadata": {"prompt_hash": by["prompt_hash"]},
        }
