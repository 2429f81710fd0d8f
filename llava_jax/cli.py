"""What every command shares: its environment, one-line errors, exit statuses and progress."""

import argparse
import contextlib
import datetime
import functools
import glob
import importlib.util
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from llava_jax import quiet, remote

Item = TypeVar("Item")

COMMAND = "LLAVA_JAX_COMMAND"  # set in the processes of a command, so in its workers too
# Where Linux has none of these, there is no accelerator. libtpu and the CUDA plugin may be installed all the same, only
# to compile for hardware you don't have: JAX would look for their devices, log a page, and use the CPU in the end.
DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")

MAX_VALUE = 80  # characters of a value from a file in a message
MAX_MESSAGE = 4000  # characters
# Characters that terminals interpret: C0 except tab and newline, DEL, C1, and overrides of the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


LESS_MEMORY = (
    "compute fewer rows at a time: config.max_rows_per_device in training (python -m llava_jax.preflight finds how "
    "many fit), or --batch-rows, --slots or --context"
)


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do."""

    status = 1  # of the command that it ends


def printable(text: str) -> str:
    """The text with control characters as visible escapes, such as `\\x1b`: ids, texts and file names from outside can
    hold anything. Each character is escaped by itself, so a text may be passed in parts."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """A message as one printable line. The middle of a line longer than `MAX_MESSAGE` is left out."""
    line = printable(" ".join(text.split()))
    half = MAX_MESSAGE // 2
    return f"{line[:half]} ... {line[-half:]}" if len(line) > MAX_MESSAGE else line


def short(text: str, most: int = MAX_VALUE) -> str:
    """A text from a file, such as an id, shortened for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """The `repr` of any value, shortened for a message."""
    return short(repr(value[:MAX_VALUE] if isinstance(value, str) else value))


