"""What is no answer counts as a wrong one in every benchmark, and is counted beside the score."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.outcomes import write_outcomes
from llava_jax.evaluate.score import score
from tests.evaluate import test_suite as suite
from tests.evaluate.test_scienceqa import PROBLEMS, TEXTS

Lines = list[dict[str, Any]]
COUNTS = ("total", "failed", "unparsed", "guesses_would_add", "yes_ratio")  # beside the scores
NOBODY_SAYS = "zzz"
FILTERED = {"text": None, "metadata": {"no_answer": "stopped by a filter"}}
ABSENT = [  # what an answer may be that is none, and how it is counted
    ({"text": ""}, "empty"), ({"text": " \n"}, "empty"), ({"text": "<think>No.</think>"}, "empty"), (FILTERED, "empty"),
    ({"text": None}, "empty"), ({"text": float("nan")}, "empty"), ({"text": "\u200b"}, "empty"),
    ({"text": "Failed to obtain answer via API."}, "empty"),
    ({"text": "<think>\nYes, I see"}, "cut_off"), ({"text": "A</think>B<think>A"}, "cut_off"),
    ({"text": None, "metadata": {"no_answer": "cut off at --max-tokens"}}, "cut_off"),
]  # fmt: skip


def of_ids(right: dict[Any, str], wrong: str = NOBODY_SAYS) -> tuple[Lines, Lines]:
    return tuple([suite.answer(ident, text or wrong) for ident, text in texts.items()]
                 for texts in (right, dict.fromkeys(right)))  # fmt: skip


def textvqa(*texts: str) -> Lines:
    """By its own ids, which are known by the questions."""
    asked = ((entry["question_id"], entry["question"]) for entry in suite.TEXTVQA["data"])
    return [suite.answer(ident, text, question) for (ident, question), text in zip(asked, texts, strict=True)]


# Nothing is what is left of these articles, but it is not said.
ARTICLES = {"question_id": 5, "answer_type": "other", "answers": suite.people(*["a", "the"] * 5)}
VQAV2 = {"annotations": [*suite.VQAV2["annotations"], ARTICLES]}
POPE = suite.jsonl([suite.pope(1, "cat", "yes"), suite.pope(2, "dog", "no"), suite.pope(3, "car", "no")])
EASY = [
    {"id": i, "conversations": [{"from": "human", "value": "Is it a circle?"}, {"from": "gpt", "value": i}]}
    for i in ("yes", "no")
]
MME = "Is there a cat?\tYes\nIs there a dog?\tNo\n"
MME_ASKED = ("Is there a cat?", "Is there a dog?")


def mme(*texts: str) -> Lines:
    return [suite.answer("existence/1.png", text, asked) for text, asked in zip(texts, MME_ASKED, strict=True)]


def mmbench(*texts: str) -> Lines:
    return [suite.answer(i, text) for i, text in zip((3, 5), texts, strict=True)]


def seed(*texts: str) -> Lines:
    return [suite.answer(i, text) for i, text in zip((101, 102, 103), texts, strict=True)]


OWN = suite.jsonl([{"question_id": "a", "answer": "A cat.", "category": "x"}, {"question_id": "b", "answer": 2}])


def graded(grade: float) -> Lines:
    return [{"question_id": ident, "text": "It is.", "grade": grade} for ident in suite.MM_VET]


# Of each benchmark the labels, and answers of which all are right, and all are wrong.
CASES: dict[str, tuple[Any, Lines, Lines]] = {
    "vqav2": (VQAV2, *of_ids({1: "yes", 2: "3", 3: "dog", 4: "The Beach", 5: "a"})),
    "gqa": (suite.GQA, *of_ids({"q1": "yes", "q2": "red", "q3": "fire hydrant"})),
    "vizwiz": (suite.VIZWIZ, *of_ids({"a.jpg": "unanswerable", "b.jpg": "can", "c.jpg": "can"})),
    "textvqa": (suite.TEXTVQA, textvqa("nokia", "98"), textvqa(NOBODY_SAYS, NOBODY_SAYS)),
    "pope": (POPE, [suite.answer(i, t) for i, t in ((1, "yes"), (2, "no"), (3, "no"))],
             [suite.answer(i, t) for i, t in ((1, "no"), (2, "yes"), (3, "yes"))]),
    "mme": (MME, mme("Yes", "No"), mme("No", "Yes")),
    "mmbench": (suite.table(suite.BASE), mmbench("A", "C"), mmbench("B", "A")),
    "mmbench-cn": (suite.table(suite.BASE), mmbench("A", "C"), mmbench("B", "A")),
    "seed": (suite.SEED, seed("A", "B", "D"), seed("B", "A", "A")),
    "mm-vet": (suite.MM_VET, graded(1.0), graded(0.0)),
    "easy-vqa": (EASY, *of_ids({"yes": "yes", "no": "no"})),
    "exact": (OWN, *of_ids({"a": "a cat", "b": "2"})),
}  # fmt: skip


EXAM = [
    {
        "id": f"validation_Art_{i}",
        "question": "?",
        "options": ["a man", "a cat"],
        "answer": "AB"[i],
        "question_type": "multiple-choice",
        "subject": "Art",
        "category": "art",
        "l2_category": "art",
    }
    for i in range(2)
]
READ = [{"questionId": i, "question": "?", "answers": [right], "answer": right, "type": "human", "dataset_name": "svt"}
        for i, right in ((0, "Nokia"), (1, "12"))]  # fmt: skip
MATH = [{"pid": "1", "question": "?", "choices": ["7", "8"], "answer": "8", "question_type": "multi_choice",
         "answer_type": "text", "precision": None},
        {"pid": "2", "question": "?", "choices": None, "answer": "4", "question_type": "free_form",
         "answer_type": "integer", "precision": None}]  # fmt: skip
ILLUSIONS = [{"category": "VD", "subcategory": "illusion", "set_id": "0", "figure_id": "0", "question_id": str(i),
              "question": "?", "gt_answer": str(i), "visual_input": "1"} for i in range(2)]  # fmt: skip
WILD = [{"question_id": i, "Question": "?", "Answer": "It is."} for i in range(2)]


def reviewed(score: int) -> Lines:
    return [{"question_id": i, "text": "It is.", "content": f"10 {score}"} for i in range(2)]


EXAMS = of_ids({"validation_Art_0": "A", "validation_Art_1": "B"})
CASES |= dict.fromkeys(("mmmu", "mmmu-pro", "mmstar", "ai2d", "realworldqa"), (EXAM, *EXAMS))
CASES |= {name: (READ, *of_ids({0: "nokia", 1: "12"})) for name in ("chartqa", "docvqa", "infovqa", "ocrbench")}
CASES |= {
    "mathvista": (MATH, *of_ids({"1": "(B)", "2": "4"})),
    "hallusionbench": (ILLUSIONS, *of_ids({"VD_illusion_0_0_0": "No.", "VD_illusion_0_0_1": "Yes."})),
    "wilder": (WILD, reviewed(8), reviewed(1)),
}


@pytest.fixture
def labels(tmp_path: Path) -> Callable[[str], list[str]]:
    def write(name: str) -> list[str]:
        if name == "mme":
            suite.write(tmp_path / "mme/existence/1.txt", MME)
            return [str(tmp_path / "mme")]
        return [suite.write(tmp_path / "coco_pope_random.json", CASES[name][0])]

    return write


def of(name: str, folder: Path, lines: Lines, labels: list[str]) -> dict[str, Any]:
    return score(name, suite.write(folder / "answers.jsonl", suite.jsonl(lines)), labels, [])[0]


def numbers(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores alone."""
    return {
        name: numbers(value) if isinstance(value, dict) else value
        for name, value in scores.items()
        if name not in (*COUNTS, "empty", "cut_off")
    }


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.score])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_answer_scores_as_a_wrong_one(tmp_path: Path, labels, name: str, data: st.DataObject):
    """Whichever answers there are."""
    _, right, wrong = CASES[name]
    chosen = data.draw(st.lists(st.none() | st.sampled_from(ABSENT), min_size=len(right), max_size=len(right)))
    files = labels(name)
    given_ = [line | (absent[0] if absent else {}) for line, absent in zip(right, chosen, strict=True)]
    failed = [line if absent is None else other for line, other, absent in zip(right, wrong, chosen, strict=True)]
    scores = of(name, tmp_path, given_, files)
    assert numbers(scores) == numbers(of(name, tmp_path, failed, files))
    for count in ("empty", "cut_off"):
        assert scores.get(count, 0) == sum(absent is not None and absent[1] == count for absent in chosen)


