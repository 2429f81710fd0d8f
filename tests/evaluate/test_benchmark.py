"""Benchmarks and label formats are registered objects: the docs list them, and a user's module adds others."""

import json
import sys
from pathlib import Path

import pytest

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmark import Benchmark, register
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.label_formats import LABEL_FORMATS, LabelFormat, formats_of

PLUGIN = """
from llava_jax.evaluate.benchmark import Benchmark, register
from llava_jax.evaluate.benchmarks.exact import Label
from llava_jax.evaluate.label_formats import LABEL_FORMATS, Entry, LabelFormat

def read(path):
    for number, line in enumerate(open(path).read().splitlines(), 1):
        ident, _, answer = line.partition(";")
        yield Entry(ident, Label((answer,)), f"{path}: line {number}")

LABEL_FORMATS.add(LabelFormat("semicolons", "id;answer", ("exact", "length"), read))

@register
class Length(Benchmark):
    name, what = "length", "Length: letters of right answers"

    def score(self, pairs):
        return {"accuracy": 100.0, "letters": sum(len(answer.text) for answer, label in pairs)}
"""


def test_the_docs_have_a_row_for_each_benchmark():
    rows = [line for line in Path("docs/evaluation.md").read_text().splitlines() if line.startswith("| `")][1:]
    expected = [
        f"| `{name}` | {benchmark.what} | "
        f"{'; '.join(form.what for form in formats_of(name)) or benchmark.label_files} |"
        for name, benchmark in BENCHMARKS.items()
    ]
    assert sorted(rows[: len(expected)]) == sorted(expected)


def test_a_benchmark_and_a_label_format_of_a_users_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "labels.txt").write_text("1;red\n2;green\n")
    (tmp_path / "answers.json").write_text(json.dumps({"1": "Red.", "2": "blue"}))
    files = [f"--answers={tmp_path / 'answers.json'}", f"--labels={tmp_path / 'labels.txt'}", "--json"]
    outcomes = tmp_path / "length.outcomes.jsonl"
    try:
        evaluate.main(["score", "my_plugin:length", *files, f"--outcomes={outcomes}"])
        assert json.loads(capsys.readouterr().out) == {"accuracy": 100.0, "letters": 8}
        assert len(outcomes.read_text().splitlines()) == 2
        evaluate.main(["score", "exact", *files, "--label-format=my_plugin:semicolons"])
        assert json.loads(capsys.readouterr().out) == {"accuracy": 50.0, "total": 2}
        evaluate.main(["score", "exact", *files])  # the format that was registered last reads the file
        assert json.loads(capsys.readouterr().out) == {"accuracy": 50.0, "total": 2}
    finally:
        BENCHMARKS.pop("length", None)
        LABEL_FORMATS.pop("semicolons", None)
        sys.modules.pop("my_plugin", None)
    with pytest.raises(UserError, match="^no_module:x: No module named 'no_module'; PYTHONPATH says"):
        evaluate.main(["score", "no_module:x", *files])
    with pytest.raises(UserError, match="^other: is no such label format; choose from "):
        evaluate.main(["score", "exact", *files, "--label-format=other"])


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="benchmark 'pope' is registered already"):

        @register
        class Pope(Benchmark):
            name, what = "pope", "another one"

    with pytest.raises(ValueError, match="label format 'pope' is registered already"):
        LABEL_FORMATS.add(LabelFormat("pope", "another one", ("pope",), iter))