def say(*values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """`print` for text that may come from outside: see `printable`."""
    print(printable(sep.join(map(str, values))), end=end, file=file, flush=flush)


def warn(message: str) -> None:
    """Prints a warning in one line to standard error."""
    print(f"warning: {one_line(message)}", file=sys.stderr)


@functools.cache
def warn_once(message: str) -> None:
    """The same for what is checked several times, such as a configuration in a search."""
    warn(message)


def has_accelerator() -> bool:
    return sys.platform != "linux" or any(glob.glob(pattern) for pattern in DEVICE_FILES)


def prepare() -> None:
    """Sets up the process of a command: the platform of JAX, and libraries that log less. Call it before JAX is
    imported. The library itself never does this: environment and import hooks are up to the program that imports it.
    """
    if not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if (jax := sys.modules.get("jax")) and not jax.config.jax_platforms:
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    # Without torch, transformers logs at every start that its models are missing. Only its tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')  # see `remote.name`
    os.environ[COMMAND] = "1"
    quiet.install()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits.

    The status is 0 or what `main` returns; that of a `UserError` or 1 for an error of the system, printed in one line,
    or for a bug, with its traceback; 130 for Ctrl-C; 143 for SIGTERM, which lets `main` clean up as Ctrl-C does.
    """
    prepare()
    if hasattr(sys.stdout, "reconfigure"):  # characters that a log or terminal cannot encode are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = main()
    except (KeyboardInterrupt, Exception) as error:
        status, _ = report(error)
    sys.exit(status or 0)


def report(error: BaseException) -> tuple[int, str]:
    """Prints the error that ends a command, in one line unless it is a bug. Returns the exit status and that line."""
    match error:
        case SystemExit():
            return (error.code if isinstance(error.code, int) else 1), f"left with status {error.code}"
        case KeyboardInterrupt():
            status, message = 130, "interrupted"
        case BrokenPipeError():  # the output is piped to a command that ended, such as `head`
            sys.stderr.close()
            return 1, "the reader of its output left"
        case UserError():
            status, message = error.status, f"error: {one_line(str(error))}"
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            status, message = 1, f"error: {one_line(where + (error.strerror or str(error)))}"
        case Exception() if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
            said = str(error).partition("\n")[0]
            status, message = 1, f"error: a device is out of memory: {one_line(said)}; {LESS_MEMORY}"
        case _:
            say("".join(traceback.format_exception(error)), end="", file=sys.stderr)
            return 1, f"{type(error).__name__}: {one_line(str(error))}"
    print(message, file=sys.stderr)
    return status, message.removeprefix("error: ")


launcher: str | None = None  # what starts every command: `llava`, or None where each is a module of its own


def as_typed(text: str) -> str:
    """A text that names commands as modules (`python -m llava_jax.data.check`), as the user types them: `llava data
    check`."""
    if launcher is None:
        return text
    text = text.replace("python -m llava_jax.main", f"{launcher} train")
    return re.sub(
        r"python -m llava_jax\.(\w+(?:\.\w+)?)",
        lambda found: f"{launcher} {re.sub('[._]', lambda c: ' ' if c[0] == '.' else '-', found[1])}",
        text,
    )


def dispatch(
    program: str,
    description: str,
    commands: Mapping[str, tuple[str, str]],
    argv: Sequence[str] | None,
    unknown: int = UserError.status,
) -> int | None:
    """Calls the command that the first words of `argv` name, with those that follow.

    `commands` maps what is typed to its function (`module:function`, or a module whose `main` is called) and to what it
    does. The module is imported only then. Prints the list of commands for `--help`, and where none is named. `unknown`
    is the exit status for a name that is none of them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in commands:
            module, _, function = commands[name][0].partition(":")
            return getattr(importlib.import_module(module), function or "main")(argv[words:])
    named = any(" " in name for name in commands)  # `X --help` lists the commands `X Y`, too
    asked = bool({"-h", "--help"}.intersection(argv if named else argv[:1]))
    width = 2 + max(map(len, commands))
    lines = [f"usage: {as_typed(program)} COMMAND ... (COMMAND --help has its options)", "", description, ""]
    lines += [f"  {name:<{width}}{what}" for name, (_, what) in commands.items()]
    say("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    if argv and not asked:
        error = UserError(f"{' '.join(argv[:2])!r} is no command: see those above")
        error.status = unknown
        raise error
    return 0 if asked else 2


PATHS = ("D", "DIR", "F", "FILE", "OUT")  # metavars of options that are paths


class Parser(argparse.ArgumentParser):
    """Parses the options of a command.

    Options whose metavar is one of `PATHS` may begin with `~`: shells expand it in `--output ~/file`, but not in
    `--output=~/file`. Descriptions and examples keep their line breaks.
    """

    def __init__(self, **settings: Any):
        texts = {name: as_typed(settings[name]) for name in ("prog", "description", "epilog") if settings.get(name)}
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | settings | texts)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.metavar in PATHS:
                setattr(parsed, action.dest, expand_home(getattr(parsed, action.dest)))
                remote.name(getattr(parsed, action.dest))
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def expand_home(value: Any) -> Any:
    """The value with `~` at the beginning of paths replaced by the home directory."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, Path):
        return value.expanduser()
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    return {key: expand_home(each) for key, each in value.items()} if isinstance(value, dict) else value


def positive(text: str) -> int:
    """The type of options that count something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


WIDTH = 80  # columns of a progress line without a terminal


class _Description(ProgressColumn):
    """The description, in the rest of the line."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


def progress_bar(console: Console | None = None) -> Progress:
    """The progress bar of every long command: items done, in all and time left come first."""
    return Progress(
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        BarColumn(bar_width=10),
        _Description(table_column=Column()),
        console=console or Console(stderr=True),
    )


def draws_bars(console: Console) -> bool:
    """Whether a bar is drawn anew in its place: on terminals, and in notebooks that have ipywidgets.

    Where FORCE_COLOR is set, as in the cells of notebooks, rich takes any file for a terminal.
    """
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and console.file.isatty()


def time_left(seconds: float) -> str:
    """`1:23:45`, as in the progress bar."""
    return str(datetime.timedelta(seconds=math.ceil(seconds)))


def fitting(parts: Iterable[str], width: int) -> str:
    """The first part and as many others as fit in a line of `width` columns, separated by two spaces."""
    line, *others = parts
    for part in others:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


def columns(file: TextIO | None = None) -> int | None:
    """The columns of the terminal that a file (standard output) is; None for another file."""
    return shutil.get_terminal_size().columns if (file or sys.stdout).isatty() else None


def wrapped(text: str, file: TextIO | None = None) -> str:
    """A text of lines that begin with a label, for a terminal: what does not fit continues below, right of the label.
    Other files get the lines as they are."""
    if (width := columns(file)) is None:
        return text
    lines, whole = [], {"break_on_hyphens": False, "break_long_words": False}  # paths and flags can be copied
    for line in text.split("\n"):
        indent = " " * min(len(re.match(r"\s*\S+\s{2,}|\s*", line)[0]), width // 2)
        lines += textwrap.wrap(line, width, subsequent_indent=indent, replace_whitespace=False, **whole) or [""]
    return "\n".join(lines)


def narrowed(table: list[str], beside: int, cut: int) -> list[str]:
    """The lines of a table, the first of which is its head. Where the terminal is too narrow, what follows character
    `cut` stands below, beside the first `beside` characters of each line."""
    if not (width := columns()) or max(map(len, table)) <= width:
        return table
    return [*(line[:cut].rstrip() for line in table), "", *(line[:beside] + line[cut:] for line in table)]


def track(
    iterable: Iterable[Item],
    description: str,
    total: int | None = None,
    every: float = 10.0,
    share: Callable[[Item], float] | None = None,
) -> Iterator[Item]:
    """Yields the items, with a progress bar on a terminal or in a notebook, else a line every `every` seconds.

    Where their number isn't known, `share` gives the part of the whole that is done with an item, such as the part of a
    file that is read; the total is estimated from it.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    description, console = one_line(description), Console(stderr=True)
    start = last = time.monotonic()
    with progress_bar(console) if draws_bars(console) else contextlib.nullcontext() as bar:
        task = bar.add_task(description, total=total) if bar else None
        for done, item in enumerate(bar.track(iterable, total, task_id=task) if bar else iterable, 1):
            yield item
            now = time.monotonic()
            if now - last < (1.0 if bar else every):
                continue
            last, known = now, total
            if share:
                known = max(done, round(done / max(share(item), 1e-6)))
            if not bar:
                left = f"{time_left((now - start) / done * (known - done))} left" if known else f"{now - start:.0f} s"
                print(f"{done}/{known or '?'}, {left}: {description}", file=sys.stderr, flush=True)
            elif share:
                bar.update(task, total=known)
        if bar and share:
            bar.update(task, total=bar.tasks[0].completed)


if COMMAND in os.environ:  # a worker, in which nothing calls `prepare`
    quiet.install()
