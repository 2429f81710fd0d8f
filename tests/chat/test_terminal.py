"""Messages of one line and of several, and pictures as half blocks where a terminal can show them."""

import io
import os
import pty
import select
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from llava_jax.chat import terminal
from llava_jax.cli import UserError


def type_in(monkeypatch, text: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return list(terminal.messages())


def test_a_message_is_a_line_or_what_stands_in_quotes(monkeypatch):
    text = ' one \n\n"""two\n  lines  \n"""\n"""three\n\nfour"""\n"""five"""\n"six"\n"""the end\nis missing'
    assert type_in(monkeypatch, text) == [
        "one",
        "",
        "two\n  lines",
        "three\n\nfour",
        "five",
        '"six"',
        "the end\nis missing",
    ]


def test_input_that_is_no_text_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(terminal.messages())


def test_half_blocks_are_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    text = terminal.half_blocks(Image.fromarray(pixels), 5, 3)
    assert text.plain == ("▀" * 5 + "\n") * 3
    for row in range(3):
        for column, span in enumerate(text.spans[5 * row : 5 * row + 5]):
            assert tuple(span.style.color.triplet) == tuple(pixels[2 * row, column])
            assert tuple(span.style.bgcolor.triplet) == tuple(pixels[2 * row + 1, column])


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (640, 480), (3, 7)])
def test_half_blocks_keep_within_their_bounds(size):
    lines = terminal.half_blocks(Image.new("RGB", size), 40, 12).plain.splitlines()
    assert 1 <= len(lines) <= 12
    assert 1 <= len(lines[0]) <= 40


@pytest.mark.parametrize(
    "environment, shown",
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm"}, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
    ],
)
def test_a_picture_is_shown_where_the_terminal_has_its_colours(environment, shown):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    file = Terminal(io.BytesIO(), encoding="utf-8")
    terminal.show(Image.new("RGB", (4, 4), "red"), Console(file=file, _environ=environment))
    file.seek(0)
    assert ("▀" in file.read()) == shown


def test_a_picture_is_not_shown_in_a_file():
    file = io.StringIO()
    terminal.show(Image.new("RGB", (4, 4)), Console(file=file, _environ={"TERM": "xterm-256color"}))
    assert file.getvalue() == ""


def test_lines_of_earlier_sessions_come_back(tmp_path):
    """On a terminal of its own: arrow up finds what another process was told; several pasted lines are one message."""
    program = "from llava_jax.chat import terminal\nwith terminal.history(): print([m for m in terminal.messages()])"

    def talk(keys: bytes) -> str:
        keyboard, screen = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "INPUTRC": "/dev/null"}
        process = subprocess.Popen([sys.executable, "-c", program], stdin=screen, stdout=screen, env=environment)
        os.close(screen)
        seen = _read_until(keyboard, b"> ")
        os.write(keyboard, keys)
        seen = _read_until(keyboard, b"]\r\n")
        os.close(keyboard)
        assert process.wait() == 0
        return seen.decode()

    assert "['first', 'second']" in talk(b"first\rsecond\r\x04")
    assert "['first', 'two\\nlines']" in talk(b"\x1b[A\x1b[A\r\x1b[200~two\rlines\x1b[201~\r\x04")
    assert (tmp_path / "llava_jax/chat_history").read_text().startswith("first\nsecond\nfirst\n")


def _read_until(file: int, end: bytes) -> bytes:
    seen = b""
    while not seen.endswith(end) and select.select([file], [], [])[0]:
        seen += os.read(file, 4096)
    return seen
