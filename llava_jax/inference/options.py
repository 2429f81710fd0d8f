"""Options of the commands that answer with a checkpoint. Imports no JAX until a checkpoint is opened."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_jax.cli import UserError
from llava_jax.data.templates import Template, choose_template, get_template
from llava_jax.models.config import QUANTIZATIONS
from llava_jax.parallel import compilation_cache

if TYPE_CHECKING:
    from llava_jax.checkpoint.reading import Checkpoint
    from llava_jax.inference.adapters import AdapterWeights
    from llava_jax.inference.engine import Engine

DTYPES = ("float32", "bfloat16")


def add_checkpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--checkpoint` and `--template`, see `open_model`."""
    add = parser.add_argument
    add("--checkpoint", required=required, metavar="D", help="an imported checkpoint, a workdir or one of its steps")
    add("--template", type=_known_template, metavar="NAME", help="prompt template instead of the checkpoint's")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds `--top-p` and `--seed`."""
    add = parser.add_argument
    add("--top-p", type=float, default=1.0, metavar="P", help="top-p sampling (default: 1, all tokens)")
    add("--seed", type=int, default=0, help="of sampling")


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`, `--mesh`, `--quantize` and `--compilation-cache`, see `open_engine`."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="of the computation (default: float32 on CPUs, bfloat16 on other devices)")
    add("--mesh", type=mesh_axes, metavar="AXIS=N", help="shard over devices, such as tensor=4 (default: one device)")
    add("--quantize", choices=QUANTIZATIONS[1:], help="store the decoder's weights in eight bits")
    add("--compilation-cache", default=compilation_cache.usual(), metavar="D", help="where compiled programs are "
        "kept for the next start; '' for nowhere (default: %(default)s)")  # fmt: skip


def open_model(args: argparse.Namespace) -> tuple["Checkpoint", Template]:
    """The checkpoint and the template of `add_checkpoint`. Raises `UserError`."""
    from llava_jax.checkpoint.reading import open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    return checkpoint, choose_template(args.template, checkpoint.template)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, see `open_engine`."""
    parser.add_argument("--adapter", type=_named_directory, action="append", default=[], metavar="NAME=DIR",
        help="an adapter of the checkpoint: a directory of PEFT, or a workdir or checkpoint with config.lora; "
        "repeatable")  # fmt: skip


def open_engine(
    args: argparse.Namespace, read_adapter: Callable[[str, "Checkpoint"], "AdapterWeights"], **options: Any
) -> "Engine":
    """An engine with the checkpoint of `add_checkpoint`, the adapters of `add_adapters`, and the options of
    `add_computation` if there are any. Raises `UserError`.

    Args:
      args: of the command.
      read_adapter: reads the adapter in a directory for a checkpoint.
      **options: of `Engine`; there is room for `adapters` of `adapter_rank` or, if that is more, for those of `args`.
    """
    from llava_jax.inference.adapters import max_rank
    from llava_jax.inference.engine import Engine
    from llava_jax.parallel.sharding import make_mesh

    checkpoint, template = open_model(args)
    adapters: dict[str, AdapterWeights] = {}
    for name, directory in args.adapter:
        if name in adapters:
            raise UserError(f"--adapter {name}={directory}: another one has this name")
        adapters[name] = read_adapter(directory, checkpoint)
    room = {"adapters": len(adapters), "adapter_rank": max_rank(adapters)}
    options |= {name: max(least, options.get(name, 0)) for name, least in room.items()}
    given = vars(args)
    compilation_cache.use(given.get("compilation_cache", compilation_cache.usual()))
    mesh = given.get("mesh")
    options |= {"dtype": given.get("dtype"), "quantize": given.get("quantize"), "mesh": mesh and make_mesh(mesh)}
    engine = Engine.from_checkpoint(checkpoint, template, **options)
    for name, weights in adapters.items():
        engine.adapters.load(name, weights)
    return engine


def _named_directory(text: str) -> tuple[str, str]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise argparse.ArgumentTypeError(f"{text!r} does not look like NAME=DIR")
    return name, directory


def mesh_axes(text: str) -> dict[str, int]:
    """The axis sizes of `tensor=4` or `tensor=2,fsdp=2`. Raises `ArgumentTypeError`."""
    sizes = dict(pair.partition("=")[::2] for pair in text.split(","))
    if all(size.isdecimal() and int(size[:9]) > 0 for size in sizes.values()):
        from llava_jax.parallel.sharding import AXES  # imports JAX

        if set(sizes) <= set(AXES):
            return {axis: int(size) for axis, size in sizes.items()}
    raise argparse.ArgumentTypeError(f"{text!r} does not look like tensor=4 or tensor=2,fsdp=2")


def _known_template(name: str) -> str:
    get_template(name)  # raises `UserError` for an unknown name, before JAX is imported
    return name
