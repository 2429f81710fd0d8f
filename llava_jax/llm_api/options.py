"""The command line options of commands that ask a model behind an API."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.cli import UserError, positive
from llava_jax.files.reading import loads
from llava_jax.llm_api.budget import check_budget
from llava_jax.llm_api.cost import Prices

if TYPE_CHECKING:
    from llava_jax.llm_api.settings import Work

OPENAI = "https://api.openai.com/v1"
NO_KEY = "none"  # the client needs a key, even if the server does not
NOT_IN_BODY = {"model", "messages", "n", "stream_options"}  # set by the client, which reads one answer to a request

# The options below that mean nothing for a checkpoint.
OF_API = (
    "base_url", "body", "attempts", "concurrency", "requests_a_minute", "tokens_a_minute", "timeout", "prices",
    "budget", "batch", "poll", "dry_run", "ledger",
)  # fmt: skip


def add_api_arguments(
    parser: argparse.ArgumentParser, temperature: float, max_tokens: int | str, concurrency: int = 16
) -> None:
    """Adds all options but `--model`. If `max_tokens` is a text that describes the default, the default is None."""
    add = parser.add_argument_group("the API").add_argument
    add("--base-url", "--endpoint", metavar="URL", help="OpenAI-compatible server, with its /v1 (default: "
        "OPENAI_BASE_URL, or OpenAI's); OPENAI_API_KEY has the key")  # fmt: skip
    add("--temperature", type=float, default=temperature, metavar="T", help="default: %(default)s")
    add("--max-tokens", "--max-new-tokens", type=positive, default=max_tokens if isinstance(max_tokens, int) else None,
        metavar="N", help=f"tokens of an answer (default: {max_tokens})")  # fmt: skip
    add("--body", type=_object, action="append", default=[], metavar="JSON",
        help='more fields of each request, such as {"top_p": 0.9} or {"stream": true}; null removes one, as in '
        '{"max_tokens": null, "max_completion_tokens": 1024}; may be given several times')  # fmt: skip
    add("--attempts", type=positive, default=3, metavar="N", help="answers to a task before it has failed (default: 3)")
    add("--concurrency", type=positive, default=concurrency, metavar="N",
        help="requests at a time (default: %(default)s)")  # fmt: skip
    add("--requests-a-minute", type=_limit, metavar="N", help="limit (default: learned from the server)")
    add("--tokens-a-minute", type=_limit, metavar="N", help="limit (default: learned from the server)")
    add("--timeout", type=_amount, default=600.0, metavar="S", help="seconds for an answer (default: %(default)s)")
    add("--prices", type=_amount, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"),
        help="dollars for a million tokens of prompt and of completion; with --batch, of the batch API")  # fmt: skip
    add("--budget", type=_amount, metavar="USD", help="stop before more is spent in all runs together; needs --prices")
    add("--batch", action="store_true", help="use the batch API: cheaper, answers within a day")
    add("--poll", type=_amount, default=60.0, metavar="S", help="seconds between looks at batches (default: 60)")
    add("--dry-run", action="store_true", help="estimate tokens and cost, and send nothing")


def add_output_arguments(parser: argparse.ArgumentParser, holds: str) -> None:
    """Adds the options for the results and the ledger beside them. `holds` says what a line of the results is."""
    add = parser.add_argument
    add("--output", required=True, metavar="F", help=f"JSONL of {holds}")
    add("--ledger", metavar="DIR",
        help="directory of the ledger of all requests, on a local disk (default: OUTPUT.ledger)")  # fmt: skip


def ledger_directory(args: argparse.Namespace) -> Path:
    """The directory of the ledger. Raises `UserError` if it is not on a local disk, which SQLite needs."""
    directory = args.ledger or f"{args.output}.ledger"
    if any("://" in os.fspath(path) for path in (directory, args.output)):
        raise UserError(f"{args.output}: has its ledger beside it, which needs a local disk")
    return Path(directory)


def work(args: argparse.Namespace, model: str, asks: bool = True) -> "Work":
    """The options as settings. `asks`: whether requests are sent; then a missing server raises `UserError`."""
    from llava_jax.llm_api.settings import Settings, Work  # only here: openai takes a second to load

    prices, body = Prices(*args.prices), request_body(args)
    check_budget(args.budget, prices)
    server, key = args.base_url or os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii():
        raise UserError("OPENAI_API_KEY: holds characters that no key has: is it a placeholder?")
    if server and not server.startswith(("http://", "https://")):
        raise UserError(f"--base-url {server}: has to begin with http:// or https://, as http://localhost:8000/v1")
    if asks and not (args.dry_run or server or key):
        raise UserError(
            "no server is given: --base-url URL (or OPENAI_BASE_URL) is its address, with its /v1; for OpenAI's own "
            "OPENAI_API_KEY has to hold a key"
        )
    stream = bool(body.pop("stream", False))
    # OpenAI's address is given explicitly, since the client would use an empty OPENAI_BASE_URL.
    settings = Settings(
        model, body, server or OPENAI, key or NO_KEY, args.concurrency, args.requests_a_minute, args.tokens_a_minute,
        prices, stream, args.timeout,
    )  # fmt: skip
    return Work(settings, args.budget, args.attempts, args.batch, args.poll)


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of every request besides model and messages."""
    body, given = {"temperature": args.temperature, "max_tokens": args.max_tokens}, {}
    for more in args.body:
        given |= more
    if given.get("max_completion_tokens") is not None:
        del body["max_tokens"]
    return {key: value for key, value in {**body, **given}.items() if value is not None}


def _limit(text: str) -> float:
    if (value := _amount(text)) == 0:
        raise argparse.ArgumentTypeError("has to be above 0; leave it out for no limit")
    return value


def _amount(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError("has to be a number of at least 0")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        value = loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("has to be a JSON object")
    if taken := sorted(NOT_IN_BODY & value.keys()):
        raise argparse.ArgumentTypeError(f"holds {', '.join(taken)}, which the command sets itself")
    for name in ("max_tokens", "max_completion_tokens"):
        if (limit := value.get(name)) is not None and (type(limit) is not int or limit < 1):
            raise argparse.ArgumentTypeError(f"has {name} {json.dumps(limit)}, which is not an integer of at least 1")
    return value
