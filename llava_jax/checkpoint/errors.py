"""Errors of Orbax and TensorStore as a `UserError`: one line that says what to do."""

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from etils import epath

from llava_jax.checkpoint.format import STEPS, finished_steps
from llava_jax.cli import UserError
from llava_jax.files.reading import refuse_pointers_below
from llava_jax.models.config import REGISTER_FIRST


def mute_failures_of_orbax() -> None:
    """Drops what Orbax and TensorStore log of a failure that they also raise: a traceback in every thread that it
    passes, and warnings when the tasks and coroutines are collected that they leave behind."""
    of_orbax = re.compile("orbax|tensorstore").search
    logging.getLogger("absl").addFilter(lambda log: log.levelno < logging.WARNING or not of_orbax(log.pathname))
    logging.getLogger("asyncio").addFilter(lambda log: not of_orbax(log.getMessage()))
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    previous_unraisable, previous_uncaught = sys.unraisablehook, sys.excepthook

    def unraisable(found: Any) -> None:
        code = getattr(found.object, "cr_code", None)
        if not (code and "orbax" in code.co_filename) and str(found.exc_value) != "Event loop is closed":
            previous_unraisable(found)

    def uncaught(kind: type, error: BaseException, traceback: Any) -> None:
        if str(error) != "Event loop is closed":  # in a thread of TensorStore whose result is not used
            previous_uncaught(kind, error, traceback)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught


mute_failures_of_orbax()


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Around reading a checkpoint, or a step of a workdir: errors name the damaged array and what to use instead."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if REGISTER_FIRST in str(error):
            raise UserError(f"{path}: {error}") from error
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
