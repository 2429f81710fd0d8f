"""Predicting with a model behind an API, against a scripted server."""

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
from llava_jax.llm_api.cost import estimate_tokens, most_tokens


def look(body: dict[str, Any]) -> str:
    """The size of the picture, and the question."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return f" no picture: {content}"
    picture, text = content
    _, _, data = picture["image_url"]["url"].partition("data:image/png;base64,")
    return f"{Image.open(io.BytesIO(base64.b64decode(data))).size} {text['text']}\n"


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


def test_mistakes(files):
    with ScriptedLLM() as server:
        with pytest.raises(UserError, match="--budget needs --prices"):
            predict(files, server, "--budget=1")
        (files / "images/0.png").write_bytes(b"none")
        with pytest.raises(UserError, match="question sample-0: picture 0.png: is none"):
            predict(files, server)
        with pytest.raises(UserError, match="--picture-last and --answer-prompter are for checkpoints"):
            predict(files, server, "--answer-prompter")
        with pytest.raises(UserError, match="--endpoint needs --model"):
            evaluate.main(["predict", "pope", "--questions=q", "--output=a", f"--endpoint={server.url}"])


def test_pictures_cost_tokens():
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "Is it?"}]}]
    assert 1000 < estimate_tokens(messages) < 1100 < most_tokens(messages) < 20_000
