"""Judging and reference answers against a scripted server, through the commands."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.llm_api import retry

COCO = {
    "image": "1.jpg",
    "captions": ["A dog.", "A dog runs."],
    "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}],
}
WILD = {"image": "2.jpg", "caption": "A fridge with yoghurt."}
QUESTIONS = [
    {"question_id": 0, "image": "1.jpg", "text": "What is it?", "category": "conv"},
    {"question_id": 1, "image": "2.jpg", "text": "What brand?", "category": "detail"},
]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_length(body: dict[str, Any]) -> str:
    """A judge whose score is the length of an answer, and a point more for what it reads first."""
    answers = re.findall(r"\[\w+ \d\]\n(.*?)\n\n\[End of", body["messages"][-1]["content"], re.DOTALL)
    return f"{len(answers[0]) + 1} {len(answers[1])}\nBecause."


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "key")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The arguments that name them."""
    answers = {"reference": ["eight ch", "8 letter"], "answers": ["four", "4444"]}
    args = [
        "--questions",
        write(tmp_path / "q.jsonl", QUESTIONS),
        "--context",
        write(tmp_path / "c.jsonl", [COCO, WILD]),
    ]
    for name, texts in answers.items():
        lines = [
            {"question_id": i, "text": t, "answer_id": f"{name}{i}", "model_id": name} for i, t in enumerate(texts)
        ]
        args += [f"--{name}", write(tmp_path / f"{name}.jsonl", lines[::-1])]  # joined by id, not by order
    return args


def judge(server: ScriptedLLM, files: list[str], output: Path, *more: str) -> None:
    where = ["--output", str(output), "--base-url", server.url]
    evaluate.main(["judge", "llava-bench", *files, "--judge", "gpt-4", *where, *more])


def test_reviews_have_the_published_form(tmp_path: Path, files: list[str]):
    sent = []
    with ScriptedLLM(reply=lambda body: sent.append(body) or by_length(body)) as server:
        judge(server, files, tmp_path / "r.jsonl")
    first, second = read(tmp_path / "r.jsonl")
    hash_ = first.pop("prompt_hash")
    assert first == {
        "id": 1, "question_id": 0, "answer1_id": "reference0", "answer2_id": "answers0", "category": "conv",
        "content": "9 4\nBecause.", "tuple": [9.0, 4.0], "answer_model": "answers", "reference_model": "reference",
        "judge": "gpt-4",
    }  # fmt: skip
    assert second["category"] == "llava_bench_detail" and second["prompt_hash"] == hash_ and len(hash_) == 64
    coco, wild = sorted(body["messages"][-1]["content"] for body in sent)
    assert (
        "[Context]\nA dog.\nA dog runs.\n\ndog: [0, 0, 1, 1]\n\n[Question]\nWhat is it?\n\n[Assistant 1]\neight ch"
        in coco
    )
    assert "fractions" in coco and "fractions" not in wild and "[Context]\nA fridge with yoghurt.\n\n[Question]" in wild
    assert sent[0]["temperature"] == 0.2 and sent[0]["max_tokens"] == 1024


def test_resume_orders_judges_and_repeats(tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]):
    """Every file is there, nothing is asked twice, and the bias of the judge comes out."""
    more = ("gpt-5", "--both-orders", "--repeats", "2")
    files = [*files, "--judge", "gpt-4"]
    output = tmp_path / "r.jsonl"
    args = ["judge", "llava-bench", *files, more[0], *more[1:], "--output", str(output), "--base-url"]
    with ScriptedLLM(reply=by_length) as server:
        evaluate.main([*args, server.url])
        assert server.completions == 2 * 2 * 2 * 2
        names = [f"r.gpt-{judge}.{repeat}.jsonl" for judge in (4, 5) for repeat in (1, 2)]
        texts = [(tmp_path / name).read_text() for name in names]
        for name in names:
            (tmp_path / name).unlink()
        evaluate.main([*args, server.url])
        assert server.completions == 16
    assert texts == [(tmp_path / name).read_text() for name in names]
    swapped = read(tmp_path / names[0])[1]
    assert swapped["swapped"] and swapped["tuple"] == [8.0, 5.0] and swapped["answer1_id"] == "answers0"
    capsys.readouterr()
    evaluate.main(["score", "llava-bench", "--json", "--reviews", *(str(tmp_path / name) for name in names)])
    result = json.loads(capsys.readouterr().out)["all"]
    assert result["position_bias"] == 1.0 and result["order_agreement"] == 1.0 and result["std"] == 0.0
    assert result["judge"] == "gpt-4, gpt-5" and result["relative"] == round(100 * 4.5 / 8.5, 2)


