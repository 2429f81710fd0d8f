"""The flag --config, a recipe, and the flags that override its options: parsed, with every error as one line."""

import difflib
import itertools
import re
import runpy
import sysconfig
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from llava_jax import recipes
from llava_jax.cli import UserError, expand_home
from llava_jax.recipes.options import flatten

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe, by name or path, with its argument after a colon: finetune:13b, my/recipe.py."
)
# Errors whose message is clear without their type.
_PLAIN = (flags.Error, UserError, ValueError, ImportError, OSError, KeyError)
_LOCKED = re.compile(r'Key "(.*?)" does not exist(?:.*Did you mean "(.*?)")?', re.DOTALL)


def parse_flags(argv: list[str], required: Sequence[flags.FlagHolder]) -> None:
    """Parses the flags, with `~` expanded in paths. Raises UserError, one line, for every mistake."""
    argv, file = _find_recipe([_expand_home(argument) for argument in argv])
    try:
        remaining = flags.FLAGS(argv)
        missing = [f"--{flag.name}" for flag in required if flag.value is None]
        if file:
            if CONFIG.value is not None:
                CONFIG.value.keys()  # raises the error of a file that cannot be read
            if not isinstance(CONFIG.value, ConfigDict):
                raise UserError(f"{file}: get_config() returns no ConfigDict")
            recipes.expand_paths(CONFIG.value)
    except Exception as error:  # a recipe may raise any
        raise UserError(_unknown_key(argv, file) or _message(error, file)) from None
    if len(remaining) > 1:
        raise UserError(f"unexpected argument {remaining[1]!r}: every option begins with --")
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; see --help")


def _find_recipe(argv: list[str]) -> tuple[list[str], str]:
    """The arguments, with `--config NAME` and `--config=NAME` as `--config=PATH` of the recipe, and its file."""
    found, file, arguments = [], "", iter(argv)
    for argument in arguments:
        if argument in ("--config", "-config"):
            argument = "=".join((argument, *itertools.islice(arguments, 1)))
        if match := re.match(r"--?config=(?=.)", argument):
            recipe = recipes.find(argument[match.end() :])
            file, argument = recipe.partition(":")[0], f"--config={recipe}"
        found.append(argument)
    return found, file


def _expand_home(argument: str) -> str:
    """`~/D`, `--workdir=~/D` and `-workdir=~/D` with the home directory. No flag is a text that begins with `~` but is
    no path."""
    flag, path = re.fullmatch(r"(--?[\w.]+=)?(.*)", argument, re.DOTALL).groups()
    return (flag or "") + expand_home(path)


def _message(error: Exception, file: str) -> str:
    """One line for an error in parsing the flags, with the file and the line of the recipe that raised it."""
    chain = [error]
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


def _unknown_key(argv: Sequence[str], file: str) -> str | None:
    """If an override sets an unknown key, a message with the most similar one."""
    keys = [argument[len("--config.") :].split("=")[0] for argument in argv if argument.startswith("--config.")]
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
