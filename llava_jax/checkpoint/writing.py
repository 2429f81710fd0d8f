"""Writes checkpoints, into a directory that takes its final name when it is complete."""

import contextlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath

from llava_jax.checkpoint.array_store import ArrayWriter
from llava_jax.checkpoint.errors import in_one_line
from llava_jax.checkpoint.format import Description, absolute, write_description
from llava_jax.cli import UserError
from llava_jax.data.tokenizer_files import MAX_BYTES
from llava_jax.files.lock import entries, hold
from llava_jax.files.reading import read_bytes
from llava_jax.models.llava import Shapes, abstract_params, check_names
from llava_jax.remote import is_remote

Slice = tuple[str, int | None, np.ndarray]  # a parameter's name, a layer of it or None for all of it, the values


def write_model(
    directory: str | os.PathLike, shapes: Shapes, slices: Iterable[Slice], description: Description, tokenizer_dir: str
) -> None:
    """Writes a model from slices that together are parameters of these shapes and types.

    Each slice is written when it comes, and a failure leaves nothing. Raises UserError if `directory` exists.
    """
    directory = absolute(directory)
    try:
        check_names(shapes, abstract_params(description.model))
    except ValueError as error:
        raise UserError(f"{directory}: these parameters are not the model's: {error}") from None
    write_parameters(directory, shapes, slices, description, tokenizer_dir)


def write_parameters(
    directory: epath.Path, shapes: Shapes, slices: Iterable[Slice], description: Description, tokenizer_dir: str = ""
) -> None:
    """Writes some parameters of a model, for checkpoints that have it as a source."""
    with new_directory(directory) as partial:
        if tokenizer_dir:
            copy_tokenizer(epath.Path(tokenizer_dir), partial / "tokenizer")
        if not is_remote(partial):
            check_free(partial, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values()))
        with in_one_line(directory, "cannot be written"), ArrayWriter(partial / "params", shapes) as writer:
            for name, layer, values in slices:
                writer.write(name, layer, values)
        write_description(partial, description)


def copy_tokenizer(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.is_dir():
            (target / file.name).write_bytes(read_bytes(file, MAX_BYTES))  # from a disk to a bucket as well


def check_free(directory: os.PathLike, size: int) -> None:
    """Raises UserError if a local disk has no room for so many bytes, before anything is written."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"{os.path.dirname(directory)}: the weights take {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        )


def refuse_existing(directory: str | os.PathLike) -> None:
    """Raises UserError unless `directory` does not exist, or is empty and can be replaced."""
    directory = epath.Path(directory)
    try:
        held = entries(directory) if is_remote(directory) else directory.is_dir() and os.listdir(directory)
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror or error}); choose another output") from None
    if held or (directory.exists() and not directory.is_dir()):
        raise UserError(f"{directory}: exists already; remove it or choose another output")
    if os.path.ismount(directory):
        raise UserError(f"{directory}: is where a disk is mounted, and cannot be replaced: name a new directory in it")


@contextlib.contextmanager
def new_directory(directory: epath.Path) -> Iterator[epath.Path]:
    """A new directory beside `directory`, which takes its name at the end and is removed on an error.

    Object stores cannot rename directories: a remote one is filled in place, by one process at a time. So write the
    file that makes it valid last.
    """
    remote, partial = is_remote(directory), directory
    if not remote:
        directory = epath.Path(os.path.realpath(directory))  # a link stays one
    with hold(directory) if remote else contextlib.nullcontext():
        refuse_existing(directory)
        if not remote:
            partial = directory.parent / f".{directory.name}.partial-{uuid.uuid4().hex[:8]}"
            partial.mkdir(parents=True)
        try:
            yield partial
            if not remote:
                refuse_existing(directory)  # another process may have made it in the meantime
                os.rename(partial, directory)  # which replaces an empty one
        except BaseException:
            _remove(partial)
            raise


def _remove(directory: epath.Path) -> None:
    """Removes a directory, for a second again and again if threads of Orbax may still write to it after a failure."""
    unfinished = any(directory.glob("*.orbax-checkpoint-tmp"))
    for _ in range(10 if unfinished else 1):
        with contextlib.suppress(OSError):
            directory.rmtree()
        time.sleep(0.1 * unfinished)
