"""Serves a checkpoint: OpenAI's API under /v1, and a web page at /."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from llava_jax import compilation_cache
from llava_jax.cli import Parser, UserError, run
from llava_jax.data.conversation import choose_template
from llava_jax.models.config import QUANTIZATIONS

DTYPES = ("float32", "bfloat16")

EPILOG = """examples:
  python -m llava_jax.serve --checkpoint runs/finetune --port 8000
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "finetune", "messages": [{"role": "user", "content": "Hello"}]}'

docs/serving.md has more: pictures, keys, systemd, nginx."""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    import jax.numpy as jnp  # only now: it takes seconds, and a typing error need not wait

    from llava_jax.checkpoint import open_checkpoint
    from llava_jax.sharding import make_mesh

    try:  # what the extra `serve` brings
        from llava_jax.serve.app import create_app
        from llava_jax.serve.engine import Engine
        from llava_jax.serve.server import Server, listen
    except ImportError as error:
        raise UserError(f"{error}: pip install 'llava_jax[serve]'") from error
    api_key = _api_key(args.api_key_file)
    address = listen(args.host, args.port)
    compilation_cache.use(args.compilation_cache)
    checkpoint = open_checkpoint(args.checkpoint)
    template = choose_template(args.template, checkpoint.template)
    engine = Engine.from_checkpoint(
        checkpoint,
        template,
        dtype=args.dtype and jnp.dtype(args.dtype),
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
        page=not args.no_page,
    )
    Server(app, engine).run([address])


def _api_key(file: str | None) -> str | None:
    """From a file or the environment: whoever lists processes sees their arguments."""
    key = Path(file).read_text().strip() if file is not None else os.environ.get("LLAVA_API_KEY")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{file or 'LLAVA_API_KEY'}: a key is one line of printable ASCII characters without spaces")
    return key


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m llava_jax.serve",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="D", help="an import, a workdir or a step of it")
    parser.add_argument(
        "--host", default="127.0.0.1", help="127.0.0.1, the default, is this machine only; 0.0.0.0: all"
    )
    parser.add_argument("--port", type=_whole(0, 65535), default=8000, metavar="N", help="8000")
    parser.add_argument("--model-name", metavar="NAME", help="what clients ask for; the checkpoint's folder by default")
    parser.add_argument("--template", metavar="NAME", help="instead of the checkpoint's")
    parser.add_argument("--slots", type=_whole(1), default=8, metavar="N", help="answers at a time, 8")
    parser.add_argument("--queue", type=_whole(1), default=64, metavar="N", help="requests that may wait, 64")
    parser.add_argument("--context", type=_whole(1), metavar="N", help="positions of a prompt and its answer")
    parser.add_argument("--dtype", choices=DTYPES, help="to compute in; float32 on CPUs, bfloat16 elsewhere")
    parser.add_argument("--mesh", type=_mesh, metavar="AXIS=N", help="split over devices, as tensor=4; one by default")
    parser.add_argument("--api-key-file", metavar="F", help="clients need the key in it, or the one in LLAVA_API_KEY")
    parser.add_argument("--allow-remote-images", action="store_true", help="fetch pictures from public http(s) URLs")
    parser.add_argument("--max-body-mb", type=_whole(1), default=32, metavar="N", help="of a request with pictures, 32")
    parser.add_argument("--no-page", action="store_true", help="the API alone, without the web page at /")
    parser.add_argument("--quantize", choices=QUANTIZATIONS[1:], help="the decoder's weights in eight bits")
    parser.add_argument(
        "--compilation-cache",
        default=compilation_cache.usual(),
        metavar="D",
        help="where compiled programs are kept for the next start; '' for nowhere; %(default)s",
    )
    return parser.parse_args(argv)


def _whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number in a range."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return parse


def _mesh(text: str) -> dict[str, int]:
    """`tensor=4`, `tensor=2,fsdp=2`: the sizes of axes."""
    from llava_jax.sharding import AXES

    sizes = dict(pair.partition("=")[::2] for pair in text.split(","))
    if not all(axis in AXES and size.isdecimal() for axis, size in sizes.items()):
        raise argparse.ArgumentTypeError(f"{text!r} does not look like tensor=4 or tensor=2,fsdp=2")
    return {axis: int(size) for axis, size in sizes.items()}


if __name__ == "__main__":
    run(main)
