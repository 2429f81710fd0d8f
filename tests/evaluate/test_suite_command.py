"""One command for a table, judges of answers, and their agreement, with a scripted server."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import suite
from tests.evaluate.test_dataset_files import RED, ai2d, parquet
from tests.evaluate.test_rules import MATH
from tests.evaluate.test_suite import answer, jsonl, write


def test_a_table_with_one_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The same command asks nothing again."""
    data, output = tmp_path / "data", tmp_path / "out"
    parquet(data / "ai2d/test-00000-of-00001.parquet", [ai2d(RED, "1"), ai2d(RED, "0")])
    math = [row | {"image": {"bytes": RED}} for row in MATH[:2]]
    parquet(data / "mathvista/testmini-00000-of-00001.parquet", math)
    command = ["suite", "2026", f"--data={data}", f"--output={output}", "--benchmarks", "ai2d", "mathvista", "docvqa"]
    with ScriptedLLM(reply=lambda body: "B") as server:
        for _ in range(2):
            evaluate.main([*command, "--endpoint", server.url, "--model", "tiny-llava"])
        assert server.completions == 4
    printed = capfd.readouterr()
    assert f"{data / 'docvqa'}: has no *.tsv or validation-*.parquet" in printed.err
    results = json.loads((output / "results.json").read_text())
    scores = {(row["benchmark"], row["rule"]): row["score"] for row in results["rows"]}
    rules = ("official", "lmms-eval", "vlmevalkit")
    assert scores == {(name, rule): 50.0 for name in ("ai2d", "mathvista") for rule in rules}
    assert results["model"] == "tiny-llava"
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert [row["score"] for row in rows] == ["50.00"] * 6
    assert (output / "results.md").read_text().count("| ai2d |") == 3
    assert "<td>lmms-eval</td><td>50.00</td>" in (output / "results.html").read_text()
    _, metadata, card = (output / "README.md").read_text().split("---\n", 2)
    (model,) = yaml.safe_load(metadata)["model-index"]
    assert model["results"][1]["metrics"][0] == {
        "type": "score", "name": "lmms-eval rule", "value": 50.0, "verified": False,
    }  # fmt: skip
    assert card.startswith("\n# tiny-llava\n")
    assert sorted(file.name for file in (output / "outcomes").iterdir()) == [
        "ai2d.outcomes.jsonl", "mathvista.outcomes.jsonl",
    ]  # fmt: skip
    with ScriptedLLM(reply=lambda body: "B") as server:  # the first questions only
        few = [option.replace(str(output), f"{output}2") for option in command[:-2]]
        evaluate.main([*few, "--endpoint", server.url, "--model", "tiny-llava", "--limit=1"])
    rows = json.loads((tmp_path / "out2/results.json").read_text())["rows"]
    assert [(row["benchmark"], row["score"]) for row in rows] == [("ai2d", 100.0)] * 3
    evaluate.main([*command, "--dry-run"])
    assert "ai2d: " in capfd.readouterr().out
    with pytest.raises(UserError, match="--benchmarks mm-vet: is not in the table 2026, which has mmmu, "):
        evaluate.main(["suite", "2026", f"--data={data}", f"--output={output}", "--benchmarks", "mm-vet"])
    with pytest.raises(UserError, match="has none of the benchmarks of v1.5"):
        evaluate.main(["suite", "v1.5", f"--data={data}", f"--output={output}"])


