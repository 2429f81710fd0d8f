"""MM-Vet: grades by a scripted judge, scored and compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate

LABELS = {
    "v1_0": {"imagename": "0.jpg", "question": "What is x?", "answer": "-1 <AND> -5", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "1.jpg", "question": "Which town?", "answer": "Delft <OR> Leiden", "capability": ["know"]},
    "v1_2": {"imagename": "2.jpg", "question": "How many?", "answer": "two", "capability": ["rec"]},
}
TEXTS = {"v1_0": "x = -1", "v1_1": "Leiden", "v1_2": "some"}


def test_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    labels, answers, output = tmp_path / "mm-vet.json", tmp_path / "answers.jsonl", tmp_path / "grades.jsonl"
    labels.write_text(json.dumps(LABELS))
    answers.write_text("".join(json.dumps({"question_id": i, "text": t}) + "\n" for i, t in TEXTS.items()))
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> str:
        """Half a point; a whole one, the second time it is asked; nothing that is a grade."""
        content = body["messages"][-1]["content"]
        asked.append(content)
        if "-1 <AND> -5\nAnswer: x = -1\n" in content:
            return "0.5"
        if "Answer: Leiden" in content:
            return "1.0" if sum("Answer: Leiden" in text for text in asked) == 2 else "Grade?"
        return "7"

    args = ["judge", "mm-vet", "--answers", str(answers), "--labels", str(labels), "--judge", "gpt-4", "--output",
            str(output), "--attempts", "2"]  # fmt: skip
    with ScriptedLLM(reply=reply) as server:
        for _ in range(2):
            evaluate.main([*args, "--base-url", server.url])
    assert len(asked) == 1 + 2 + 2
    run = tmp_path / "run"
    run.mkdir()
    capsys.readouterr()
    evaluate.main(["score", "mm-vet", "--answers", str(output), "--labels", str(labels), "--outcomes",
                   str(run / "mm-vet.outcomes.jsonl"), "--json"])  # fmt: skip
    scores = json.loads(capsys.readouterr().out)
    assert scores["score"] == 75 and scores["by_capability"] == {"know": 100, "math": 50, "ocr": 50}
    assert (scores["total"], scores["failed"], scores["judge"]) == (2, 1, "gpt-4") and len(scores["prompt_hash"]) == 64
    evaluate.main(["report", str(run), "--json", "--resamples", "10"])
    report = json.loads(capsys.readouterr().out)
    values = {row["category"]: row["values"]["run"] for row in report["rows"]}
    assert values["all"]["value"] == 75 and values["math"]["value"] == 50
    assert report["judges"]["mm-vet"][0]["judge"] == "gpt-4"
    answers.write_text(json.dumps({"question_id": "v1_9", "text": ""}))
    with pytest.raises(UserError, match="question 9 has none of the 3 labels: .*; all have to be answered"):
        evaluate.main(args)


def test_no_answer_has_the_grade_0_and_no_judge_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels, answers, output = tmp_path / "mm-vet.json", tmp_path / "answers.jsonl", tmp_path / "grades.jsonl"
    labels.write_text(json.dumps(LABELS))
    lines = [{"question_id": "v1_0", "text": ""}, {"question_id": "v1_1", "text": "<think>Delft?</think>Leiden"},
             {"question_id": "v1_2", "text": None, "metadata": {"no_answer": "cut off at --max-tokens"}}]  # fmt: skip
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked: list[str] = []
    args = ["--labels", str(labels)]
    with ScriptedLLM(
        reply=lambda body: asked.append(body["messages"][-1]["content"]) or "<think>0</think>1.0"
    ) as server:
        evaluate.main(["judge", "mm-vet", "--answers", str(answers), *args, "--judge", "gpt-4", "--output", str(output),
                       "--base-url", server.url])  # fmt: skip
    assert len(asked) == 1 and "Answer: Leiden\n" in asked[0]
    capsys.readouterr()
    evaluate.main(["score", "mm-vet", "--answers", str(output), *args, "--json"])
    scores = json.loads(capsys.readouterr().out)
    expected = {"score": 33.33, "total": 3, "failed": 0, "empty": 1, "cut_off": 1}
    assert {name: scores[name] for name in expected} == expected


def test_outcomes_of_labelled_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The report's percentages are the scores'."""
    sample = {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat colour?"},
                                                             {"from": "gpt", "value": "red"}]}  # fmt: skip
    samples = [sample, {**sample, "id": "b"}, {**sample, "id": "c"}]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(samples))
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"question_id": i, "prompt": "What colour?", "text": t}
        for i, t in zip("abc", ("red", "blue", "red"), strict=True)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["score", "easy-vqa", "--answers", str(answers), "--labels", str(labels), "--questions", str(labels),
                   "--outcomes", str(tmp_path / "easy-vqa.outcomes.jsonl"), "--json"])  # fmt: skip
    scores = json.loads(capsys.readouterr().out)
    evaluate.main(["report", str(tmp_path), "--json", "--resamples", "10"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["category"] for row in rows] == ["all", "colour"]
    assert round(rows[0]["values"][tmp_path.name]["value"], 2) == scores["accuracy"] == 66.67
    first = json.loads((tmp_path / "easy-vqa.outcomes.jsonl").read_text().splitlines()[0])
    assert (first["image"], first["question"], first["reference"]) == ("a.png", "What colour?", "red")