@pytest.mark.parametrize("name", CASES)
def test_thinking_does_not_change_a_score(tmp_path: Path, labels, name: str):
    files = labels(name)
    for lines in CASES[name][1:]:
        thought = [line | {"text": f"<think>\nyes or no, A or B?\n</think>\n\n{line['text']}"} for line in lines]
        assert of(name, tmp_path, thought, files) == of(name, tmp_path, lines, files)


def test_the_table_counts_what_is_absent(tmp_path: Path, labels, capsys: pytest.CaptureFixture[str]):
    """Six empty answers of POPE were 66.67 of F1 once."""
    lines = [line | {"text": ""} for line in CASES["pope"][1]]
    file = suite.write(tmp_path / "a.jsonl", suite.jsonl(lines))
    evaluate.main(["score", "pope", "--answers", file, "--labels", *labels("pope")])
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert (rows["accuracy"], rows["recall"], rows["yes_ratio"], rows["empty"]) == ("0.00", "0.00", "0.00", "3")
    with pytest.raises(UserError, match="line 1: the answer is no text but 7"):
        of("pope", tmp_path, [line | {"text": 7} for line in lines], labels("pope"))


def test_outcomes_show_no_thinking(tmp_path: Path, labels):
    lines = [line | {"text": f"<think>So.</think>{line['text']}"} for line in CASES["easy-vqa"][1][:1]]
    lines.append(CASES["easy-vqa"][1][1] | FILTERED)
    file = suite.write(tmp_path / "a.jsonl", suite.jsonl(lines))
    write_outcomes(tmp_path / "e.outcomes.jsonl", score("easy-vqa", file, labels("easy-vqa"), [])[1])
    found = [json.loads(line) for line in (tmp_path / "e.outcomes.jsonl").read_text().splitlines()]
    assert [(outcome["answer"], outcome["score"]) for outcome in found] == [("yes", 1.0), ("", 0.0)]


