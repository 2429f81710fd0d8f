"""Errors of Orbax and TensorStore as a `UserError`: one line that says what to do."""

import contextlib
import re
from collections.abc import Iterator

from etils import epath

from llava_jax import quiet
from llava_jax.checkpoint.format import STEPS, finished_steps
from llava_jax.cli import UserError
from llava_jax.files.reading import refuse_pointers_below

quiet.mute_failures_of_orbax()


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Around reading a checkpoint, or a step of a workdir: errors name the damaged array and what to use instead."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refuse_pointers_below(path)
        raise damaged(path, _cause(error)) from error


@contextlib.contextmanager
def in_one_line(path: epath.Path, problem: str) -> Iterator[None]:
    """Turns errors of Orbax and TensorStore, which have any class and many lines, into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {problem} ({_cause(error)})") from error


def damaged(path: epath.Path, why: str) -> UserError:
    """The error for a checkpoint, or a step of a workdir, that cannot be read."""
    if path.parent.name != STEPS:
        return UserError(f"{path}: is damaged ({why}): import or copy it again")
    earlier = [step for step in finished_steps(path.parent) if step < int(path.name)]
    if not earlier:
        return UserError(f"{path}: this step is damaged ({why}), and it is the first one: train in another workdir")
    return UserError(
        f"{path}: this step is damaged ({why}): resume training from the one before with --resume-from {earlier[-1]}, "
        f"or give other commands {path.parent / str(earlier[-1])}"
    )


def _cause(error: BaseException) -> str:
    """The innermost cause of an error of Orbax, with the name of the array that TensorStore could not read."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = next(iter(str(error).splitlines()), "").partition(" [tensorstore_spec")[0]
    if array := re.search(r'([^"/]+)/(?:c(?:/\d+)*|zarr\.json)"', said):
        said = re.sub(r' (?:in OCDBT database )?at local file "[^"]*"', "", said)
        return f"{array[1]}: {said.rpartition(': ')[2][:200]}"
    return f"{type(error).__name__}: {said[:300]}"
