"""Makes self-contained what takes parameters from other checkpoints: one layer after the other, none kept in memory.

A training workdir holds what was trained; its frozen parameters stay where the run found them. `copy` writes a whole
checkpoint of its newest step, `copy_frozen` puts the missing parameters into the workdir, which then resumes, too.
"""

import dataclasses
import os
import uuid
from collections.abc import Iterable, Iterator

from llava_jax.checkpoint.array_store import is_layered
from llava_jax.checkpoint.format import FROZEN, frozen_copy, has_copy, needed
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.checkpoint.writing import Piece, write_model, write_part
from llava_jax.cli import UserError, track
from llava_jax.files.lock import hold


def copy(path: str | os.PathLike, output: str | os.PathLike) -> None:
    """Writes all parameters of a checkpoint in the types that they are stored in, without the optimizer's state."""
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    description = dataclasses.replace(checkpoint.description, sources=(), id=uuid.uuid4().hex)
    shapes = checkpoint.abstract()
    write_model(output, shapes, _pieces(checkpoint, shapes), description, os.fspath(checkpoint.tokenizer_dir))


def copy_frozen(path: str | os.PathLike) -> list[str]:
    """Copies into a workdir what its checkpoints take from elsewhere; -> from where. Repeated, it copies nothing."""
    checkpoint = open_checkpoint(path)
    if checkpoint.step is None:
        raise UserError(f"{path}: is no training workdir: it holds all its parameters already")
    if not needed(checkpoint.root, checkpoint.description):
        return []
    copied = []
    with hold(checkpoint.root / FROZEN):
        for (part, names), source in zip(checkpoint.parts[1:], checkpoint.description.sources, strict=True):
            if not has_copy(checkpoint.root, source):
                shapes = {name: part.stored[name] for name in names}
                write_part(
                    frozen_copy(checkpoint.root, source),
                    shapes,
                    _pieces(part, names),
                    dataclasses.replace(part.description, sources=()),
                )
                copied.append(source.path)
    return copied


def _pieces(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[Piece]:
    shapes = checkpoint.abstract()
    places = [
        (name, layer)
        for name in names
        for layer in (range(shapes[name].shape[0]) if is_layered(name, len(shapes[name].shape)) else (None,))
    ]
    for name, layer in track(places, "copying"):
        yield name, layer, checkpoint.read(name, layer)
