"""Tables: XLSX reads as the TSV of the same rows, and what is wrong with one is told."""

import contextlib
import datetime
import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import sheets
from llava_jax.evaluate.sheets import read_sheet

ROWS = [
    ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "prediction"],
    [3, "Which?", None, "cat", "dog", None, None, "A", "one", "A"],
    [1000003, "Which?", None, "dog", "cat", None, None, "B", "one", "B."],
    [5, "How many?", None, 2, 3.0, True, None, "C", "two", "A"],
]


def xlsx(path: Path, rows: list[list[Any]]) -> str:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return str(path)


def tsv(path: Path, rows: list[list[Any]]) -> str:
    texts = ("\t".join("" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in row)
             for row in rows)  # fmt: skip
    path.write_text("\n".join(texts) + "\n")
    return str(path)


WRITERS = {"xlsx": xlsx, "tsv": tsv}


@pytest.mark.parametrize("labels", WRITERS)
@pytest.mark.parametrize("answers", WRITERS)
def test_mmbench_of_a_table_of_predictions(tmp_path: Path, capsys, labels: str, answers: str):
    """As VLMEvalKit writes it: what was said beside what is right, which is not taken for what was said."""
    predicted = WRITERS[answers](tmp_path / f"model_MMBench.{answers}", ROWS)
    own = WRITERS[labels](tmp_path / f"mmbench.{labels}", [row[:-1] for row in ROWS])
    evaluate.main(["score", "mmbench", f"--answers={predicted}", f"--labels={own}", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "circular": 50.0, "single": 66.67, "by_category": {"one": 100.0, "two": 0.0}, "questions": 2, "total": 3,
        "failed": 0,
    }  # fmt: skip


def test_rows_are_those_of_the_tsv(tmp_path: Path):
    first, second = (WRITERS[kind](tmp_path / f"a.{kind}", ROWS) for kind in WRITERS)
    texts = [[line.value for line in read_sheet(path)] for path in (first, second)]
    assert texts[1] == [{name: value or "" for name, value in row.items()} for row in texts[0]]
    assert texts[1][2]["A"] == "2" and texts[1][2]["B"] == "3"
    assert [line.where.rpartition(": ")[2] for line in read_sheet(first)] == ["row 2", "row 3", "row 4"]


@pytest.mark.parametrize("kind", WRITERS)
def test_an_empty_cell_is_no_answer(tmp_path: Path, capsys, kind: str):
    path = WRITERS[kind](tmp_path / f"a.{kind}", [ROWS[0], ROWS[1], [*ROWS[2][:-1], None], ROWS[3]])
    evaluate.main(["score", "mmbench", f"--answers={path}", f"--labels={path}", "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert (scores["circular"], scores["single"], scores["total"], scores["empty"]) == (0.0, 33.33, 3, 1)


def test_the_upload_of_mmbench_is_scored(tmp_path: Path, capsys):
    """What `submission` writes is what `score` reads."""
    image = ["image", "Y2F0", "Y2F0", "Y2F0"]
    own = tsv(tmp_path / "mmbench.tsv", [[*row[:-1], cell] for row, cell in zip(ROWS, image, strict=True)])
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"question_id": row[0], "text": row[-1]}) + "\n" for row in ROWS[1:]))
    upload = str(tmp_path / "upload.xlsx")
    evaluate.main(["submission", "mmbench", f"--answers={answers}", f"--labels={own}", f"--output={upload}"])
    capsys.readouterr()
    evaluate.main(["score", "mmbench", f"--answers={upload}", f"--labels={own}", "--json"])
    assert json.loads(capsys.readouterr().out)["single"] == 66.67


@given(st.lists(st.text(st.characters(exclude_characters="\r"), max_size=9), min_size=1, max_size=4))
@example(["=1+1", "+1", "-1", "@SUM(A1)", "\tx ", " \n", "#N/A", '=HYPERLINK("http://x","a")', "http://x", "_x0041_"])
def test_texts_are_written_as_texts_and_read_back(tmp_path_factory, texts: list[str]):
    path = tmp_path_factory.mktemp("sheet") / "a.xlsx"
    path.write_bytes(sheets.xlsx([["index", "prediction"], *enumerate(texts)]))
    held = [re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", text) for text in texts]
    assert [line.value["prediction"] or "" for line in read_sheet(path)] == held
    with zipfile.ZipFile(path) as file:
        assert b"<f>" not in file.read("xl/worksheets/sheet1.xml")


def test_a_text_that_no_cell_holds_is_refused_and_not_cut_off(tmp_path: Path):
    file = tmp_path / "file.xlsx"
    file.write_bytes(sheets.xlsx([["text"], ["x" * 32_767]]))
    assert [line.value for line in read_sheet(file)] == [{"text": "x" * 32_767}]
    with pytest.raises(UserError, match=r"row 2: 'x+\.\.\.' has 32,768 characters, but a cell of Excel holds"):
        sheets.xlsx([["text"], ["x" * 32_768]])


def test_a_submission_holds_no_formulas(tmp_path: Path):
    (tmp_path / "q.tsv").write_text("index\tquestion\thint\tA\tB\timage\n1\t=1+1\t\ta\tb\t\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question_id": 1, "text": '=HYPERLINK("http://x","A")'}))
    given = [f"--answers={tmp_path}/a.jsonl", f"--labels={tmp_path}/q.tsv", f"--output={tmp_path}/u.xlsx"]
    evaluate.main(["submission", "mmbench", *given])
    (line,) = read_sheet(tmp_path / "u.xlsx")
    assert (line.value["question"], line.value["prediction"]) == ("=1+1", '=HYPERLINK("http://x","A")')
    with zipfile.ZipFile(tmp_path / "u.xlsx") as file:
        assert b"<f>" not in file.read("xl/worksheets/sheet1.xml")


