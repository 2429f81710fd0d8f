"""The options of commands that ask a model behind an API."""

import argparse
import json
import os
from typing import Any

from llava_jax.cli import UserError
from llava_jax.llm_api.asking import Work
from llava_jax.llm_api.client import Settings
from llava_jax.llm_api.cost import Prices

NO_KEY = "none"  # servers at home want none, but the client does


def add_api_arguments(parser: argparse.ArgumentParser, temperature: float, max_tokens: int) -> None:
    """Adds all options but that of the model."""
    add = parser.add_argument_group("the API").add_argument
    add("--base-url", metavar="URL", help="of an OpenAI-compatible server, with its /v1 (default: OPENAI_BASE_URL, or "
        "OpenAI's); the key is in OPENAI_API_KEY")  # fmt: skip
    add("--temperature", type=float, default=temperature, help="default: %(default)s")
    add("--max-tokens", type=int, default=max_tokens, metavar="N", help="of an answer (default: %(default)s)")
    add("--body", type=_json_object, metavar="JSON", help='parameters in place of these two, such as '
        "'{\"max_completion_tokens\": 4096}' for models that know no others")  # fmt: skip
    add("--attempts", type=int, default=3, metavar="N", help="answers before a task counts as failed (default: 3)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests under way (default: %(default)s)")
    add("--requests-a-minute", type=float, metavar="N", help="that the server is known to take")
    add("--tokens-a-minute", type=float, metavar="N", help="that the server is known to take")
    add("--prices", type=float, nargs=2, default=(0.0, 0.0), metavar="$", help="dollars for a million tokens of "
        "prompts and of answers")  # fmt: skip
    add("--budget", type=float, metavar="$", help="dollars that may be spent in all, with --prices")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (default: %(default)s)")


def work(args: argparse.Namespace, model: str) -> Work:
    """What these options say. Raises `UserError` for numbers that make no sense."""
    for name in ("attempts", "concurrency", "max_tokens", "timeout"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} has to be more than 0")
    if args.budget is not None and not any(args.prices):
        raise UserError("--budget needs --prices: without them nothing costs anything")
    body = {"temperature": args.temperature, "max_tokens": args.max_tokens} if args.body is None else args.body
    at_home = args.base_url or os.environ.get("OPENAI_BASE_URL")
    settings = Settings(
        model,
        body,
        args.base_url,
        os.environ.get("OPENAI_API_KEY") or (NO_KEY if at_home else None),
        concurrency=args.concurrency,
        requests_a_minute=args.requests_a_minute,
        tokens_a_minute=args.tokens_a_minute,
        prices=Prices(*args.prices),
        timeout=args.timeout,
    )
    return Work(settings, args.budget, args.attempts)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value
