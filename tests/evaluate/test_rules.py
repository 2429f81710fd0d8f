"""The rules of toolkits on answers that they read differently; `toolkits.py` compares them with the toolkits' code."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import rule_options as options
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.comparison import bootstrap
from llava_jax.evaluate.dataset_files import Item
from llava_jax.evaluate.intervals import wilson
from tests.evaluate.test_suite import answer, jsonl, write

TOOLKITS = ("official", "lmms-eval", "vlmevalkit")
OPTIONS = ["a red dog", "Cat", "12 cm", "none of them"]


def run(folder: Path, capsys: pytest.CaptureFixture[str], name: str, rows: Any, texts: dict[Any, Any], *more: str,
        command: str = "score") -> dict[str, Any]:  # fmt: skip
    lines = [
        answer(ident, text) if isinstance(text, str) else {"question_id": ident} | text for ident, text in texts.items()
    ]
    files = [f"--answers={write(folder / 'a.jsonl', jsonl(lines))}", "--labels", write(folder / "labels.json", rows)]
    evaluate.main([command, name, *files, "--json", *more])
    return json.loads(capsys.readouterr().out)


def exam(count: int) -> list[dict[str, Any]]:
    return [{"id": f"validation_Art_{i}", "question": "?", "options": OPTIONS, "answer": "B", "subject": "Art",
             "question_type": "multiple-choice", "category": "math", "l2_category": f"axis {i % 2}"}
            for i in range(count)]  # fmt: skip


# Of each answer to a question whose right answer is B, whether the three toolkits count it as right.
READ = {
    "mmmu": {"B": "111", "(B)": "111", "I say B.": "111", "B.": "111", "B: Cat": "001",
             "ABBA B ": "111", "C, not B": "110"},
    "mmmu-pro": {"So. Answer: B": "111", "A or C. Answer: B!": "110", "B or C": "000"},
    "mmstar": {"B. Cat": "111", "Cat": "001", "I think B because A is wrong": "000", "(b)": "100", "Both": "110"},
    "ai2d": {"B": "111", "b.": "110", "B. Cat": "011", "B.": "111", "Cat": "001", "I see: B": "001"},
    "realworldqa": {"B": "111", "b.": "100", "The answer is B": "011", "(B) Cat": "011"},
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_letters_that_toolkits_read_differently(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    rows, texts = exam(len(READ[name])), list(READ[name])
    given = {row["id"]: text for row, text in zip(rows, texts, strict=True)}
    for place, toolkit in enumerate(TOOLKITS):
        explained = run(tmp_path, capsys, name, rows, given, "--as", toolkit, *TOOLKITS, command="explain")
        scores = {one["question_id"]: one[toolkit]["score"] for one in explained["answers"]}
        for row, text in zip(rows, texts, strict=True):
            wanted = READ[name][text]
            if row["id"] in scores:
                assert scores[row["id"]] == float(wanted[place]), (text, toolkit)
            else:
                assert len(set(wanted)) == 1, text
        right = sum(int(found[place]) for found in READ[name].values())
        scored = run(tmp_path, capsys, name, rows, given, "--as", toolkit)
        if (name, toolkit) != ("mmstar", "lmms-eval"):  # a mean over axes
            assert scored["score"] == explained["scores"][toolkit] == round(100 * right / len(rows), 2)
        assert scored["rule"].startswith(toolkit)
        assert {"by", "total", "failed", "unparsed"} < scored.keys()


LETTERED = dict(zip("ABCD", OPTIONS, strict=True))


@pytest.mark.parametrize("read,text,letter", [
    (options.mmmu, "(A), no: (C). Or (A)", "A"),  # the last one
    (options.mmmu, "A or B", "B"), (options.mmmu, "B.'", ""), (options.mmmu, "'B'.", "B"),  # marks in their order
    (options.mmmu, "12 cm, not a red dog, I would say", "A"),  # the last option's text, of more than five words
    (options.mmmu, "12 cm, it is", ""), (options.mmmu, "A: none of them, as far as I know", "D"),
    (options.mmmu_pro, "Answer: A\nAnswer: (C)", "C"), (options.mmmu_pro, "Answer: A or C", "C"),
    (options.mmmu_pro, "Answer: none. So A. B", "B"), (options.mmmu_pro, "I say C.D", "D"),
    (options.mmmu_pro, "answer: BAD A.", "A"),
])  # fmt: skip
def test_options_as_the_authors_of_mmmu_read_them(read: Any, text: str, letter: str):
    """By hand, from reading `parse_multi_choice_response` in eval/eval_utils.py and mmmu-pro/evaluate.py."""
    assert read(text, LETTERED)[0] == letter


@pytest.mark.parametrize("text,right", [
    ("b", True), ("Both", True), ("(B)", True), ("Option B", True), ("The answer is b.", True), ("\nB", True),
    (" the answer is (B)", False), ("The answer is:B", False), ("(", False), ("AB", False),
])  # fmt: skip
def test_mmstars_own_rule(text: str, right: bool):
    """By hand, from reading its `MMStar_eval`."""
    assert (options.mmstar(text, "B")[0] == "B") == right


@pytest.mark.parametrize("kind,extraction,right,precision,equal", [
    ("text", "(b) It is.", "Cat", None, True), ("text", "Ca", "Cat", None, True), ("text", "12", "Cat", None, True),
    ("text", "E", "Cat", None, True), ("text", "b", "Cat", None, True),  # the first of the most similar texts
    ("text", "", "Cat", None, False), ("integer", "4.9", "4", None, True), ("integer", "4 cm", "4", None, False),
    ("float", "1.25", "1.2", 1.0, True), ("float", "1", "1.0", 1.0, True), ("float", "1.204", "1.2", 2.0, True),
    ("list", "[1, 2]", "[1, 2]", None, True), ("list", "[1,2]", "[1, 2]", None, False),
    ("list", " [1, 2]", "[1, 2]", None, False),
])  # fmt: skip
def test_extractions_as_the_authors_of_mathvista_score_them(kind, extraction, right, precision, equal):
    """By hand, from reading `normalize_extracted_answer` and `safe_equal` in evaluation/calculate_score.py."""
    shown = tuple(OPTIONS) if kind == "text" else ()
    item = Item("1", "?", shown, (right,), kind="multi_choice" if shown else kind, more={"precision": precision},
                reply=extraction)  # fmt: skip
    assert BENCHMARKS["mathvista"].rules["official"].read("?", item).score == equal


def test_mmstar_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of axis 0 two of two answers are right, of axis 1 none of one."""
    given = {f"validation_Art_{i}": text for i, text in enumerate("BAB")}
    scores = [run(tmp_path, capsys, "mmstar", exam(3), given, "--as", toolkit)["score"] for toolkit in TOOLKITS]
    assert scores == [66.67, 50.0, 66.67]


