"""Predicting with a model behind an API, against a scripted server."""

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.llm_api import options, retry
from llava_jax.llm_api.cost import estimate_tokens, max_prompt_tokens


def look(body: dict[str, Any]) -> str:
    """The size of the picture, and the question."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return f" no picture: {content}"
    picture, text = content
    _, _, data = picture["image_url"]["url"].partition("data:image/png;base64,")
    return f"{Image.open(io.BytesIO(base64.b64decode(data))).size} {text['text']}\n"


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF", 0.01)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.data(tmp_path, samples=4)
    return tmp_path


def predict(files: Path, server: ScriptedLLM, *more: str) -> list[dict[str, Any]]:
    given = [f"--questions={files / 'data.json'}", f"--images={files / 'images'}", f"--output={files / 'a.jsonl'}"]
    evaluate.main(["predict", "easy-vqa", *given, f"--endpoint={server.url}", "--model=m", *more])
    return [json.loads(line) for line in (files / "a.jsonl").read_text().splitlines()]


def test_an_endpoint_is_shown_the_pictures_and_asked_once(files):
    with ScriptedLLM(reply=look, faults={"error": 0.3}) as server:
        answers = predict(files, server)
        asked = server.completions
        assert [line["text"] for line in answers[2:]] == ["(24, 20) What colour is it?", "no picture: Say white."]
        assert answers[0]["model_id"] == "m" and answers[0]["question_id"] == "sample-0"
        (files / "a.jsonl").unlink()
        assert predict(files, server) == answers and server.completions == asked  # the ledger knows them


def test_no_answer_is_a_wrong_one(files, capsys):
    with ScriptedLLM(reply=lambda body: " ") as server:
        assert [line["text"] for line in predict(files, server)] == [""] * 4
    assert "question sample-0: no answer (empty), which counts as wrong" in capsys.readouterr().err


THINKING = "<think>\nIs it white? I can't see it.\n</think>\n\nblack"


def scored(files: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    given = [f"--answers={files / 'a.jsonl'}", f"--labels={files / 'data.json'}", "--json"]
    evaluate.main(["score", "easy-vqa", *given])
    return json.loads(capsys.readouterr().out)


def test_the_answer_is_what_follows_the_thinking(files):
    with ScriptedLLM(reply=lambda body: THINKING) as server:
        assert [line["text"] for line in predict(files, server)] == ["black"] * 4


@pytest.mark.parametrize("finish_reason", ["length", "stop"])
def test_thinking_without_an_end_is_no_answer(files, capsys, finish_reason):
    """It is counted as such, and asked again with more tokens."""
    with ScriptedLLM(reply=lambda body: "<think>\nIs it white?", finish_reason=finish_reason) as server:
        lines = predict(files, server)
        assert server.completions == 4  # the same limit would cut it again
        assert [line["text"] for line in lines] == [None] * 4
        assert lines[0]["metadata"]["no_answer"] == "cut off at --max-tokens"
        err = capsys.readouterr().err
        assert "question sample-3: no answer (cut off at --max-tokens), which counts as wrong" in err
        assert (
            "cut off while it thought, 4 times: the same command asks these questions again with a larger --max-tokens"
            in err
        )
        assert scored(files, capsys)["cut_off"] == 4
        server.script.reply, server.script.finish_reason = (lambda body: "<think>a</think>white"), "stop"
        more = predict(files, server, "--max-new-tokens=99", f"--ledger={files / 'more'}")
        assert {line["text"] for line in more} == {"white"}


def test_an_answer_that_was_cut_off_counts_as_far_as_it_goes(files, capsys):
    with ScriptedLLM(reply=lambda body: "white, since it", finish_reason="length") as server:
        assert [line["text"] for line in predict(files, server)] == ["white, since it"] * 4
    assert "warning: 4 answers were cut off at --max-tokens and count as far as they go" in capsys.readouterr().err


def test_a_thinking_models_cut_off_answers_are_thoughts(files, capsys):
    """Some servers send no opening mark: what was cut off before the closing one is told by the other answers."""
    texts = iter(["Is it white? Or", *["I think so.</think>white"] * 3])

    with ScriptedLLM(reply=lambda body: next(texts), finish_reason="length") as server:
        told = [line["text"] for line in predict(files, server)]
    assert sorted(map(str, told)) == ["None", "white", "white", "white"]
    assert "cut off while it thought, 1 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "finish_reason", "why"),
    [
        ({"content": None, "reasoning_content": "It is white."}, "stop", "empty"),
        ({"content": None}, "content_filter", "stopped by a filter"),
        ({"content": None, "refusal": "I can't say."}, "stop", "stopped by a filter: I can't say."),
    ],
)
def test_no_text_is_no_answer(files, capsys, message, finish_reason, why):
    """What the server thinks or refuses apart from the answer is none of it."""
    body = {"choices": [{"message": message, "finish_reason": finish_reason}]}
    with ScriptedLLM(raw=lambda _: body) as server:
        lines = predict(files, server)
    assert [(line["text"], line["metadata"]["no_answer"]) for line in lines] == [(None, why)] * 4
    scores = scored(files, capsys)
    assert (scores["accuracy"], scores["empty"]) == (0.0, 4)


def test_what_fails_for_a_while_stays_open(files):
    """It is no answer, no file says so, and the same command asks again."""
    error = {"choices": None, "error": {"message": "Provider returned error", "code": 502}}
    with ScriptedLLM(raw=lambda body: error if "Say white" in json.dumps(body) else None, reply=look) as server:
        with pytest.raises(UserError, match="1 of 4 questions have no answer yet, sample-3 the first .server-error"):
            predict(files, server, "--concurrency=1")
        assert not (files / "a.jsonl").exists()
        asked, server.script.raw = server.completions, lambda body: None
        assert all(line["text"] for line in predict(files, server)) and server.completions == asked + 1


def test_the_options_of_an_endpoint_are_those_of_judges(files, capsys, monkeypatch):
    bodies: list[dict[str, Any]] = []
    with ScriptedLLM(reply=lambda body: bodies.append(body) or "white") as server:
        given = ["predict", "easy-vqa", f"--questions={files / 'data.json'}", f"--images={files / 'images'}"]
        evaluate.main([*given, "--model=m", f"--output={files / 'none.jsonl'}", "--dry-run"])
        assert capsys.readouterr().out.startswith("m: 4 requests of about 3,") and not bodies
        predict(files, server, '--body={"max_completion_tokens": 64, "temperature": null}', '--body={"n_best": 2}')
        assert {key: bodies[0][key] for key in bodies[0] if key not in ("messages", "model")} == {
            "max_completion_tokens": 64, "n_best": 2,
        }  # fmt: skip
        (files / "a.jsonl").unlink()
        single = predict(files, server, f"--ledger={files / 'single'}", "--max-tokens=7")
        assert bodies[-1]["max_tokens"] == 7 and bodies[-1]["temperature"] == 0.0
        (files / "a.jsonl").unlink()
        asked = server.completions
        assert predict(files, server, "--batch", "--poll=0.01", f"--ledger={files / 'batched'}") == single
        assert server.completions == asked + 4 and len(server.batches.batches) == 1
        (files / "a.jsonl").unlink()
        given_by_body = ["--top-p=0.5", "--seed=3", '--body={"temperature": 0.7, "max_completion_tokens": null}']
        monkeypatch.setenv("OPENAI_API_KEY", "key\r\n")  # as of a file of another system
        predict(files, server, f"--ledger={files / 'sampled'}", *given_by_body)
        assert {key: bodies[-1][key] for key in bodies[-1] if key not in ("model", "messages")} == {
            "temperature": 0.7, "top_p": 0.5, "seed": 3, "max_tokens": 8,
        }  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "ключ")
    with pytest.raises(UserError, match="OPENAI_API_KEY: holds characters that no key has"):
        evaluate.main([*given, "--model=m", f"--output={files / 'c.jsonl'}"])
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    parser = argparse.ArgumentParser()
    options.add_api_arguments(parser, temperature=0.0, max_tokens=9)
    assert options.work(parser.parse_args([]), "m").settings.base_url == "https://api.openai.com/v1"
    monkeypatch.delenv("OPENAI_API_KEY")
    for wrong, message in (
        (["--model=m"], "no server is given. --base-url URL"),
        (["--model=m", "--base-url=localhost:8000/v1"], "has to begin with http"),
        (["--checkpoint=c", "--body={}"], "--body: is for endpoints, not for a checkpoint"),
        (["--model=m", f"--endpoint={server.url}", "--batch-rows=3"], "--batch-rows: is for checkpoints"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*given, f"--output={files / 'c.jsonl'}", *wrong])
    assert not list(files.glob("c.jsonl*"))


def test_mistakes(files):
    with ScriptedLLM() as server:
        with pytest.raises(UserError, match="--budget needs --prices"):
            predict(files, server, "--budget=1")
        (files / "images/0.png").write_bytes(b"none")
        with pytest.raises(UserError, match="question sample-0: image 0.png: is no image"):
            predict(files, server)
        with pytest.raises(UserError, match="--picture-last and --answer-prompter are for checkpoints"):
            predict(files, server, "--answer-prompter")
        with pytest.raises(UserError, match="--endpoint needs --model"):
            evaluate.main(["predict", "pope", "--questions=q", "--output=a", f"--endpoint={server.url}"])


def test_pictures_cost_tokens():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "Is it?"}]}]
    assert 1000 < estimate_tokens(messages) < 1100 < max_prompt_tokens(messages) < 20_000
