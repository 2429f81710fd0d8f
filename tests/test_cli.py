"""Exit statuses and what is left behind, from real processes."""

import signal
import subprocess
import sys
import textwrap

import pytest


def start(body: str, *args: str) -> subprocess.Popen:
    """A process whose `main()` has this body."""
    code = "import signal, sys\nfrom pathlib import Path\nfrom llava_jax.cli import UserError, run\ndef main():\n"
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
    _, told = process.communicate()
    assert (process.returncode, told) == (status, message)


def test_sigterm_lets_main_clean_up(tmp_path):
    body = """
    try:
        Path(sys.argv[1]).touch()
        print("ready", flush=True)
        signal.pause()
    finally:
        Path(sys.argv[1]).unlink()
    """
    process = start(body, str(tmp_path / "partial"))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143 and not list(tmp_path.iterdir())