def test_open_answers_of_mmmu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"id": f"validation_Math_{i}", "question": "?", "options": "[]", "question_type": "open", "answer": right}
            for i, right in enumerate(["12", "['24/7', '3.43']", "x"])]  # fmt: skip
    given = {
        "validation_Math_0": "So the answer is 12.00.",
        "validation_Math_1": "3.43",
        "validation_Math_2": "It is x",
    }
    found = [run(tmp_path, capsys, "mmmu", rows, given, "--as", toolkit) for toolkit in TOOLKITS]
    # lmms-eval has the list as one text; VLMEvalKit looks for the text of the right answer.
    assert [one["score"] for one in found] == [100.0, 66.67, 66.67]
    assert found[0]["by"] == {"Science": 100.0, "Math": 100.0}


@pytest.mark.parametrize("text,right,scores", [
    ("12.", "12", (100, 100, 100)), ("12.6", "12", (100, 100, 100)), ("12.61", "12", (0, 0, 0)),
    (" 12 ", "12", (100, 100, 100)), ("yes ", "Yes", (0, 0, 100)), ("2%", "2", (0, 0, 0)), ("0.0", "0", (0, 0, 0)),
    ("1,200", "1200", (0, 0, 0)), ("1961", "2000", (100, 100, 100)),
])  # fmt: skip
def test_relaxed_accuracy_of_chartqa(tmp_path: Path, capsys: pytest.CaptureFixture[str], text, right, scores):
    rows = [{"imgname": "1.png", "query": "?", "label": right}]
    assert tuple(run(tmp_path, capsys, "chartqa", rows, {0: text}, "--as", t)["score"] for t in TOOLKITS) == scores


def test_anls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = {"data": [{"questionId": i, "question": "?", "answers": ["Nokia", "nokia 3310"]} for i in range(4)]}
    given = {0: " NOKIA", 1: "nokai", 2: "no", 3: "nokxx"}  # 1, 1 - 2/5, below a half, 1 - 2/5
    assert run(tmp_path, capsys, "docvqa", rows, given)["score"] == 55.0