def test_what_cannot_be_parsed_is_asked_again_then_counted(tmp_path: Path, files: list[str]):
    asked: dict[str, int] = {}

    def reply(body: dict[str, Any]) -> str:
        """The second time for one question, never for the other."""
        content = body["messages"][-1]["content"]
        asked[content] = asked.get(content, 0) + 1
        return "8 7" if "A dog" in content and asked[content] == 2 else "Both are fine."

    with ScriptedLLM(reply=reply) as server:
        judge(server, files, tmp_path / "r.jsonl", "--attempts", "3")
        assert sorted(asked.values()) == [2, 3]
        judge(server, files, tmp_path / "r.jsonl", "--attempts", "3")
        assert server.completions == 5
    good, failed = read(tmp_path / "r.jsonl")
    assert good["tuple"] == [8.0, 7.0] and failed["tuple"] == [-1.0, -1.0] and failed["content"] == "Both are fine."


def test_what_a_judge_thinks_is_no_review(tmp_path: Path, files: list[str]):
    """A reply that was cut off counts as far as it goes, since the scores come first, but not within its thinking."""
    texts = {"A dog": "<think>\n9 9\n</think>\n\n8 6\nFine.", "fridge": "<think>\n9 9\nThe second"}
    with ScriptedLLM(
        reply=lambda body: next(text for what, text in texts.items() if what in body["messages"][-1]["content"]),
        finish_reason="length",
    ) as server:
        judge(server, files, tmp_path / "r.jsonl")
        assert server.completions == 2
    good, failed = read(tmp_path / "r.jsonl")
    assert (good["content"], good["tuple"]) == ("8 6\nFine.", [8.0, 6.0])
    assert (failed["content"], failed["tuple"]) == ("no answer: cut off at --max-tokens", [-1.0, -1.0])


def test_answers_to_be_judged_are_read_without_thinking(tmp_path: Path, files: list[str]):
    """No answer of the model is marked as such; a reference without one is a mistake."""
    texts = ["<think>Hm.</think>four", "<think>\nHm"]
    lines = [{"question_id": i, "text": text} for i, text in enumerate(texts)]
    write(tmp_path / "answers.jsonl", lines)
    with ScriptedLLM(reply=by_length) as server:
        judge(server, files, tmp_path / "r.jsonl")
        four, none = read(tmp_path / "r.jsonl")
        assert four["content"] == "9 4\nBecause." and "no_answer" not in four
        assert none["content"] == "9 0\nBecause." and none["no_answer"] == "cut_off"
        write(tmp_path / "reference.jsonl", lines)
        with pytest.raises(UserError, match="question 1: the reference, which counts as 100, has no answer"):
            judge(server, files, tmp_path / "other.jsonl")


def test_a_review_that_the_server_failed_at_is_asked_for_again(tmp_path: Path, files: list[str], capsys):
    error = {"choices": None, "error": {"message": "Provider returned error", "code": 502}}
    with ScriptedLLM(raw=lambda body: error if "fridge" in json.dumps(body) else None, reply=by_length) as server:
        judge(server, files, tmp_path / "r.jsonl", "--concurrency", "1")
        assert "1 of them without scores (1 as the server failed: the same command asks" in capsys.readouterr().err
        failed = read(tmp_path / "r.jsonl")[1]
        assert failed["content"].startswith("no answer: server-error: status 502") and failed["tuple"] == [-1, -1]
        server.script.raw = lambda body: None
        judge(server, files, tmp_path / "r.jsonl")
    assert [review["tuple"] for review in read(tmp_path / "r.jsonl")] == [[9.0, 4.0], [9.0, 4.0]]