def test_the_table_of_the_release(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """A benchmark with a command of its own, one whose server scores it, and one without its images."""
    data, output = tmp_path / "data", tmp_path / "out"
    problem = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "image": "image.png",
               "grade": "grade2", "subject": "natural science", "split": "test"}  # fmt: skip
    asked = [{"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    write(data / "scienceqa/llava_test_CQM-A.json", [{"id": "7", "image": "7.png", "conversations": asked}])
    write(data / "scienceqa/problems.json", {"7": problem})
    write(data / "scienceqa/pid_splits.json", {"test": ["7"]})
    question = {"question_id": 1, "image": "7.png", "text": "Which?"}
    for name in ("test-dev2015", "test2015"):  # the release asks the first
        write(data / f"vqav2/llava_vqav2_mscoco_{name}.jsonl", jsonl([question]))
    write(data / "mm-vet/llava-mm-vet.jsonl", jsonl([question]))
    for folder in ("scienceqa/images/test", "vqav2/test2015"):
        write(data / folder / "7.png", RED)
    with ScriptedLLM(reply=lambda body: "B") as server:
        evaluate.main(
            ["suite", "v1.5", f"--data={data}", f"--output={output}", "--endpoint", server.url, "--model", "m"]
        )
        assert server.completions == 2
    printed = capfd.readouterr()
    assert f"{data / 'mm-vet'}: has no folder images of images; it is left out" in printed.err
    assert "vqav2: answered; next: submission vqav2\n" in printed.out
    rows = {row["benchmark"]: row["score"] for row in json.loads((output / "results.json").read_text())["rows"]}
    assert rows == {"vqav2": None, "scienceqa": 100.0}
    assert (output / "outcomes/scienceqa.outcomes.jsonl").exists()


def judge(folder: Path, name: str, lines: list[dict[str, Any]], labels: str, reply: Any) -> tuple[list[Any], int]:
    answers, out = write(folder / "answers.jsonl", jsonl(lines)), folder / "judged.jsonl"
    with ScriptedLLM(reply=reply) as server:
        evaluate.main(["judge", name, f"--answers={answers}", "--labels", labels, "--judge", "m", f"--output={out}",
                       f"--base-url={server.url}"])  # fmt: skip
        return [json.loads(line) for line in out.read_text().splitlines()], server.completions


def test_a_judge_extracts_what_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = write(tmp_path / "testmini.json", MATH[:3])
    lines = [answer("0", "It is eight."), answer("1", "4"), answer("2", "")]
    judged, asked = judge(tmp_path, "mathvista", lines, labels, lambda body: "B")
    assert asked == 1  # the number needs no judge, and no answer is wrong anyway
    assert [line.get("content") for line in judged] == ["B", None, None]
    capsys.readouterr()
    for rule in ("official", "vlmevalkit"):
        evaluate.main(["score", "mathvista", f"--answers={tmp_path / 'judged.jsonl'}", f"--labels={labels}", "--json",
                       "--as", rule])  # fmt: skip
        scores = json.loads(capsys.readouterr().out)
        assert (scores["score"], scores["failed"], scores["judge"]) == (66.67, 1, "m")


def test_a_judge_sees_the_options_that_a_question_ends_with(tmp_path: Path):
    """As in the Hub's files; and an open question's, as VLMEvalKit has them."""
    files = {
        "mmstar": {"question": "Which?\nOptions: A: red, B: blue", "answer": "B", "l2_category": "x"},
        "realworldqa": {"question": "Which?\nA. red\nB. blue\nPlease answer.", "answer": "B"},
        "mmmu": {"id": "validation_Art_1", "question": "Which?", "question_type": "open", "answer": "blue"},
    }
    for name, row in files.items():
        seen = []
        labels = write(tmp_path / f"{name}.json", [row])
        line = answer(row.get("id", "0"), "It looks like the sky.")
        (tmp_path / name).mkdir()
        judged, asked = judge(tmp_path / name, name, [line], labels, lambda body, seen=seen: seen.append(body) or "B")
        assert asked == 1 and judged[0]["content"] == "B"
        shown = "A. blue\nB. Other" if name == "mmmu" else "B. blue"
        assert shown in seen[0]["messages"][0]["content"]


def test_a_judge_sees_the_questions_of_each_set(tmp_path: Path):
    """MMMU-Pro's have the same ids."""
    row = {"id": "test_Art_1", "options": "['x', 'y']", "answer": "B"}
    labels = write(tmp_path / "sets.json", [row | {"question": "?"}, row])
    lines = [answer("test_Art_1", text) | {"category": kind} for kind, text in (("standard", "Hm"), ("vision", "Oh"))]
    judged, asked = judge(tmp_path, "mmmu-pro", lines, labels, lambda body: "B")
    assert asked == 2 and [line["content"] for line in judged] == ["B", "B"]


def test_options_of_predict_are_known_before_the_first_benchmark(tmp_path: Path):
    write(tmp_path / "data/ai2d/test.json", [])
    parquet(tmp_path / "data/ai2d/test-00000-of-00001.parquet", [ai2d(RED, "0")])
    with pytest.raises(UserError, match="--prompt other: AI2D"):
        evaluate.main(["suite", "2026", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'out'}", "--prompt=other",
                       "--checkpoint=runs/a"])  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert suite._parse(["2026", "--data=d", "--output=o", "--checkpoint=runs/mine/"])[0].name == "mine"
    assert suite._parse(["2026", "--data=d", "--output=o", "--model", "m"])[0].name == "m"


def test_the_judge_of_wilder_sees_the_image(tmp_path: Path):
    rows = [{"question_id": "a", "Question": "What?", "Answer": "A dog.", "image": {"bytes": RED}}]
    labels = parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    seen = []

    def reply(body: dict[str, Any]) -> str:
        seen.append(body["messages"][-1]["content"])
        return "10 8\nFine."

    judged, _ = judge(tmp_path, "wilder", [answer("a", "A cat.")], labels, reply)
    assert judged[0]["content"] == "10 8\nFine."
    image, text = seen[0]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert "[Assistant 1]\nA dog.\n\n[Assistant 2]\nA cat." in text["text"]


def test_agreement_of_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def agree(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
        files = [write(tmp_path / name, jsonl([{"question_id": i} | line for i, line in enumerate(lines)]))
                 for name, lines in (("a.jsonl", first), ("b.jsonl", second))]  # fmt: skip
        evaluate.main(["agreement", *files, "--json"])
        return json.loads(capsys.readouterr().out)

    words = [{"content": word} for word in ("correct", "correct", "incorrect", "incorrect")]
    other = [{"content": word} for word in ("Correct.", "incorrect", "incorrect", "incorrect")]
    # Three of four are the same; by chance it would be half of them: 2/4 x 1/4 + 2/4 x 3/4.
    assert agree(words, other) == {"total": 4, "same": 75.0, "kappa": 0.5}
    reviews = [{"tuple": [10, score], "content": "?"} for score in (2, 5, 8)]
    texts = [{"content": f"10 {score}\nSo."} for score in (3, 6, 9)]
    assert agree(reviews, texts) == {
        "total": 3, "same": 0.0, "kappa": 0.0, "pearson": 1.0, "spearman": 1.0, "difference": 10.0,
    }  # fmt: skip
    assert agree(reviews, [*texts[:2], {"content": "Fine.", "tuple": [-1, -1]}])["total"] == 2
