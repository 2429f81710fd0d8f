"""Exit statuses and what is left behind, from real processes."""

import argparse
import importlib
import os
import pkgutil
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import llava_jax
from llava_jax import cli
from llava_jax.data import check
from llava_jax.datagen.generate import conversation
from llava_jax.evaluate import report


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


# ------------------------------------------------------------------------------------------------- paths

TEXTS = {"TEXT", "NAME", "MODEL", "M", "TYPE", "URL", "BENCH", "Q-A", "CODE", "ID", "HOST:PORT", "auto|words|MODEL"}
NO_METAVAR = {"--template", "--host", "--help", "--beam"}


class Captured(Exception):
    pass


def parsers(monkeypatch) -> dict[str, cli.Parser]:
    """The parser of every command, those below others included, by what it is called."""
    found = {}

    def capture(parser, *_):
        found[parser.prog] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update({each.prog: each for each in action.choices.values()})
        raise Captured

    monkeypatch.setattr(cli.Parser, "parse_args", capture)
    names = [module.name for module in pkgutil.walk_packages(llava_jax.__path__, "llava_jax.")]
    files = {name: Path(importlib.util.find_spec(name).origin).read_text() for name in names}
    assert [name for name, text in files.items() if re.search(r"ArgumentParser\(\n? *prog", text)] == []
    for name in [name for name, text in files.items() if "= Parser(" in text]:
        main = conversation if name == "llava_jax.datagen.generate" else importlib.import_module(name).main
        with pytest.raises(Captured):
            main([])
    return found


def test_every_option_of_every_command_is_known_to_be_a_path_or_not(monkeypatch):
    found = parsers(monkeypatch)
    assert len(found) > 24, found.keys()
    for prog, parser in found.items():
        assert isinstance(parser, cli.Parser)
        for action in parser._actions:
            path = action.metavar in cli.PATHS
            text = action.metavar in TEXTS or NO_METAVAR.intersection(action.option_strings)
            other = action.nargs == 0 or action.choices is not None or action.type not in (None, str)
            assert path or text or other, f"{prog} {action.option_strings}: is {action.metavar} a path?"
            default = action.default if isinstance(action.default, str) else ""
            assert path or os.sep not in default, f"{prog} {action.option_strings}"


def test_the_home_directory_is_meant(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    home = Path("home")
    (home / "images").mkdir(parents=True)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (home / "data.json").write_text(f'[{{"id": "1", "conversations": {turns!r}}}]'.replace("'", '"'))
    assert not check.main(["--json=~/data.json", "--images=~", "--report=~/report.json", "--fix", "~/fixed.json"])
    assert {file.name for file in home.iterdir()} >= {"data.json", "report.json", "fixed.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["home"]
    args = report._parse(["~/a", "~/b", "c~", "--output=~"])
    assert args.runs == [str(tmp_path / "home" / "a"), str(tmp_path / "home" / "b"), "c~"]
    assert args.output == str(tmp_path / "home")