def test_batches_bring_what_single_requests_do(tmp_path: Path, files: list[str]):
    """The second round asks again what could not be parsed."""
    asked: list[str] = []

    def reply(body: dict[str, Any]) -> str:
        asked.append(body["messages"][-1]["content"])
        return by_length(body) if len(asked) > 1 else "Well."

    with ScriptedLLM(reply=reply) as server:
        judge(server, files, tmp_path / "batched.jsonl", "--batch", "--poll", "0.01", "--both-orders")
    assert len(asked) == 5
    with ScriptedLLM(reply=by_length) as server:
        judge(server, files, tmp_path / "single.jsonl", "--both-orders")
    assert read(tmp_path / "batched.jsonl") == read(tmp_path / "single.jsonl")


def test_budget_and_changed_work(tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "r.jsonl"
    paid = ("--prices", "0", "1000", "--max-tokens", "1000", "--budget")  # a dollar is kept for each answer
    with ScriptedLLM(reply=by_length) as server:
        judge(server, files, output, "--dry-run", "--prices", "30", "60")
        assert "2 requests of about" in capsys.readouterr().out and server.completions == 0
        with pytest.raises(UserError, match="larger budget"):
            judge(server, files, output, *paid, "1.001")
        assert not output.exists()
        spent = server.completions
        judge(server, files, output, *paid, "5")
        assert spent == 1 and server.completions == 2
        rules = tmp_path / "rule.json"
        rules.write_text(
            json.dumps({name: {"role": "Model", "prompt": "Score."} for name in ("conv", "llava_bench_detail")})
        )
        with pytest.raises(UserError, match="prompt_hash"):
            judge(server, files, output, *paid, "5", "--rule-file", str(rules))
        judge(server, files, tmp_path / "other.jsonl", "--rule-file", str(rules))
    hashes = {review["prompt_hash"] for path in (output, tmp_path / "other.jsonl") for review in read(path)}
    assert len(hashes) == 2
    rules.write_text(json.dumps({"conv": {"role": "Model", "prompt": "Score."}}))
    with pytest.raises(UserError, match="no rule for category llava_bench_detail"):
        judge(server, files, output, "--rule-file", str(rules))


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("q.jsonl", lambda lines: [*lines, lines[0] | {"text": "Why?"}], "line 3: question 0 is there a second"),
    ("c.jsonl", lambda lines: lines[:1], "line 2: question 1: .* no description of its image 2.jpg"),
    ("answers.jsonl", lambda lines: lines[:1], "no answer to 1 of 2 questions, 0 the first"),
    ("answers.jsonl", lambda lines: [*lines, lines[0] | {"text": "No."}], "question 1 was answered in line 1 already"),
    ("reference.jsonl", lambda lines: [*lines, {"question_id": 7, "text": ""}], "question 7 has none of the 2"),
])  # fmt: skip
def test_damage_is_named(tmp_path: Path, files: list[str], name: str, damage: Any, message: str):
    write(tmp_path / name, damage(read(tmp_path / name)))
    with ScriptedLLM() as server, pytest.raises(UserError, match=message):
        judge(server, files, tmp_path / "r.jsonl")


def test_reference_answers(tmp_path: Path, files: list[str]):
    """They come from the description, a second run pays nothing, and they can be judged."""
    sent = []
    output = tmp_path / "ref.jsonl"
    with ScriptedLLM(reply=lambda body: sent.append(body) or "A brown dog.") as server:
        for _ in range(2):
            evaluate.main(["reference", "llava-bench", *files[:4], "--model", "gpt-4", "--output", str(output),
                           "--base-url", server.url])  # fmt: skip
    assert len(sent) == 2 and any("dog: [0, 0, 1, 1]" in body["messages"][-1]["content"] for body in sent)
    first = read(output)[0]
    assert (
        first["text"] == "A brown dog." and first["model_id"] == "gpt-4" and len(first["metadata"]["prompt_hash"]) == 64
    )
    with ScriptedLLM(reply=by_length) as server:
        judge(server, [*files[:4], "--reference", str(output), *files[6:]], tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl")[0]["reference_model"] == "gpt-4"
