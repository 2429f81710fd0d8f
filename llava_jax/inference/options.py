"""Options of the commands that answer with a checkpoint. Imports no JAX until a checkpoint is opened."""

import argparse
from typing import TYPE_CHECKING

from llava_jax.data.templates import Template, choose_template, get_template

if TYPE_CHECKING:
    from llava_jax.checkpoint.reading import Checkpoint


def add_checkpoint(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--checkpoint` and `--template`, see `open_model`."""
    add = parser.add_argument
    add("--checkpoint", required=required, metavar="D", help="an import, a workdir or a step of it")
    add("--template", type=_known_template, metavar="NAME", help="instead of the checkpoint's")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds `--top-p` and `--seed`."""
    add = parser.add_argument
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the most likely tokens that together have "
        "this probability")  # fmt: skip
    add("--seed", type=int, default=0, help="of sampling")


def _known_template(name: str) -> str:
    get_template(name)  # raises `UserError` for an unknown name, before JAX is imported
    return name


def open_model(args: argparse.Namespace) -> tuple["Checkpoint", Template]:
    """The checkpoint and the template of these options. Raises `UserError`."""
    from llava_jax.checkpoint.reading import open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    return checkpoint, choose_template(args.template, checkpoint.template)
