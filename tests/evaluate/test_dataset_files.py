"""Questions and labels from the files that people download, and answers in the forms of the toolkits."""

import base64
import csv
import io
import json
import types
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import parquet as stored
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.outcomes import _name
from llava_jax.evaluate.parquet import StoredImage, content, parquet_rows
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.evaluate.score import score
from tests.evaluate.test_suite import answer, jsonl, write

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def png(color: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(content, "PNG")
    return content.getvalue()


RED, BLUE = png("red"), png("blue")


def asked(name: str, path: Any, prompt: str = "lmms-eval") -> list[Question]:
    return read_questions([str(path)], "", BENCHMARKS[name].asked_as(prompt).questions)


def shown(question: Question) -> tuple[Any, ...]:
    """The images of a question, as bytes if they are inside a file."""
    return tuple(image if isinstance(image, str) else content(image) for image in question.images)


def tsv(path: Path, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["\t".join(names), *("\t".join(str(row.get(name, "")) for name in names) for row in rows)]
    return write(path, "\n".join(lines) + "\n")


MMMU = [
    {"index": 1, "image": base64.b64encode(RED).decode(), "question": "See <image 1>", "A": "x", "B": "y",
     "answer": "B", "category": "Art", "split": "validation"},
    {"index": 2, "image": "1", "question": "How many?", "answer": "3", "category": "Math", "split": "validation"},
    {"index": 3, "image": "1", "question": "For prompts?", "answer": "3", "category": "Math", "split": "dev"},
]  # fmt: skip


@pytest.mark.parametrize("prompt,first,second", [
    ("official", f"See <image 1>\n\n(A) x\n(B) y\n\n\n{LETTER}", f"How many?\n\n{SHORT}"),
    ("lmms-eval", f"See <image 1>\nA. x\nB. y\n\n{LETTER}", f"How many?\n\n{SHORT}"),
    ("vlmevalkit", f"See <image 1>\nA. x\nB. y\n{LETTER}", "How many?\nAnswer the question directly."),
    ("vlmevalkit-api", "Question: See <image 1>\nOptions:\nA. x\nB. y\nPlease select the correct answer from the "
     "options above. \n", "Question: How many?\n"),
])  # fmt: skip
def test_vlmevalkits_table(tmp_path: Path, prompt: str, first: str, second: str):
    """Images are shared by index; questions for prompts (dev) are neither asked nor scored."""
    table = tsv(tmp_path / "MMMU_DEV_VAL.tsv", MMMU)
    found = asked("mmmu", table, prompt)
    assert [(q.id, q.text, q.images) for q in found] == [("1", first, (RED,)), ("2", second, (RED,))]
    if prompt == "vlmevalkit-api":
        assert found[0].marked_text == first.replace("<image 1>", "<image>")
    lines = jsonl([answer(1, "B"), answer(2, "3"), answer(3, "4")])
    scores, _ = score("mmmu", write(tmp_path / "a.jsonl", lines), [table], [])
    assert (scores["score"], scores["total"]) == (100.0, 2)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def ai2d(image: bytes, right: str) -> dict[str, Any]:
    return {"question": "?", "options": ["x", "y"], "answer": right, "image": {"bytes": image, "path": "a.png"}}


def test_the_hubs_parquet(tmp_path: Path):
    """Rows without ids are numbered over shards; questions about equal images are a cluster."""
    parquet(tmp_path / "test-00000-of-00002.parquet", [ai2d(RED, "0"), ai2d(BLUE, "1")])
    second = parquet(tmp_path / "test-00001-of-00002.parquet", [ai2d(RED, "1")])
    (question,) = asked("ai2d", second)
    assert question._replace(images=shown(question)) == Question("2", f"?\nA. x\nB. y\n{LETTER}", (RED,))
    folder = [q.id for q in asked("ai2d", tmp_path)]
    assert folder == ["0", "1", "2"]
    items = [item for item, _ in BENCHMARKS["ai2d"].read(str(tmp_path))]
    assert [item.answers for item in items] == [("A",), ("B",), ("B",)]
    assert items[0].cluster == items[2].cluster != items[1].cluster
    (tmp_path / "test-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="test-00000-of-00002.parquet is needed, too"):
        asked("ai2d", second)


def test_images_stay_in_parquet(tmp_path: Path):
    """They are read in any order, over row groups, from cells of each form; equal images are one."""
    images = [png(color) for color in ("red", "lime", "blue", "black", "red")]
    rows = [{"questionId": i, "question": "?", "answers": ["x"], "image": {"bytes": image}, "images": [image, RED]}
            for i, image in enumerate(images)]  # fmt: skip
    file = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    questions = asked("docvqa", file)
    assert all(isinstance(image, StoredImage) for question in questions for image in question.images)
    assert [shown(question) for question in reversed(questions)] == [(image, image, RED) for image in reversed(images)]
    assert questions[0].images == questions[4].images
    assert not any({"image", "images"} & set(item.more) for item, _ in BENCHMARKS["docvqa"].read(file))
    first = next(parquet_rows(file)).value["image"]["bytes"]
    Path(file).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="a.parquet: row 0: its image cannot be read"):
        first._replace(path=str(tmp_path / "../" / tmp_path.name / "a.parquet")).read()


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also if the questions are of the 30 files of MMMU."""
    opened = types.SimpleNamespace()
    monkeypatch.setattr(stored, "_OPENED", opened)
    files = [parquet(tmp_path / f"{i}.parquet", [ai2d(RED if i % 2 else BLUE, "0")]) for i in range(20)]
    images = [asked("ai2d", file)[0].images[0] for file in files]
    assert [content(image) for image in (*images, *images)] == [BLUE, RED] * 20
    assert len(vars(opened)) == stored.MAX_OPEN


def test_several_images_and_official_files(tmp_path: Path):
    row = {"id": "validation_Art_1", "question": "<image 2> or <image 1>?", "options": "['<image 1>', 'y']",
           "answer": "A", "question_type": "multiple-choice", "image_1": {"bytes": RED},
           "image_2": {"bytes": BLUE}}  # fmt: skip
    file = parquet(tmp_path / "validation-00000-of-00001.parquet", [row])
    assert shown(asked("mmmu", file)[0]) == (RED, BLUE)
    assert shown(asked("mmmu", file, "official")[0]) == (RED,)
    interleaved = asked("mmmu", file, "vlmevalkit-api")[0]
    assert shown(interleaved) == (BLUE, RED, RED)
    assert interleaved.marked_text.count("<image>") == 3
    human = write(tmp_path / "test_human.json", [{"imgname": "1.png", "query": "How?", "label": "x"}])
    augmented = write(tmp_path / "test_augmented.json", [{"imgname": "1.png", "query": "Why?", "label": "y"}])
    found = read_questions([human, augmented], "", BENCHMARKS["chartqa"].questions)
    assert [(q.id, q.images) for q in found] == [("0", ("1.png",))] * 2
    assert [q.extra for q in found] == [{"category": "human"}, {"category": "augmented"}]
    lines = [answer(q.id, right, q.text, **q.extra) for q, right in zip(found, "xz", strict=True)]
    scores, outcomes = score("chartqa", write(tmp_path / "a.jsonl", jsonl(lines)), [human, augmented], [])
    assert scores["by"] == {"human": 100.0, "augmented": 0.0}
    assert {outcome.cluster for outcome in outcomes} == {"1.png"}


MATH = {
    "7": {
        "question": "How long?",
        "choices": None,
        "unit": "cm",
        "precision": 1,
        "answer": "1.2",
        "pid": "7",
        "question_type": "free_form",
        "answer_type": "float",
        "image": "images/7.jpg",
        "metadata": {"task": "t"},
    }
}


def test_mathvistas_queries(tmp_path: Path):
    file = write(tmp_path / "testmini.json", MATH)
    (query,), (form,) = asked("mathvista", file, "official"), asked("mathvista", file)
    assert query.text == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How long? (Unit: cm)"
    )
    assert form.text == (
        "How long? (Unit: cm)\nAnswer the question using a single floating-point number with one decimal place."
    )
    assert query.images == ("images/7.jpg",)
    results = {"7": MATH["7"] | {"response": "It is 1.2 cm long.", "extraction": "1.2"}}  # of the official scripts
    scores, _ = score("mathvista", write(tmp_path / "output.json", results), [file], [])
    assert scores["score"] == 100.0


def test_the_query_in_vlmevalkits_table_is_no_question(tmp_path: Path):
    """Its other prompts ask the question in it."""
    text = "Hint: Please answer.\nQuestion: How long? (Unit: cm)\nChoices:\n(A) 1\n(B) 2"
    row = {"index": 1, "question": text, "choices": "['1', '2']", "question_type": "multi_choice", "unit": "cm",
           "answer": "1", "image": base64.b64encode(RED).decode(), "answer_type": "text"}  # fmt: skip
    file = tmp_path / "MathVista_MINI.tsv"
    with file.open("w", newline="") as out:
        csv.writer(out, delimiter="\t").writerows([list(row), list(row.values())])
    assert asked("mathvista", file, "vlmevalkit")[0].text == text
    assert asked("mathvista", file)[0].text == f"How long? (Unit: cm)\nA. 1\nB. 2\n{LETTER}"


LOGS = [{"doc_id": i, "target": "AB"[i], "filtered_resps": ["A."], "resps": [["A."]], "input": "?", "doc_hash": "0"}
        for i in range(2)]  # fmt: skip


def test_logs_of_lmms_eval(tmp_path: Path):
    rows = write(tmp_path / "l.json", [{"question": "?", "options": ["x", "y"], "answer": str(i)} for i in range(2)])
    log = write(tmp_path / "samples_ai2d.jsonl", jsonl(LOGS))
    assert score("ai2d", log, [rows], [], rule="lmms-eval")[0]["score"] == 50.0
    write(tmp_path / "samples_ai2d.jsonl", jsonl([LOGS[0], LOGS[1] | {"target": "A"}]))
    with pytest.raises(UserError, match="line 2: doc_id 1 has the right answer 'A', but that row .* has 'B'"):
        score("ai2d", log, [rows], [])
    write(tmp_path / "samples_ai2d.jsonl", jsonl([LOGS[0] | {"doc_id": 5}]))
    with pytest.raises(UserError, match="line 1: doc_id 5: the labels have no such row"):
        score("ai2d", log, [rows], [])
    charts = [write(tmp_path / f"test_{kind}.json", [{"imgname": "1.png", "query": "?", "label": "A"}])
              for kind in ("human", "augmented")]  # fmt: skip
    with pytest.raises(UserError, match="line 1: doc_id 5 may be of several files of labels: give one of them"):
        score("chartqa", log, charts, [])
    inner = {"mmstar": {"question_id": 9, "l2_category": "x", "score": 1.0}}
    row = {"index": 9, "question": "?", "answer": "A", "category": "c", "l2_category": "x"}
    star = write(tmp_path / "star.json", [row])
    log = write(tmp_path / "log.jsonl", jsonl([LOGS[0] | inner]))
    assert score("mmstar", log, [star], [], rule="lmms-eval")[0]["score"] == 100.0
    review = {"question": "?", "ans1": "!", "ans2": "A.", "review": "10 8\nFine.", "content": "[Question]\n10 1"}
    log = write(tmp_path / "log.jsonl", jsonl([LOGS[0] | {"target": "gpt4v_answer", "gpt_eval_llava_all": review}]))
    wilder = write(tmp_path / "wilder.json", [{"Question": "?", "Answer": "!"}])
    assert score("wilder", log, [wilder], [])[0]["score"] == 80.0


def test_official_rules_read_what_was_said_in_a_log(tmp_path: Path):
    """Not what lmms-eval's filter left of it; and logs without ids have outcomes, too."""
    rows = write(tmp_path / "l.json", [{"question": "?", "options": ["x", "y"], "answer": "0"}])
    log = write(tmp_path / "a.jsonl", jsonl([LOGS[0] | {"resps": [["A. x"]], "filtered_resps": ["A"]}]))
    assert score("ai2d", log, [rows], [])[0]["score"] == 0.0
    assert score("ai2d", log, [rows], [], rule="lmms-eval")[0]["score"] == 100.0
    assert _name({"doc_id": 7, "text": "A"}) == "7"


def test_answers_of_another_set_are_refused(tmp_path: Path):
    """Whose ids are the same."""
    human = write(tmp_path / "test_human.json", [{"imgname": "1.png", "query": "?", "label": "A"}])
    given = write(tmp_path / "a.jsonl", jsonl([{"question_id": 0, "text": "A", "category": "augmented"}]))
    with pytest.raises(UserError, match="question 0 is of augmented, and the labels of human: give those of that set"):
        score("chartqa", given, [human], [])


def test_a_log_of_one_of_several_sets(tmp_path: Path):
    """MMMU-Pro's sets have the same ids."""
    row = {"id": "test_Art_1", "options": "['x', 'y']", "answer": "B"}
    labels = [write(tmp_path / "a.json", [row | {"question": "?"}]), write(tmp_path / "b.json", [row])]
    log = write(tmp_path / "log.jsonl", jsonl([LOGS[0] | {"mmmu_acc": {"id": "test_Art_1", "parsed_pred": "B"}}]))
    assert score("mmmu-pro", log, labels[:1], [])[0]["total"] == 1
    with pytest.raises(UserError, match="line 1: question test_Art_1 may be of standard or vision: give the labels of"):
        score("mmmu-pro", log, labels, [])


@pytest.mark.parametrize("form", ["xlsx", "tsv", "json", "parquet"])
def test_predictions_of_vlmevalkit(tmp_path: Path, form: str):
    """Such a file has the labels, too. In JSON it has NaN for empty cells."""
    rows = [{"index": i, "question": "?", "A": "x", "B": "y", "answer": "B", "prediction": text}
            for i, text in enumerate(["B", "The answer is A"])]  # fmt: skip
    path = tmp_path / f"llava_AI2D_TEST.{form}"
    if form == "xlsx":
        book = openpyxl.Workbook()
        for row in [list(rows[0]), *map(list, map(dict.values, rows))]:
            book.active.append(row)
        book.save(path)
    elif form == "tsv":
        tsv(path, rows)
    elif form == "json":
        write(path, [row | {"C": float("nan")} for row in rows])
    else:
        parquet(path, rows)
    assert score("ai2d", str(path), [str(path)], [], rule="vlmevalkit")[0]["score"] == 50.0


def test_submissions(tmp_path: Path):
    def submit(name: str, lines: list[dict[str, Any]], *labels: Any) -> Any:
        evaluate.main(["submission", name, f"--answers={write(tmp_path / 'a.jsonl', jsonl(lines))}",
                       f"--output={tmp_path / 'out.json'}", "--labels", *map(str, labels)])  # fmt: skip
        return json.loads((tmp_path / "out.json").read_text())

    table = tsv(tmp_path / "mmmu.tsv", MMMU)
    assert submit("mmmu", [answer(1, "It is (B)"), answer(2, "3")], table) == {"1": "B", "2": "3"}
    doc = write(tmp_path / "val.json", {"data": [{"questionId": 7, "question": "?", "answers": ["x"]}]})
    assert submit("docvqa", [answer(7, "x")], doc) == [{"questionId": 7, "answer": "x"}]
    ocr = write(tmp_path / "ocr.json", [{"question": "?", "answers": ["x"], "type": "t", "dataset_name": "svt"}])
    (row,) = submit("ocrbench", [answer(0, "y")], ocr)
    assert (row["predict"], row["dataset_name"]) == ("y", "svt")
    with pytest.raises(UserError, match="has no question 9"):
        submit("ocrbench", [answer(9, "y")], ocr)
    more = write(tmp_path / "more.json", [{"id": "validation_Math_7", "question": "?", "options": "[]", "answer": "4",
                                           "question_type": "open"}])  # fmt: skip
    several = submit("mmmu", [answer(1, "B"), answer(2, "3"), answer("validation_Math_7", "4")], table, more)
    assert several == {"1": "B", "2": "3", "validation_Math_7": "4"}
    sets = [write(tmp_path / f"{i}.json", [{"id": "test_Art_1", "options": "['x', 'y']", "answer": "B"} | question])
            for i, question in enumerate(({"question": "?"}, {}))]  # fmt: skip
    with pytest.raises(UserError, match=r"have several sets \(standard, vision\): hand in each by itself"):
        submit("mmmu-pro", [answer("test_Art_1", "B", category=kind) for kind in ("standard", "vision")], *sets)
    with pytest.raises(UserError, match="SEED-Bench has one file of questions"):
        submit("seed", [answer(1, "B")], ocr, more)


def test_errors_name_the_row(tmp_path: Path):
    with pytest.raises(UserError, match="element 0: the answer 7 is none of its 2 options"):
        asked("ai2d", write(tmp_path / "a.json", [{"question": "?", "options": ["x", "y"], "answer": "7"}]))
    with pytest.raises(UserError, match="element 0: has no image: is it a table of predictions, which lacks them"):
        asked("docvqa", write(tmp_path / "b.json", [{"question": "?", "answers": ["x"]}]))
    (found,) = asked("infovqa", write(tmp_path / "b.json", [{"question": "?", "answers": ["x"],
                                                             "image_local_name": "7.jpeg"}]))  # fmt: skip
    assert found.images == ("7.jpeg",)
    parquet(tmp_path / "hub/Art/dev.parquet", [ai2d(RED, "0")])
    with pytest.raises(UserError, match="hub: has no file that is read .*, such as .*hub/Art/dev.parquet"):
        asked("mmmu", tmp_path / "hub")
    with pytest.raises(UserError, match="element 0: has no question or query or Question"):
        asked("docvqa", write(tmp_path / "b.json", [{"answers": ["x"]}]))
    with pytest.raises(UserError, match="line 2: its image is neither base64 nor the name of an image: '!!'"):
        asked("ocrbench", tsv(tmp_path / "c.tsv", [{"index": 0, "image": "!!", "question": "?", "answer": "x"}]))
    table = tsv(tmp_path / "AI2D_TEST.tsv", [{"index": 0, "question": "?", "A": "x", "B": "y", "answer": "A"}])
    for name, message in (("mmstar", "has no l2_category or l2-category"), ("docvqa", "has options"),
                          ("chartqa", "'AI2D_TEST.tsv: line 2' is no kind of ChartQA")):  # fmt: skip
        with pytest.raises(UserError, match=f"line 2: {message}: is it a file of another benchmark"):
            asked(name, table)
    with pytest.raises(UserError, match="is no Parquet file"):
        asked("ocrbench", write(tmp_path / "d.parquet", "x"))
    with pytest.raises(UserError, match="question 0: has no options: give VLMEvalKit's own table as --labels"):
        rows = write(tmp_path / "e.json", [{"question": "?", "answer": "12"}])
        score("realworldqa", write(tmp_path / "f.json", {"0": "12"}), [rows], [], rule="vlmevalkit")
    gap = tsv(tmp_path / "g.tsv", [{"index": 0, "question": "?", "A": "x", "B": "y", "C": "", "D": "z", "answer": "D"}])
    with pytest.raises(UserError, match="question 0: has the option D and none for C: fill that in"):
        asked("ai2d", gap)
    with pytest.raises(UserError, match="--prompt other: POPE has one prompt only"):
        BENCHMARKS["pope"].asked_as("other")
