"""What `predict` does with a model behind an OpenAI-compatible API. What it said is kept in a ledger beside the output,
so that no answer is paid twice."""

import argparse
import base64
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from PIL import Image, UnidentifiedImageError

from llava_jax.cli import UserError
from llava_jax.data.images import read_picture
from llava_jax.evaluate.answer_file import AnswerFile
from llava_jax.evaluate.questions import Question, system_turns
from llava_jax.incoming import refuse_pointer
from llava_jax.llm_api.asking import Task, Work, ask_all
from llava_jax.llm_api.client import Settings
from llava_jax.llm_api.cost import Prices, check_budget
from llava_jax.llm_api.options import NO_KEY

AT_A_TIME = 512  # questions whose pictures are in memory


def predict(args: argparse.Namespace, questions: Sequence[Question]) -> None:
    file = AnswerFile(args.output, questions, args.model_id)
    waiting = [question for question in questions if question.key not in file.lines]
    for start in range(0, len(waiting), AT_A_TIME):
        some = waiting[start : start + AT_A_TIME]
        tasks = [Task("\n".join(map(str, question.key)), messages(question, args.images), _answer) for question in some]
        left = f", {len(waiting) - start} left" if len(waiting) > AT_A_TIME else ""
        outcomes = ask_all(_work(args), tasks, Path(f"{args.output}.ledger"), {}, f"asking {args.model}{left}")
        for question, outcome in zip(some, outcomes, strict=True):
            if outcome.value is None:
                reason = outcome.text.strip() or "empty"
                print(f"warning: question {question.id}: no answer ({reason}), which counts as wrong", file=sys.stderr)
        file.add([(question, outcome.value or "") for question, outcome in zip(some, outcomes, strict=True)])
    print(f"{file.finish(file.lines)} answers: {args.output}", file=sys.stderr)


def messages(question: Question, images: str) -> list[dict[str, Any]]:
    """The question as the user's turn, after its pictures; before it its system prompt, if it has one."""
    system = [{"role": role, "content": text} for role, text in system_turns(question)]
    if not question.pictures:
        return [*system, {"role": "user", "content": question.text}]
    try:
        urls = [_data_url(picture, images) for picture in question.pictures]
    except UserError as error:
        raise UserError(f"question {question.id}: {error}") from error
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*system, {"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]


def _data_url(picture: str | bytes, images: str) -> str:
    data = picture if isinstance(picture, bytes) else read_picture(epath.Path(images) / picture)
    name = picture if isinstance(picture, str) else "in the file"
    refuse_pointer(data, f"picture {name}")
    try:
        kind = Image.open(io.BytesIO(data)).get_format_mimetype()
    except UnidentifiedImageError as error:
        raise UserError(f"picture {name}: is none") from error
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _answer(text: str) -> str | None:
    return text.strip() or None


def _work(args: argparse.Namespace) -> Work:
    prices = Prices(*args.prices)
    check_budget(args.budget, prices)
    body = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
    body |= {"top_p": args.top_p, "seed": args.seed} if args.temperature else {}
    settings = Settings(
        args.model,
        body,
        args.endpoint,
        os.environ.get("OPENAI_API_KEY") or NO_KEY,
        concurrency=args.concurrency,
        requests_a_minute=args.requests_a_minute,
        prices=prices,
        timeout=args.timeout,
    )
    return Work(settings, args.budget)
