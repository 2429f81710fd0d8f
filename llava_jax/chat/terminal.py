"""The terminal of the chat: reads messages, keeps their history, and shows small copies of images."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from llava_jax.cli import UserError, say

QUOTES = '"""'  # around a message of several lines
HISTORY_LINES = 1000
UPPER_HALF = "▀"  # the foreground colour is the upper pixel, the background colour the lower one
MAX_COLUMNS, MAX_ROWS = 40, 12  # of an image


def messages() -> Iterator[str]:
    """Yields each line of standard input, or all lines between two QUOTES. Ctrl-C discards the current message."""
    while True:
        try:
            yield _message()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return


def _message() -> str:
    text = _line("> ").strip()
    if not text.startswith(QUOTES):
        return text
    text = text.removeprefix(QUOTES)
    with contextlib.suppress(EOFError):  # the end of the input also ends the message
        while not text.endswith(QUOTES):
            text += "\n" + _line("... ").rstrip()
    return text.removesuffix(QUOTES).strip()


def _line(prompt: str) -> str:
    """Reads a line. Prompts only on a terminal, and never into a file that the answers are redirected to."""
    if not sys.stdin.isatty():
        prompt = ""
    elif not sys.stdout.isatty():
        say(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8") from error


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Enables line editing, Tab completion of files, and the history of earlier sessions by arrow up and Ctrl-R."""
    if not sys.stdin.isatty():
        yield
        return
    import readline  # importing it changes `input`

    readline.parse_and_bind("tab: complete")
    readline.set_completer_delims(" \t\n")
    readline.set_history_length(HISTORY_LINES)
    file = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "llava_jax/chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(file)


def show(image: Image.Image, console: Console) -> None:
    """Prints a small copy of an RGB image, or nothing where the console lacks colours or half blocks."""
    colours = console.color_system in ("truecolor", "256") and not console.no_color
    if console.is_terminal and colours and console.encoding.startswith("utf"):
        console.print(half_blocks(image, min(MAX_COLUMNS, console.width), MAX_ROWS), end="")


def half_blocks(image: Image.Image, columns: int, rows: int) -> Text:
    """A copy of at most so many characters, each one pixel wide and two high."""
    scale = min(columns / image.width, 2 * rows / image.height, 1)
    width, height = (max(1, round(scale * side)) for side in image.size)
    height += height % 2
    pixels = image.resize((width, height), Image.Resampling.BOX).load()
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            above, below = (Color.from_rgb(*pixels[x, y + half]) for half in (0, 1))
            text.append(UPPER_HALF, Style(color=above, bgcolor=below))
        text.append("\n")
    return text
