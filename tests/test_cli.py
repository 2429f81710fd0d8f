"""Exit statuses and what is left behind, from real processes."""

import argparse
import ast
import importlib
import io
import os
import pkgutil
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

import llava_jax
from llava_jax import cli
from llava_jax.data import check
from llava_jax.data.records import scan
from llava_jax.datagen.generate import conversation
from llava_jax.evaluate import judge, report, score, tables
from llava_jax.evaluate.benchmarks import BENCHMARKS


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
        (
            "raise type('JaxRuntimeError', (RuntimeError,), {})('RESOURCE_EXHAUSTED: Out of memory: 9 GiB\\nHLO')",
            1,
            f"error: a device is out of memory: RESOURCE_EXHAUSTED: Out of memory: 9 GiB; {cli.LESS_MEMORY}\n",
        ),
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


# ------------------------------------------------------------------------------------------------- paths

TEXTS = {
    "TEXT",
    "KEY=VALUE",
    "NAME",
    "MODEL",
    "M",
    "TYPE",
    "URL",
    "BENCH",
    "Q-A",
    "CODE",
    "ID",
    "HOST:PORT",
    "auto|words|MODEL",
}
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
    monkeypatch.setattr(cli.Parser, "parse_known_args", capture)
    names = [module.name for module in pkgutil.walk_packages(llava_jax.__path__, "llava_jax.")]
    files = {name: Path(importlib.util.find_spec(name).origin).read_text() for name in names}
    assert [name for name, text in files.items() if re.search(r"ArgumentParser\(\n? *prog", text)] == []
    for name in [name for name, text in files.items() if "= Parser(" in text]:
        main = conversation if name == "llava_jax.datagen.generate" else importlib.import_module(name).main
        with pytest.raises(Captured):
            main([])
    commands = [(score.main, name) for name in score.OWN]
    commands += [(judge.main, name) for name, benchmark in BENCHMARKS.items() if benchmark.judge]
    commands += [(judge.reference, name) for name, benchmark in BENCHMARKS.items() if benchmark.reference]
    for command, name in commands:
        with pytest.raises(Captured):
            command([name])
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


def test_the_number_of_records_of_a_file_is_estimated_from_the_part_that_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n' * 4)
    clock = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    assert len(list(scan(tmp_path / "lines.jsonl", "lines.jsonl", show="reading lines"))) == 4
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("1/4, 0:00:30 left: reading lines", "4/4, 0:00:00 left: reading lines")


def test_tables_and_lines_fit_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    head = f"{'target':<12}{'rows':>30}{'time':>30}{'cost':>30}"
    table = cli.narrowed([head, head.replace("time", "4.12")], beside=12, cut=72)
    assert [line.split() for line in table] == [
        ["target", "rows", "time"], ["target", "rows", "4.12"], [], ["target", "cost"], ["target", "cost"]
    ]  # fmt: skip
    cells = [["benchmark", "category", *("a rather long name of a run",) * 4], ["quiz", "all", *"1234"]]
    lines = tables.aligned(cells, left=2).split("\n")
    assert [line.split()[-1] for line in lines if "quiz" in line] == ["2", "4"]
    text = cli.wrapped(f"time       {'a second ' * 30}\n\n  compute{'1.0':>9}")
    first, second, *_, last = text.split("\n")
    assert (
        first.startswith("time       a second")
        and second.startswith(" " * 11 + "second")
        and last.endswith("compute      1.0")
    )
    assert max(map(len, [*table, *lines, *text.split("\n")])) <= 80
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert cli.wrapped("a " * 100) == "a " * 100  # in a file or a pipe, whose readers look for lines


def test_bars_are_drawn_on_terminals_only(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in the cells of notebooks
    console = Console(file=io.StringIO())
    assert console.is_terminal and not cli.draws_bars(console)


def test_what_standard_output_lacks_is_escaped(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    shown, told = start("print('red \\u7ea2 \\u27e6a\\u27e7')").communicate(timeout=60)
    assert (shown, told) == ("red \\u7ea2 \\u27e6a\\u27e7\n", "")


@given(st.text() | st.text(st.sampled_from(tiny.ESCAPES + "ab\n\t"))
       | st.text(st.characters(categories=["Cc", "Cf"])))  # fmt: skip
@example(tiny.ESCAPES)
def test_what_a_terminal_obeys_is_shown_as_escapes(text):
    told = cli.printable(text)
    assert not tiny.obeyed(told) and told.count("\n") == text.count("\n")
    assert "".join(map(cli.printable, text)) == told, "pieces are the same as the whole"
    assert text.isprintable() is False or told == text
    line = cli.one_line(text)
    assert not tiny.obeyed(line) and "\n" not in line and len(line) <= cli.MAX_MESSAGE + 5
    plain = "".join(c for c in text if not tiny.obeyed(c) and c not in "\u202a\u202b\u202c\u202d\u2067\u2068\u2069")
    assert cli.printable(plain) == plain, "nothing else changes"


def test_escapes_are_visible():
    assert cli.printable("a\x1b]0;x\x07\x9b\u202e\r\n\té") == "a\\x1b]0;x\\x07\\x9b\\u202e\\r\n\té"


@pytest.mark.parametrize(
    "body",
    [
        "raise UserError(sys.argv[1])",
        "open(sys.argv[1])",
        "raise RuntimeError(sys.argv[1])",
        "from llava_jax.cli import track\nlist(track(range(2), sys.argv[1], every=0))",
        "from llava_jax.cli import Parser\nParser().parse_args([sys.argv[1]])",
        "from llava_jax.cli import say\nsay(sys.argv[1])",
    ],
)
def test_what_ends_a_command_is_printed_with_visible_escapes(body):
    out, err = start(body, f"name{tiny.ESCAPES}").communicate()
    assert not tiny.obeyed(out + err) and "name\\x1b[31m" in out + err


def test_long_messages_are_bounded_and_keep_their_end():
    _, told = start("raise UserError('a' * 10**6 + ': mend it')").communicate()
    assert len(told) < 5000 and told.startswith("error: aaa") and told.endswith(" ... " + "a" * 1991 + ": mend it\n")


def test_nothing_prints_what_others_wrote_but_through_the_helper():
    """`print` itself prints texts of ours and JSON, which has escapes of its own."""

    def ours(node: ast.expr) -> bool:
        match node:
            case ast.Constant() | ast.Name(id="__doc__" | "HELP"):
                return True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="json"), attr="dumps")):
                return True
            case ast.Call(func=ast.Name(id="printable" | "_help")):
                return True
            case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, right=other):
                return ours(one) and (ours(other) or isinstance(node, ast.BinOp))
        return False

    for file in sorted(Path(llava_jax.__file__).parent.rglob("*.py")):
        if file.name in ("cli.py",):  # the helper
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert all(map(ours, node.args)), f"{file}:{node.lineno}: use say"
