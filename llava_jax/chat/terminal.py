"""What the terminal chat has of the terminal: messages as they are typed, their history, small copies of pictures."""

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
UPPER_HALF = "▀"  # its colour is the pixel above, its background the one below
COLUMNS, ROWS = 40, 12  # of a picture, at most


def messages() -> Iterator[str]:
    """Each line of standard input, or all lines between two QUOTES, until it ends. Ctrl-C begins a message anew."""
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
    with contextlib.suppress(EOFError):  # the end of the input is the end of the message, too
        while not text.endswith(QUOTES):
            text += "\n" + _line("... ").rstrip()
    return text.removesuffix(QUOTES).strip()


def _line(prompt: str) -> str:
    """Prompts on a terminal alone, and never into a file that the answers go to."""
    if not sys.stdin.isatty():
        prompt = ""
    elif not sys.stdout.isatty():
        say(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except UnicodeDecodeError as error:
        raise UserError("standard input is no UTF-8") from error


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Lets lines be edited, files be completed by Tab, and earlier sessions' lines be found by arrow up and Ctrl-R."""
    if not sys.stdin.isatty():
        yield
        return
    import readline  # which takes over `input` where it is imported

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
    """Prints a small copy of an RGB picture, or nothing where the console lacks its colours or half blocks."""
    shades = console.color_system in ("truecolor", "256") and not console.no_color
    if console.is_terminal and shades and console.encoding.startswith("utf"):
        console.print(half_blocks(image, min(COLUMNS, console.width), ROWS), end="")


def half_blocks(image: Image.Image, columns: int, rows: int) -> Text:
    """A copy in characters one pixel wide and two high, at most that many."""
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
