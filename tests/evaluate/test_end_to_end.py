"""LLaVA-Bench from a checkpoint to scores: every step by its command, the judge and the reference a scripted server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from scripted_llm import ScriptedLLM

from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks.llava_bench_judge import SYSTEM

CATEGORIES = ("conv", "detail", "complex")
REFERENCE = "It is of one colour."


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def language_model(body: dict[str, Any]) -> str:
    """Answers from descriptions; as a judge it gives the reference 8, and the model 6 in the first category and 4 in
    others, but never a score for the last question."""
    system, user = (message["content"] for message in body["messages"])
    if system != SYSTEM:
        return REFERENCE
    number = int(re.search(r"Question ([0-9])", user)[1])
    return "I cannot say." if number == 5 else f"8 {6 if number % 3 == 0 else 4}\nBecause."


def test_from_a_checkpoint_to_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    model = tiny.checkpoint(tmp_path)
    _, images = tiny.data(tmp_path, samples=6)
    asked = [{"question_id": i, "image": f"{i}.png", "text": f"Question {i}?", "category": CATEGORIES[i % 3]}
             for i in range(6)]  # fmt: skip
    questions = write(tmp_path / "questions.jsonl", asked)
    context = write(tmp_path / "context.jsonl", [{"image": f"{i}.png", "caption": f"Picture {i}."} for i in range(6)])
    answers, reference, reviews = (str(tmp_path / f"{name}.jsonl") for name in ("answers", "reference", "reviews"))
    outcomes = str(tmp_path / "run" / "llava-bench.outcomes.jsonl")
    (tmp_path / "run").mkdir()
    with ScriptedLLM(reply=language_model) as server:
        api = ["--base-url", server.url]
        for command in (
            ["predict", "llava-bench", "--questions", questions, "--images", str(images), "--checkpoint", str(model),
             "--max-new-tokens", "4", "--output", answers],
            ["reference", "llava-bench", "--questions", questions, "--context", context, "--model", "gpt-4",
             "--output", reference, *api],
            ["judge", "llava-bench", "--questions", questions, "--context", context, "--reference", reference,
             "--answers", answers, "--judge", "gpt-4", "--attempts", "2", "--output", reviews, *api],
        ):  # fmt: skip
            evaluate.main(command)
        assert server.completions == 6 + 6 + 1
    predicted = {line["question_id"]: line["text"] for line in read(tmp_path / "answers.jsonl")}
    assert sorted(predicted) == list(range(6)) and {line["text"] for line in read(tmp_path / "reference.jsonl")} == {
        REFERENCE
    }
    assert read(tmp_path / "reviews.jsonl")[0]["answer_model"] == "model"
    capsys.readouterr()
    evaluate.main(["score", "llava-bench", "--reviews", reviews, "--questions", questions, "--answers", answers,
                   "--reference", reference, "--outcomes", outcomes, "--json"])  # fmt: skip
    scores = json.loads(capsys.readouterr().out)
    found = {name: (part["relative"], part["n"], part["failed"]) for name, part in scores.items()}
    assert found == {
        "all": (60.0, 5, 1), "llava_bench_conv": (75.0, 2, 0), "llava_bench_detail": (50.0, 2, 0),
        "llava_bench_complex": (50.0, 1, 1),
    }  # fmt: skip
    assert scores["all"]["judge"] == "gpt-4" and len(scores["all"]["prompt_hash"]) == 64
    evaluate.main(["report", str(tmp_path / "run"), "--json", "--resamples", "10"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["category"]: row["values"]["run"]["value"] for row in rows}["all"] == 60
    assert read(Path(outcomes))[0]["answer"] == predicted[0]
