"""Makes checkpoints independent of others, one layer at a time.

A training workdir holds the trained parameters; the frozen ones stay in the checkpoint that the run started from.
`copy` writes a checkpoint with all parameters, `merge` one with adapters added to the weights; `copy_frozen` copies the
missing ones into the workdir, which then resumes without the other checkpoint.
"""

import dataclasses
import os
import uuid
from collections.abc import Iterator

from llava_jax.checkpoint.array_store import is_layered
from llava_jax.checkpoint.format import FROZEN, frozen_copy, has_copy, needed
from llava_jax.checkpoint.merged import Merged, merged, trained_whole
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.checkpoint.writing import Slice, write_model, write_parameters
from llava_jax.cli import UserError, track
from llava_jax.files.lock import hold
from llava_jax.models.llava import Shapes


def copy(path: str | os.PathLike, output: str | os.PathLike) -> None:
    """Writes all parameters of a checkpoint in their stored types, without the optimizer's state."""
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    _write(checkpoint, output)


def merge(path: str | os.PathLike, output: str | os.PathLike) -> float:
    """Writes a checkpoint as a model without adapters. -> `Merged.rounding`."""
    checkpoint = merged(open_checkpoint(path))
    if not isinstance(checkpoint, Merged):
        raise UserError(f"{path}: has no adapters to merge; to copy it: python -m llava_jax.convert copy")
    _write(checkpoint, output)
    return checkpoint.rounding()


def _write(checkpoint: Checkpoint, output: str | os.PathLike) -> None:
    description = dataclasses.replace(checkpoint.description, sources=(), id=uuid.uuid4().hex)
    if checkpoint.config.lora and (whole := trained_whole(checkpoint)) is not None:
        description = dataclasses.replace(description, trained_whole=tuple(sorted(whole)))
    shapes = checkpoint.abstract()
    write_model(output, shapes, _slices(checkpoint, shapes), description, os.fspath(checkpoint.tokenizer_dir))


def copy_frozen(path: str | os.PathLike) -> list[str]:
    """Copies the frozen parameters of a workdir into it; -> the paths copied from, none the second time."""
    checkpoint = open_checkpoint(path)
    if checkpoint.step is None:
        raise UserError(f"{path}: not a training workdir, so it holds all its parameters already")
    if not needed(checkpoint.root, checkpoint.description):
        return []
    copied = []
    with hold(checkpoint.root / FROZEN):
        for (holder, names), source in zip(checkpoint.holders[1:], checkpoint.description.sources, strict=True):
            if not has_copy(checkpoint.root, source):
                shapes = {name: holder.own(name).leaf for name in names}
                description = dataclasses.replace(holder.description, sources=())
                target = frozen_copy(checkpoint.root, source)
                if target.exists():  # not complete: a remote one whose copying was interrupted
                    target.rmtree()
                write_parameters(target, shapes, _slices(holder, shapes), description)
                copied.append(source.path)
    return copied


def _slices(checkpoint: Checkpoint, shapes: Shapes) -> Iterator[Slice]:
    places = [
        (name, layer)
        for name, leaf in shapes.items()
        for layer in (range(leaf.shape[0]) if is_layered(name, len(leaf.shape)) else (None,))
    ]
    for name, layer in track(places, "copying"):
        yield name, layer, checkpoint.read(name, layer)
