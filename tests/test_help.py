"""Every command explains itself at once: nothing that takes seconds is imported before its arguments are known."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import llava_jax
from llava_jax import cli
from llava_jax.__main__ import COMMANDS as LLAVA
from llava_jax.__main__ import main as llava
from llava_jax.cli import UserError
from llava_jax.datagen.__main__ import COMMANDS as DATAGEN
from llava_jax.evaluate.__main__ import COMMANDS as EVALUATE
from llava_jax.evaluate.__main__ import main as evaluate
from llava_jax.evaluate.benchmarks import BENCHMARKS

NESTED = ["convert import", "evaluate score", "evaluate judge llava-bench", "datagen detail"]
OF_BENCHMARKS = [f"score {command.name}" for benchmark in BENCHMARKS.values() for command in benchmark.score_commands]
OF_BENCHMARKS += [
    f"{task} {name}"
    for name, benchmark in BENCHMARKS.items()
    for task in ("judge", "reference")
    if getattr(benchmark, task)
]
HEAVY = ["jax", "flax", "orbax", "grain", "transformers", "torch", "tensorstore", "matplotlib", "fastapi"]
# Module -> its subcommands, each the words before --help.
COMMANDS = {
    "llava_jax": [
        "",
        "data",
        *LLAVA,
        "convert import",
        "evaluate score",
        "evaluate judge llava-bench",
        "datagen detail",
    ],
    "llava_jax.main": [""],
    "llava_jax.preflight": [""],
    "llava_jax.plot": [""],
    "llava_jax.chat": [""],
    "llava_jax.serve": [""],
    "llava_jax.xla_flags": [""],
    "llava_jax.convert": ["", "import", "export", "verify", "copy", "merge", "copy-frozen"],
    "llava_jax.data.check": [""],
    "llava_jax.data.inspect": [""],
    "llava_jax.data.build": [""],
    "llava_jax.data.pack": [""],
    "llava_jax.datagen": ["", *DATAGEN],
    "llava_jax.evaluate": ["", *EVALUATE, *OF_BENCHMARKS, "questions"],
    "examples.easy_vqa.quickstart": [""],
    "examples.smollm2.recipe": [""],
    "examples.emoji.recipe": [""],
}
# Shows its own messages for each, and what of HEAVY was imported by then.
RUN = """
import contextlib, io, json, runpy, sys
sys.modules.pop("torch", None)  # which tests hide from the processes that they start
module, commands, heavy = json.loads(sys.argv[1])
for command in commands:
    sys.argv = [module, *command.split(), "--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit_:
        status = exit_.code or 0
    imported = [name for name in heavy if name in sys.modules]
    print(json.dumps([command, status, len(shown.getvalue().splitlines()), imported]))
"""


def test_the_list_is_of_all_commands():
    package = Path(__file__).parent.parent / "llava_jax"
    runnable = [file for file in package.rglob("*.py") if 'if __name__ == "__main__":' in file.read_text()]
    names = {".".join(file.relative_to(package.parent).with_suffix("").parts) for file in runnable}
    names = {name.removesuffix(".__main__") for name in names}
    assert names - {"llava_jax.hlo"} == {name for name in COMMANDS if name.startswith("llava_jax")}


@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_nothing_that_takes_seconds(module):
    arguments = json.dumps([module, COMMANDS[module], HEAVY])
    code = textwrap.dedent(RUN)
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True)
    assert done.stderr == ""
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [command for command, *_ in results] == COMMANDS[module]
    for command, status, lines, imported in results:
        assert (command, status, imported) == (command, 0, []) and lines > 3


def test_usage_names_the_command_that_was_typed(monkeypatch, capsys):
    monkeypatch.setattr(cli, "launcher", None)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/llava"])
    for command in [*LLAVA, *NESTED]:
        try:
            llava([*command.split(), "--help"])
        except SystemExit as exit_:
            assert exit_.code == 0
        shown = capsys.readouterr().out
        assert f"llava {command} " in shown and "python -m llava_jax." not in shown.replace("-m llava_jax.xla_", "")
    assert llava(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in LLAVA)
    assert llava(["--version"]) == 0 and capsys.readouterr().out == f"llava_jax {llava_jax.__version__}\n"


def test_a_word_that_is_no_command_is_named(capsys):
    with pytest.raises(UserError, match="^'trian --x' is no command"):
        llava(["trian", "--x"])
    assert llava([]) == 2 and capsys.readouterr().err.count("usage: ") == 2


def test_a_command_without_its_benchmark_is_an_error_that_names_it(capsys):
    with pytest.raises(UserError, match="^answers.jsonl: is no such benchmark; choose from hallusionbench, llava-b"):
        evaluate(["judge", "answers.jsonl"])
    with pytest.raises(UserError, match="^'questions answers.jsonl' is no command") as error:
        evaluate(["questions", "answers.jsonl"])
    assert error.value.status == 1
    assert "  questions scienceqa " in capsys.readouterr().err
