"""Errors of a recipe, or of flags that override its options, as one line."""

import difflib
import re
import runpy
import sysconfig
import traceback
from collections.abc import Sequence

from absl import flags

from llava_jax.cli import UserError
from llava_jax.recipes.options import flatten

# Errors whose message is clear without their type.
_PLAIN = (flags.Error, UserError, ValueError, ImportError, OSError, KeyError)
_LOCKED = re.compile(r'Key "(.*?)" does not exist(?:.*Did you mean "(.*?)")?', re.DOTALL)


def explain(error: Exception, argv: Sequence[str]) -> str:
    """One line for an error in parsing the flags `argv`, with the file and the line of the recipe that raised it."""
    return _unknown_key(argv) or _message(error, argv)


def recipe_file(argv: Sequence[str]) -> str:
    """The value of --config without the argument after the colon; "" if it is not given."""
    following = [*argv[1:], ""]
    files = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    files += [value for argument, value in zip(argv, following, strict=True) if argument == "--config"]
    return files[-1].partition(":")[0] if files else ""


def _message(error: Exception, argv: Sequence[str]) -> str:
    file, chain = recipe_file(argv), [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for raised in chain:  # Abseil raises its own error for one of the recipe
        if place := _place(raised):
            return f"{_text(raised)} ({place})"
        if isinstance(raised, SyntaxError):  # of the recipe itself, which was not run
            line = f", line {raised.lineno}" if raised.lineno else ""
            return f"{type(raised).__name__}: {raised.msg} ({raised.filename or file}{line})"
        if isinstance(raised, OSError) and raised.strerror:
            return f"{raised.filename or file}: {raised.strerror}"
    text = _text(error)
    if "no attribute 'get_config'" in text:
        return f"{file}: is no recipe: it has no function get_config"
    if "<class 'NoneType'>" in text:
        return f"{file}: get_config() returns no ConfigDict"
    return f"{file}: {text}" if text.startswith("get_config()") else text


def _text(error: BaseException) -> str:
    """The last line of the message: the lines before it are a traceback or a list of all keys."""
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if unknown := _LOCKED.search(message):
        return f"the config has no key {unknown[1]!r}" + (f"; the nearest is {unknown[2]!r}" if unknown[2] else "")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    name = "" if lines and isinstance(error, _PLAIN) else type(error).__name__
    return ": ".join(filter(None, [name, re.sub(r"^\w+Error: |^\[Errno \d+\] ", "", lines[-1]) if lines else ""]))


def _place(error: BaseException) -> str:
    """File and line of the recipe that raised it, or of a user's module that it calls; "" for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    read = [number for number, frame in enumerate(frames) if frame.filename.endswith("config_flags.py")]
    libraries = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))
    of_recipe = frames[read[-1] + 1 :] if read else []
    own = [frame for frame in of_recipe if not frame.filename.startswith(("<", *libraries))]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""


def _unknown_key(argv: Sequence[str]) -> str | None:
    """If an override sets an unknown key, a message with the most similar one."""
    keys = [argument[len("--config.") :].split("=")[0] for argument in argv if argument.startswith("--config.")]
    file = recipe_file(argv)
    if not file or not keys:
        return None
    try:
        config = flags.FLAGS["config"].value or runpy.run_path(file)["get_config"]()
        options = [key for key, _ in flatten(config.to_dict())]
    except Exception:  # the error is in the file itself
        return None
    known = [*options, *(key.rpartition(".")[0] for key in options if "." in key)]  # and sections
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            return f"the config has no key {key!r}; the nearest is {nearest!r}"
    return None
