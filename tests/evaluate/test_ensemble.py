"""The paper's two ensembles: counted by hand, and judged by a scripted server."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate

ANSWERS = {"1": 0, "2": 1, "3": 0, "4": 1, "5": 2}
OURS = {"1": "A", "2": "A", "3": "A", "4": "B", "5": "None of them."}
OTHER = {"1": "The answer is A.", "2": "The answer is B.", "3": "There is no picture here.", "4": "The answer is A.",
         "5": "None of them."}  # fmt: skip


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments that name the files: ours is JSONL, the other a result JSON of the original."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    rest = {"question": "Which?", "choices": ["a", "b", "c"], "hint": "", "image": None, "grade": "grade1",
            "subject": "natural science"}  # fmt: skip
    contents = {
        "problems": json.dumps({ident: rest | {"answer": answer} for ident, answer in ANSWERS.items()}),
        "splits": json.dumps({"test": list(ANSWERS)}),
        "ours": "".join(json.dumps({"question_id": ident, "text": text}) + "\n" for ident, text in OURS.items()),
        # As older versions of the original have it, with a guess where there is no option.
        "other": json.dumps({"outputs": OTHER, "results": {"1": 0, "2": 1, "3": 2, "4": 0, "5": 2}}),
    }
    args = []
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        args += [f"--{name}", str(tmp_path / name)]
    return args


def score(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    evaluate.main(["score", "scienceqa-ensemble", "--json", *args])
    return json.loads(capsys.readouterr().out)


def test_complement(args: list[str], capsys: pytest.CaptureFixture[str]):
    """1 and 2 by the other, 3 by ours since the other has nothing, 4 wrongly by the other; 5 by neither."""
    result = score(capsys, *args)
    assert (result["Avg"], result["correct"], result["failed"]) == (60.0, 3, 1)
    assert (result["differ"], result["other_failed"], result["upper"]) == (3, 2, 80.0)


def test_answers_that_are_none_are_counted(tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]):
    ours = [{"question_id": ident, "text": None if ident == "1" else text} for ident, text in OURS.items()]
    (tmp_path / "ours").write_text("".join(json.dumps(line) + "\n" for line in ours))
    (tmp_path / "other").write_text(json.dumps({"outputs": OTHER | {"2": "<think>So", "3": " "}}))
    result = score(capsys, *args)
    assert {name: result[name] for name in ("ours_empty", "other_empty", "other_cut_off")} == {
        "ours_empty": 1, "other_empty": 1, "other_cut_off": 1,
    }  # fmt: skip


def test_indices_serve_where_there_are_no_texts(tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]):
    """Of 3 and 5 the other guessed the last option, which is right once."""
    (tmp_path / "other").write_text(json.dumps({"results": {"1": 0, "2": 1, "3": 2, "4": 0, "5": 2}}))
    result = score(capsys, *args)
    assert (result["correct"], result["other_failed"], result["failed"]) == (3, 0, 0)
    with pytest.raises(UserError, match="stores no texts"):
        evaluate.main(["judge", "scienceqa", *args, "--judge", "gpt-4", "--output", str(tmp_path / "j.jsonl")])


def test_judge(tmp_path: Path, args: list[str], capsys: pytest.CaptureFixture[str]):
    """Asked are 2, 3 and 4: it is right about 2, has nothing on 3, where ours stays, and nothing on 4 at first."""
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> str:
        content = body["messages"][-1]["content"]
        asked.append(content)
        if "The answer is B." in content:
            return "Clearly. The answer is B."
        if "no picture" in content:
            return "The answer is A. Or: The answer is B."
        return "Well." if sum("[Answer 2]\nB" in text for text in asked) < 2 else "The answer is B."

    output = str(tmp_path / "judged.jsonl")
    with ScriptedLLM(reply=reply) as server:
        for _ in range(2):
            evaluate.main(["judge", "scienceqa", *args, "--judge", "gpt-4", "--output", output, "--attempts", "2",
                           "--base-url", server.url])  # fmt: skip
    assert len(asked) == 5 and "Context: none\nOptions: (A) a (B) b (C) c" in asked[0]
    result = score(capsys, *args, "--judged", output)
    assert (result["correct"], result["total"], result["failed"], result["judge_failed"]) == (4, 5, 1, 1)
    assert result["judge"] == "gpt-4" and len(result["prompt_hash"]) == 64
    lines = Path(output).read_text().splitlines(keepends=True)
    Path(output).write_text("".join(lines[:2]))
    with pytest.raises(UserError, match="no answer to 1 of 3 questions, 4 the first"):
        score(capsys, *args, "--judged", output)
    Path(output).write_text("".join([*lines, json.dumps({"question_id": "1", "text": "A"}) + "\n"]))
    with pytest.raises(UserError, match="line 4: judges problem 1, on which the two do not differ"):
        score(capsys, *args, "--judged", output)
