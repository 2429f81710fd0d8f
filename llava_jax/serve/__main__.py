"""Serves a checkpoint: OpenAI's API under /v1, and a web page at /."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from llava_jax.cli import Parser, UserError, run
from llava_jax.inference import options
from llava_jax.models.config import QUANTIZATIONS
from llava_jax.parallel import compilation_cache

DTYPES = ("float32", "bfloat16")
MAX_KEY_BYTES = 4096

EPILOG = """examples:
  python -m llava_jax.serve --checkpoint runs/finetune --port 8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "finetune", "messages": [{"role": "user", "content": "Hello"}]}'

docs/serving.md has more: images, keys, systemd, nginx."""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    api_key = _api_key(args.api_key_file)
    try:  # the extra `serve` installs their dependencies
        from llava_jax.inference.engine import Engine
        from llava_jax.parallel.sharding import make_mesh
        from llava_jax.serve.app import create_app
        from llava_jax.serve.hosts import own_names
        from llava_jax.serve.server import Server, listen
    except ImportError as error:
        raise UserError(f"{error}: pip install 'llava_jax[serve]'") from error
    address = listen(args.host, args.port)
    checkpoint, template = options.open_model(args)
    compilation_cache.use(args.compilation_cache)
    engine = Engine.from_checkpoint(
        checkpoint,
        template,
        dtype=args.dtype,
        mesh=args.mesh and make_mesh(args.mesh),
        quantize=args.quantize,
        slots=args.slots,
        context=args.context,
        queue=args.queue,
    )
    app = create_app(
        engine,
        args.model_name or Path(args.checkpoint.rstrip("/")).name,
        api_key=api_key,
        allow_remote_images=args.allow_remote_images,
        max_body_bytes=args.max_body_mb << 20,
        allowed_hosts=[*own_names(args.host, address), *args.allowed_hosts],
        allow_origins=args.allow_origin,
        page=not args.no_page,
    )
    Server(app, engine).run([address])


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
    options.add_checkpoint(parser)
    add("--host", default="127.0.0.1", help="127.0.0.1 (default): only this machine; 0.0.0.0: all")
    add("--port", type=_integer(0, 65535), default=8000, metavar="N", help="default: 8000")
    add("--allowed-hosts", type=_allowed_names, default=[], metavar="NAME,...", help="more names of this server: "
        "llava.example.org or *.example.org; * for any. Always accepted: localhost, loopback addresses and "
        "--host")  # fmt: skip
    add("--allow-origin", type=_allowed_origin, action="append", default=[], metavar="URL", help="a site whose pages "
        "may use the API in browsers, such as https://app.example.org; repeatable")  # fmt: skip
    add("--model-name", type=_name, metavar="NAME", help="for clients (default: the checkpoint's folder)")
    add("--slots", type=_integer(1), default=8, metavar="N", help="answers at a time (default: 8)")
    add("--queue", type=_integer(1, 100_000), default=64, metavar="N", help="requests that may wait (default: 64)")
    add("--context", type=_integer(1), metavar="N", help="positions of a prompt and its answer")
    add("--dtype", choices=DTYPES, help="of the computation (default: float32 on CPUs, bfloat16 on other devices)")
    add("--mesh", type=_mesh, metavar="AXIS=N", help="shard over devices, such as tensor=4 (default: one device)")
    add("--api-key-file", metavar="F", help="a file with the key that clients need; or set LLAVA_API_KEY")
    add("--allow-remote-images", action="store_true", help="fetch images from public http(s) URLs")
    add("--max-body-mb", type=_integer(1, 4096), default=32, metavar="N", help="of a request with images (default: 32)")
    add("--no-page", action="store_true", help="only the API, without the web page at /")
    add("--quantize", choices=QUANTIZATIONS[1:], help="store the decoder's weights in eight bits")
    add("--compilation-cache", default=compilation_cache.usual(), metavar="D", help="where compiled programs are "
        "kept for the next start; '' for nowhere (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def _integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer in a range."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def _allowed_names(text: str) -> list[str]:
    from llava_jax.serve.hosts import allowed_names

    try:
        return allowed_names(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{str(error)!r} is no host name, such as llava.example.org") from error


def _allowed_origin(text: str) -> str:
    from llava_jax.serve.hosts import allowed_origin

    try:
        return allowed_origin(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no origin, such as https://app.example.org, without a path"
        ) from error


def _name(text: str) -> str:
    if not (text.isprintable() and 0 < len(text) <= 200):
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is no name: 1 to 200 printable characters")
    return text


def _mesh(text: str) -> dict[str, int]:
    """The axis sizes of `tensor=4` or `tensor=2,fsdp=2`."""
    sizes = dict(pair.partition("=")[::2] for pair in text.split(","))
    if all(size.isdecimal() and int(size[:9]) > 0 for size in sizes.values()):
        from llava_jax.parallel.sharding import AXES  # imports JAX

        if set(sizes) <= set(AXES):
            return {axis: int(size) for axis, size in sizes.items()}
    raise argparse.ArgumentTypeError(f"{text!r} does not look like tensor=4 or tensor=2,fsdp=2")


if __name__ == "__main__":
    run(main)
