"""Serves a checkpoint: OpenAI's API under /v1, and a web page at /."""

import argparse
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_jax.cli import Parser, UserError, run
from llava_jax.inference import options

MAX_KEY_BYTES = 4096
DEFAULT_ROOM = {"adapters": 8, "adapter_rank": 64}  # for adapters of --adapter-directory

EPILOG = """examples:
  python -m llava_jax.serve --checkpoint runs/finetune --port 8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "finetune", "messages": [{"role": "user", "content": "Hello"}]}'

docs/serving.md has more: images, keys, systemd, nginx."""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    api_key = _api_key(args.api_key_file)
    try:  # the extra `serve` installs their dependencies
        from llava_jax.convert.served_adapter import read_for
        from llava_jax.inference.adapters import check_name
        from llava_jax.serve.app import create_app
        from llava_jax.serve.hosts import own_names
        from llava_jax.serve.models import AdapterDirectory
        from llava_jax.serve.server import Server, listen
    except ImportError as error:
        raise UserError(f"{error}: pip install 'llava_jax[serve]'") from error
    if args.image_hosts and not args.allow_remote_images:
        raise UserError("--image-hosts is for --allow-remote-images: give it, too")
    address = listen(args.host, args.port)
    name = args.model_name or Path(args.checkpoint.rstrip("/")).name
    for adapter, _ in args.adapter:
        check_name(adapter, base=name)
    read = functools.partial(read_for, template=args.template)
    room = _adapter_room(args)
    room["cache_bytes"] = args.cache_mb and args.cache_mb * 2**20
    engine = options.open_engine(args, read, slots=args.slots, context=args.context, queue=args.queue, **room)
    directory = None
    if args.adapter_directory is not None:
        read_one = functools.partial(read, base=options.open_model(args)[0])
        directory = AdapterDirectory(engine, name, args.adapter_directory, read_one)
    app = create_app(
        engine,
        name,
        api_key=api_key,
        allow_remote_images=args.allow_remote_images,
        image_hosts=args.image_hosts,
        max_body_bytes=args.max_body_mb << 20,
        allowed_hosts=[*own_names(args.host, address), *args.allowed_hosts],
        allow_origins=args.allow_origin,
        page=not args.no_page,
        adapter_directory=directory,
    )
    Server(app, engine).run([address])


def _adapter_room(args: argparse.Namespace) -> dict[str, int]:
    """How many adapters there is room for, and their rank, besides those that the command loads itself."""
    given = {"adapters": args.max_adapters, "adapter_rank": args.max_adapter_rank}
    if args.adapter_directory is None:
        if any(given.values()):
            raise UserError(
                "--max-adapters and --max-adapter-rank are for adapters of --adapter-directory: give it, too"
            )
        return {}
    if not os.path.isdir(args.adapter_directory):
        raise UserError(f"--adapter-directory {args.adapter_directory}: there is no such local directory")
    return {name: value or DEFAULT_ROOM[name] for name, value in given.items()}


def _api_key(file: str | None) -> str | None:
    """From a file or the environment, since all users of a machine can see the arguments of its processes."""
    key = os.environ.get("LLAVA_API_KEY")
    if file is not None:
        with open(file, "rb") as opened:
            key = opened.read(MAX_KEY_BYTES + 1).decode("ascii", "replace").strip()
    if key is not None and not re.fullmatch(rf"[!-~]{{1,{MAX_KEY_BYTES}}}", key):
        raise UserError(f"{file or 'LLAVA_API_KEY'}: a key is one line of printable ASCII characters without spaces")
    return key


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.serve", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    hosts = _parsed_by("allowed_names", "host name, such as llava.example.org")
    origin = _parsed_by("allowed_origin", "origin, such as https://app.example.org, without a path")
    options.add_checkpoint(parser)
    add("--host", default="127.0.0.1", help="127.0.0.1 (default): only this machine; 0.0.0.0: all")
    add("--port", type=_integer(0, 65535), default=8000, metavar="N", help="default: 8000")
    add("--allowed-hosts", type=hosts, default=[], metavar="NAME,...", help="more names of this server: "
        "llava.example.org or *.example.org; * for any. Always accepted: localhost, loopback addresses and "
        "--host")  # fmt: skip
    add("--allow-origin", type=origin, action="append", default=[], metavar="URL", help="a site whose pages "
        "may use the API in browsers, such as https://app.example.org; repeatable")  # fmt: skip
    options.add_adapters(parser)
    add("--adapter-directory", metavar="D", help="clients may load and unload adapters below it, by "
        "/v1/load_lora_adapter and /v1/unload_lora_adapter")  # fmt: skip
    add("--max-adapters", type=_integer(1, 1000), metavar="N", help="with --adapter-directory: how many at a time "
        f"(default: {DEFAULT_ROOM['adapters']})")  # fmt: skip
    add("--max-adapter-rank", type=_integer(1, 2**17), metavar="R", help="with --adapter-directory: their largest "
        f"rank (default: {DEFAULT_ROOM['adapter_rank']})")  # fmt: skip
    add("--model-name", type=_name, metavar="NAME", help="for clients (default: the checkpoint's folder)")
    add("--slots", type=_integer(1), default=8, metavar="N", help="answers at a time (default: 8)")
    add("--queue", type=_integer(1, 100_000), default=64, metavar="N", help="requests that may wait (default: 64)")
    add("--context", type=_integer(1), metavar="N", help="positions of a prompt and its answer")
    add("--cache-mb", type=_integer(1), metavar="N", help="for keys and values on a device; by default as much as "
        "one and a half times the slots need, or most of the free memory where that is less")  # fmt: skip
    add("--api-key-file", metavar="F", help="a file with the key that clients need; or set LLAVA_API_KEY")
    add("--allow-remote-images", action="store_true", help="fetch images from public http(s) URLs")
    add("--image-hosts", type=hosts, default=[], metavar="NAME,...", help="with --allow-remote-images: fetch from "
        "these hosts only: images.example.org or *.example.org")  # fmt: skip
    add("--max-body-mb", type=_integer(1, 4096), default=32, metavar="N", help="of a request with images (default: 32)")
    add("--no-page", action="store_true", help="only the API, without the web page at /")
    options.add_computation(parser)
    return parser.parse_args(argv)


def _integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer in a range."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def _parsed_by(function: str, what: str) -> Callable[[str], Any]:
    """The type of an argument that a function of `hosts` parses. --help works without that module's dependencies."""

    def parse(text: str) -> Any:
        from llava_jax.serve import hosts

        try:
            return getattr(hosts, function)(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{str(error)!r} is no {what}") from error

    return parse


def _name(text: str) -> str:
    if not (text.isprintable() and 0 < len(text) <= 200):
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no name: 1 to 200 printable characters")
    return text


if __name__ == "__main__":
    run(main)
