"""Exit statuses and what is left behind, from real processes."""

import io
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console

from llava_jax import cli


def start(body: str, *args: str) -> subprocess.Popen:
    """A process whose `main()` has this body."""
    code = "import sys, time\nfrom pathlib import Path\nfrom llava_jax.cli import UserError, run\ndef main():\n"
    code += textwrap.indent(textwrap.dedent(body), "    ") + "\nrun(main)"
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise UserError('a.json: line 3:\\n is bad')", 1, "error: a.json: line 3: is bad\n"),
        ("open('/nowhere/at/all')", 1, "error: /nowhere/at/all: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_statuses_and_messages(body, status, message):
    process = start(body)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (status, message)


def test_sigterm_lets_main_clean_up(tmp_path):
    body = """
    try:
        Path(sys.argv[1]).touch()
        print("ready", flush=True)
        time.sleep(60)
    finally:
        Path(sys.argv[1]).unlink()
    """
    process = start(body, str(tmp_path / "partial"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not list(tmp_path.iterdir())


def test_the_bar_of_a_long_name_fits_80_columns():
    file = io.StringIO()
    name = f"writing /data/[bold]/{'long_name/' * 20}clean.json"
    with cli.progress_bar(Console(file=file, force_terminal=True, width=80)) as bar:
        bar.update(bar.add_task(name, total=665000), completed=123456)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue().replace("\r", "\n"))
    lines = [line for line in text.split("\n") if line.strip()]
    assert all(len(line) <= 80 for line in lines)
    assert re.fullmatch(r"123456/665000 \S+ left \S+ writing /data/\[bold\]/long_.*…", lines[-1].rstrip())


def test_elsewhere_lines_tell_how_many_and_the_time_left_first(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    assert list(cli.track("ab", "reading samples")) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == [
        "1/2, 0:00:10 left: reading samples",
        "2/2, 0:00:00 left: reading samples",
    ]
    clock = iter([0.0, 10.0])
    assert list(cli.track(iter("a"), "reading samples")) == ["a"]
    assert capsys.readouterr().err == "1/?, 10 s: reading samples\n"