def test_outcomes_of_reviews_show_no_thinking(tmp_path: Path):
    reviews = [{"question_id": i, "content": "8 4", "tuple": [8, 4]} for i in (1, 2)]
    said = [{"question_id": 1, "text": "<think>So.</think>Yes"}, {"question_id": 2, "text": None}]
    files = [suite.write(tmp_path / name, suite.jsonl(lines)) for name, lines in (("r", reviews), ("a", said))]
    out = tmp_path / "b.outcomes.jsonl"
    evaluate.main(["score", "llava-bench", f"--reviews={files[0]}", f"--answers={files[1]}", f"--outcomes={out}"])
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == ["Yes", ""]


def test_scienceqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "splits.json").write_text(json.dumps({"test": list(TEXTS)}))
    texts = {"4": "<think>The answer is B.</think>A", "5": None, "6": "The answer is C. <think>", "9": "", "10": "B"}
    lines = [suite.answer(ident, text) for ident, text in texts.items()]
    lines[3] |= FILTERED
    for content in (suite.jsonl(lines), json.dumps({"outputs": texts})):
        (tmp_path / "answers").write_text(content)
        evaluate.main(["score", "scienceqa", "--json", f"--results={tmp_path / 'answers'}",
                       f"--problems={tmp_path / 'problems.json'}", f"--splits={tmp_path / 'splits.json'}"])  # fmt: skip
        scores = json.loads(capsys.readouterr().out)
        assert {name: scores[name] for name in ("Avg", "correct", "failed", "empty", "cut_off")} == {
            "Avg": 40.0, "correct": 2, "failed": 3, "empty": 2, "cut_off": 1,
        }  # fmt: skip


def test_reviews_of_no_answer_have_the_lowest_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """However much a judge gives."""
    reviews = [
        {"question_id": 0, "content": "<think>1 1\nor</think>10 10\nFine.", "no_answer": "empty"},
        {"question_id": 1, "content": "10 7"},
        {"question_id": 2, "content": "<think>\nI would give 9 9"},
    ]
    file = suite.write(tmp_path / "r.jsonl", suite.jsonl(reviews))
    evaluate.main(["score", "llava-bench", "--json", "--reviews", file])
    assert json.loads(capsys.readouterr().out)["all"] == {
        "relative": 40.0, "reference": 10.0, "model": 4.0, "n": 2, "failed": 1, "empty": 1,
    }  # fmt: skip


def test_a_submission_tells_what_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [suite.answer("q1", "<think>No</think>Yes"), suite.answer("q2", ""), suite.answer("q3", "") | FILTERED]
    out = suite.submit(tmp_path, "gqa", lines)
    assert [entry["prediction"] for entry in json.loads(out.read_text())] == ["yes", "", ""]
    assert "questions without an answer (2 empty) are handed in as such" in capsys.readouterr().err