def test_ocrbench_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    formula = "Handwritten Mathematical Expression Recognition"
    rows = [{"dataset_name": "svt", "question": "?", "answers": ["Ab"], "type": "Regular Text Recognition"},
            {"dataset_name": "svt", "question": "?", "answers": ["ab"], "type": "Scene Text-centric VQA"},
            {"dataset_name": "HME100k", "question": "?", "answers": ["a + B"], "type": formula}]  # fmt: skip
    given = {0: "It says AB.", 1: "ａｂ", 2: "a+B"}
    found = [run(tmp_path, capsys, "ocrbench", rows, given, "--as", toolkit) for toolkit in TOOLKITS]
    assert [one["score"] for one in found] == [2.0, 3.0, 2.0]
    assert found[0]["by"]["Text Recognition"] == 1.0
    assert run(tmp_path, capsys, "ocrbench", rows, given | {2: "a+b"})["score"] == 1.0
    table = [{name: value for name, value in row.items() if name != "dataset_name"} for row in rows]  # VLMEvalKit's
    assert [run(tmp_path, capsys, "ocrbench", table, given, "--as", one)["score"] for one in TOOLKITS] == [
        2.0,
        3.0,
        2.0,
    ]


MATH = [
    {"pid": str(i), "question": "?", "choices": ["7", "eight"] if kind == "text" else None, "answer": right,
     "question_type": "multi_choice" if kind == "text" else "free_form", "answer_type": kind, "precision": precision}
    for i, (kind, right, precision) in enumerate([("text", "eight", None), ("integer", "4", None), ("float", "1.2", 1),
                                                   ("float", "1.2", 1.0), ("list", "[1, 2]", None)])
]  # fmt: skip