@pytest.mark.parametrize(
    "cells, message",
    [
        ('<row r="99999999999"><c r="A99999999999"><v>1</v></c></row>', "has more than 100,000 cells"),
        (
            "".join(f'<row r="{n}"><c r="ZZZ{n}"><v>1</v></c></row>' for n in range(3, 23)),
            "has more than 100,000 cells",
        ),
        (" " * 300 * 2**20, "is larger than 256 MiB once it is unpacked"),
    ],
)
def test_what_would_not_fit_in_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch, cells: str, message: str
):
    monkeypatch.setattr(sheets, "MAX_CELLS", 100_000)
    path = Path(xlsx(tmp_path / "a.xlsx", [["index", "prediction"], [1, "A"]]))
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    parts[sheet] = parts[sheet].replace(b"</sheetData>", cells.encode() + b"</sheetData>")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in parts.items():
            file.writestr(name, part)
    with pytest.raises(UserError, match=f"a.xlsx: is no Excel file .*: it {message}"):
        read_sheet(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=4))
def test_damaged_bytes_end_in_rows_or_in_one_line(tmp_path: Path, at: int, damage: bytes):
    whole = tmp_path / "whole.xlsx"
    data = bytearray((whole if whole.exists() else Path(xlsx(whole, ROWS))).read_bytes())
    data[at % len(data) : at % len(data) + len(damage)] = damage
    (tmp_path / "a.xlsx").write_bytes(data)
    with contextlib.suppress(UserError):
        read_sheet(tmp_path / "a.xlsx")


def test_a_formula_has_the_value_that_excel_computed(tmp_path: Path):
    """An answer that begins with `=` is stored as a formula, too, and has none."""
    path = Path(xlsx(tmp_path / "a.xlsx", [["index", "prediction"], [1, "=1+1"], [2, "=5"]]))
    parts = {}
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    sheet = parts["xl/worksheets/sheet1.xml"]
    assert sheet.count(b"<f>1+1</f><v/>") + sheet.count(b"<f>1+1</f><v />") + sheet.count(b"<f>1+1</f><v></v>") == 1
    for empty in (b"<v/>", b"<v />", b"<v></v>"):
        sheet = sheet.replace(b"<f>1+1</f>" + empty, b"<f>1+1</f><v>2</v>")
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as file:
        for name, part in (parts | {"xl/worksheets/sheet1.xml": sheet}).items():
            file.writestr(name, part)
    path.write_bytes(changed.getvalue())
    assert [line.value["prediction"] for line in read_sheet(path)] == ["2", "=5"]


def test_further_sheets_and_empty_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "a.xlsx"
    book = openpyxl.load_workbook(xlsx(path, [[], ["index", "prediction"], [], [1.0, "A"]]))
    book.create_sheet("empty")
    book.create_sheet("second").append(["index", "prediction"])
    book.save(path)
    assert [(line.where, line.value) for line in read_sheet(path)] == [
        (f"{path}: row 4", {"index": "1", "prediction": "A"})
    ]
    assert capsys.readouterr().err == f"warning: {path}: its first sheet is read; the others (second) are not\n"


def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = xlsx(tmp_path / "a.xlsx", [row[:-1] for row in ROWS])
    with pytest.raises(UserError, match="a.xlsx: row 2: has no column `prediction`: is it the table of questions"):
        evaluate.main(["score", "mmbench", f"--answers={own}", f"--labels={own}"])
    with pytest.raises(UserError, match="a.xlsx: row 2: has no image"):
        evaluate.main(["predict", "mmbench", f"--questions={own}", "--output=x", "--checkpoint=y"])
    with pytest.raises(UserError, match="c.xlsx: row 2: has 2 cells, but the first row names 1 columns"):
        read_sheet(xlsx(tmp_path / "c.xlsx", [["index"], [1, "A"]]))
    for kind, write in WRITERS.items():
        with pytest.raises(UserError, match=f"e.{kind}: .* 1: names column prediction twice"):
            read_sheet(write(tmp_path / f"e.{kind}", [["index", "prediction", "prediction"], [1, "A", "B"]]))
    with pytest.raises(UserError, match="f.xlsx: row 2: has a date .2024-01-02.*format it as text"):
        read_sheet(xlsx(tmp_path / "f.xlsx", [["index"], [datetime.date(2024, 1, 2)]]))
    (tmp_path / "a.csv").write_text("index,prediction\n3,A\n")
    with pytest.raises(UserError, match="a.csv: save the table as XLSX or TSV"):
        evaluate.main(["score", "mmbench", f"--answers={tmp_path / 'a.csv'}", f"--labels={own}"])
    said = tsv(tmp_path / "h.tsv", [["index", "prediction"], [1, "A"]])
    fifth = tsv(tmp_path / "g.tsv", [["index", "A", "B", "E", "answer"], [1, "a", "b", "e", "A"]])
    with pytest.raises(UserError, match="g.tsv: line 2: has an option E: MMBench has up to four"):
        evaluate.main(["score", "mmbench", f"--answers={said}", f"--labels={fifth}"])
    (tmp_path / "b.xlsx").write_bytes(b"index\tprediction\n")
    with pytest.raises(UserError, match="b.xlsx: is no Excel file"):
        read_sheet(tmp_path / "b.xlsx")
    (tmp_path / "d.xlsx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="d.xlsx: is a Git LFS pointer"):
        read_sheet(tmp_path / "d.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"a.xlsx: reading Excel files needs: pip install 'llava_jax\[evaluate\]'"):
        read_sheet(own)