def test_mathvista_with_and_without_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without a judge, only what needs no extraction is read. lmms-eval cannot round to 1.0 digits."""
    given = {"0": "(B) eight", "1": "4", "2": "1.23", "3": "1.23", "4": "It is [1, 2]"}
    found = [run(tmp_path, capsys, "mathvista", MATH, given, "--as", toolkit) for toolkit in TOOLKITS]
    assert [one["score"] for one in found] == [80.0, 60.0, 40.0]
    judged = {ident: {"text": "Let me see.", "content": text} for ident, text in given.items()}
    judged |= {"0": {"text": "?", "content": "eigth"}, "4": {"text": "?", "content": "[1, 2]"}}
    found = [run(tmp_path, capsys, "mathvista", MATH, judged, "--as", toolkit)["score"] for toolkit in TOOLKITS]
    assert found == [100.0, 80.0, 20.0]  # the option that is most similar, which VLMEvalKit does not look for
    short = [MATH[0] | {"choices": ["No", "Certainly"], "answer": "No"}]
    none = run(tmp_path, capsys, "mathvista", short, {"0": {"text": "I cannot tell.", "content": "Z."}})
    assert (none["score"], none["unparsed"]) == (0.0, 1)
    extracted = {ident: {"text": "?", "res": right} for ident, right in given.items()}  # as VLMEvalKit writes it
    assert run(tmp_path, capsys, "mathvista", MATH, extracted, "--as", "vlmevalkit")["score"] == 40.0


def illusion(figure: int, question: int, right: int, category: str = "VD") -> dict[str, Any]:
    return {"category": category, "subcategory": "chart", "set_id": "0", "figure_id": str(figure),
            "question_id": str(question), "question": "?", "gt_answer": str(right), "gt_answer_details": "!",
            "visual_input": "0" if category == "VS" and not figure else "1"}  # fmt: skip


def test_hallusionbench(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [illusion(0, 0, 1), illusion(0, 1, 0), illusion(1, 0, 0), illusion(0, 0, 1, "VS")]
    given = {"VD_chart_0_0_0": "Yes.", "VD_chart_0_0_1": "No, it is not.", "VD_chart_0_1_0": "Yes, it is.",
             "VS_chart_0_0_0": "I cannot tell."}  # fmt: skip
    official, lmms, kit = (
        run(tmp_path, capsys, "hallusionbench", rows, given, "--as", toolkit) for toolkit in TOOLKITS
    )
    assert (official["score"], lmms["score"]) == (75.0, 66.67)  # without an image an unclear answer is right
    assert official["by"] == {
        "aAcc": 75.0,
        "VD": 66.67,
        "VS": 100.0,
        "fAcc": 50.0,
        "qAcc": 66.67,
        "easy": 100.0,
        "hard": 0.0,
    }
    assert kit["by"] == {"aAcc": 66.67, "fAcc": 50.0, "qAcc": 50.0}
    assert kit["score"] == 55.56
    assert official["unparsed"] == 1
    judged = {ident: {"text": text, "content": "Incorrect."} for ident, text in given.items()}
    assert run(tmp_path, capsys, "hallusionbench", rows, judged)["score"] == 0.0
    said = {"VD_chart_0_0_0": "Incorrect. The reference says yes.", "VD_chart_0_0_1": "Correct: both say no.",
            "VD_chart_0_1_0": "Correct: yes and no.", "VS_chart_0_0_0": "2"}  # fmt: skip
    judged = {ident: {"text": given[ident], "content": text} for ident, text in said.items()}
    assert run(tmp_path, capsys, "hallusionbench", rows, judged)["by"]["aAcc"] == 75.0
    read = {ident: {"text": "It may be.", "extracted": "Yes"} for ident in given}  # by VLMEvalKit's judge
    scores = [
        run(tmp_path, capsys, "hallusionbench", rows, read, "--as", toolkit)["by"]["aAcc"] for toolkit in TOOLKITS
    ]
    assert scores == [50.0, 33.33, 33.33]


def test_wilder_needs_reviews(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"question_id": i, "Question": "?", "Answer": "!"} for i in range(3)]
    given = {0: {"text": "a", "content": "10 8\nGood."}, 1: {"text": "b", "content": "I like it."}, 2: {"text": ""}}
    official, lmms = (run(tmp_path, capsys, "wilder", rows, given, "--as", toolkit) for toolkit in TOOLKITS[:2])
    assert (official["score"], official["failed"], official["unparsed"]) == (45.0, 1, 1)  # 8 + 1 of 10 + 10
    assert lmms["score"] == 42.1  # 8 - 1 + 1 of 10 - 1 + 10
    with pytest.raises(UserError, match="--as vlmevalkit: LLaVA-Bench-Wilder has official, lmms-eval"):
        run(tmp_path, capsys, "wilder", rows, given, "--as", "vlmevalkit")
    with pytest.raises(UserError, match="line 1: has no review, nor has any other answer: `judge wilder` writes them"):
        run(tmp_path, capsys, "wilder", rows, dict.fromkeys(range(3), "a"))


def test_mmmu_pro_is_the_mean_of_two_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"id": "test_Art_1", "options": str(OPTIONS), "answer": "B", "subject": "Art"} | question
            for question in ({"question": "?"}, {})]  # fmt: skip
    rows += [rows[0] | {"id": "test_Art_2"}]
    lines = [{"question_id": "test_Art_1", "text": "B", "category": "standard"},
             {"question_id": "test_Art_1", "text": "I see B", "category": "vision"},
             {"question_id": "test_Art_2", "text": "C", "category": "standard"}]  # fmt: skip
    files = [f"--answers={write(tmp_path / 'a.jsonl', jsonl(lines))}", "--labels", write(tmp_path / "l.json", rows)]
    for toolkit, score in (("official", 75.0), ("lmms-eval", 25.0), ("vlmevalkit", 75.0), ("vlmevalkit-cot", 75.0)):
        evaluate.main(["score", "mmmu-pro", *files, "--json", "--as", toolkit])
        assert json.loads(capsys.readouterr().out)["score"] == score


POPE = [{"question_id": i, "image": f"{i // 2}.jpg", "text": f"Is there a {i} in the image?", "label": label}
        for i, label in enumerate(["yes", "no", "yes", "no"])]  # fmt: skip


def test_the_release_benchmarks_by_other_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = write(tmp_path / "coco_pope_random.json", jsonl(POPE))
    answers = write(tmp_path / "a.jsonl", jsonl([answer(0, "Yes, a cat."), answer(1, "I see."), answer(2, "yes"),
                                                 answer(3, "There is none; no.")]))  # fmt: skip
    scores = {}
    for toolkit in TOOLKITS:
        evaluate.main(["score", "pope", f"--answers={answers}", f"--labels={labels}", "--json", "--as", toolkit])
        scores[toolkit] = json.loads(capsys.readouterr().out)["score"]
    # official: "I see" is a yes, 4 / (4 + 1). lmms-eval reads only `yes`, and leaves "Yes, a cat." out of the recall.
    assert scores == {"official": 80.0, "lmms-eval": 100.0, "vlmevalkit": 100.0}
    with pytest.raises(UserError, match="--as vlmevalkit: VQAv2 has one rule only"):
        BENCHMARKS["vqav2"].scored_as("vlmevalkit")


TABLES = {  # rows of VLMEvalKit's predictions, and the score by its rule
    "pope": ([{"index": 1, "category": "random,popular", "answer": "Yes", "prediction": "yes", "image_path": "1.jpg"},
              {"index": 2, "category": "random", "answer": "No", "prediction": "Yes.", "image_path": "1.jpg"}], 80.0),
    "mme": ([{"index": i, "category": "OCR", "answer": right, "prediction": "yes", "image_path": "OCR/7.jpg",
              "question": f"{i}?"} for i, right in enumerate(["Yes", "No"])], 50.0),
    "textvqa": ([{"index": 1, "answer": str(["a"] * 10), "prediction": "A"},
                 {"index": 2, "answer": str(["b"] * 10), "prediction": "A"}], 50.0),
    "gqa": ([{"index": i, "answer": "red", "prediction": text} for i, text in enumerate(["Red", "Red."])], 50.0),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_release_benchmarks_in_the_toolkits_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    """VLMEvalKit's predictions have the labels; lmms-eval's logs number the Hub's rows, whose ids may repeat."""
    rows, expected = TABLES[name]
    table, log = tmp_path / "llava.tsv", tmp_path / "log.jsonl"
    write(table, "\n".join("\t".join(map(str, row)) for row in [list(rows[0]), *map(list, map(dict.values, rows))]))
    parquet = tmp_path / "test-00000-of-00001.parquet"
    columns = [{column: cell for column, cell in row.items() if column not in ("index", "prediction")} for row in rows]
    repeats = name in ("pope", "mme")
    ids = [{"question_id": "1" if repeats else str(i)} for i in range(len(rows))]
    pq.write_table(pa.Table.from_pylist([row | ident for row, ident in zip(columns, ids, strict=True)]), parquet)
    lines = [{"doc_id": i, "resps": [row["prediction"]], "score": ids[i]} for i, row in enumerate(rows)]
    write(log, jsonl([lines[0] | {"target": rows[0]["answer"]}, lines[1]]))
    for answers, labels in ((table, table), (log, parquet)):
        evaluate.main(["score", name, f"--answers={answers}", f"--labels={labels}", "--json", "--as", "vlmevalkit"])
        scores = json.loads(capsys.readouterr().out)
        assert (scores["score"], scores["total"]) == (expected, 3 if name == "pope" else 2)
    if repeats:
        write(log, jsonl([lines[0] | {"target": "other"}, lines[1]]))
        with pytest.raises(
            UserError, match="line 1: doc_id 0 has the right answer 'other', but that row of the labels"
        ):
            evaluate.main(["score", name, f"--answers={log}", f"--labels={parquet}"])


@pytest.mark.parametrize("name,row", [
    ("docvqa", {"questionId": "1", "question": "?"}), ("mathvista", MATH[1] | {"answer": "", "pid": "1"}),
    ("mmmu", exam(1)[0] | {"id": "1", "answer": "?"}),
])  # fmt: skip
def test_test_sets_have_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, row: dict[str, Any]):
    with pytest.raises(UserError, match="line 1: the right answer is not public: `submission` writes"):
        run(tmp_path, capsys, name, [row], {"1": "B"})


def test_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    low, high = wilson(8, 10)
    assert (round(low, 2), round(high, 2)) == (49.02, 94.33)  # as in Wilson's tables
    rows = [{"imgname": f"{i // 2}.png", "query": "?", "label": "x"} for i in range(40)]
    independent = [row | {"imgname": f"{i}.png"} for i, row in enumerate(rows)]
    given = {i: "x" if i % 4 < 2 else "y" for i in range(40)}  # both answers about an image are right, or none
    alone, shared = (run(tmp_path, capsys, "chartqa", some, given) for some in (independent, rows))
    assert (alone["interval_by"], shared["interval_by"]) == ("Wilson", "bootstrap of 20 clusters")
    assert (alone["interval"], shared["interval"]) == ([35.2, 64.8], [25.0, 75.0])
    ratio = shared["detectable_difference"] / alone["detectable_difference"]
    assert ratio == pytest.approx(np.sqrt(2), rel=0.1)  # half as many independent images


def test_paired_tests():
    """Run 1 is right where run 0 is wrong, eight times, and never the other way: 2 / 2^8."""
    right = np.array([[0.0] * 8 + [1.0] * 12, [1.0] * 20])
    *_, tests = bootstrap(right, np.ones((2, 20)), 500, [0], right)
    assert (tests[1].by, tests[1].p) == ("McNemar", 2 / 2**8)
    *_, tests = bootstrap(right, np.ones((2, 20)), 500, [0])
    assert tests[1].by == "bootstrap" and tests[1].p < 0.01
    *_, tests = bootstrap(right[:, ::-1] * 0 + np.array([[0, 1] * 10, [1, 0] * 10]), np.ones((2, 20)), 500, [0])
    assert tests[1].p > 0.5
