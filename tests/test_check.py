"""Every problem is found, named and counted, and a good data set has none."""

import json

import pytest
from PIL import Image
from transformers import AutoTokenizer

from llava_jax.cli import UserError
from llava_jax.data.check import main

LONG = "word " * 100


def sample(ident, question="<image>\nWhat is it?", answer="A cat.", image="a.png", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": ident, "image": image, "conversations": turns, **fields}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    return folder


def check(tmp_path, images, records, *args):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return main(["--json", str(data), "--images", str(images), *map(str, args)])


def test_a_good_data_set(tmp_path, images, bare_llama_dir, capsys):
    text_only = sample("b", "hi", image=None)
    two = sample("c", "<image><image>", image=["a.png", "a.png"])
    args = ["--tokenizer", bare_llama_dir, "--template", "v1", "--max-length", 2048]
    assert check(tmp_path, images, [sample("a"), text_only, two]) == 0
    assert check(tmp_path, images, [sample("a"), text_only, two], *args) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no problems" in captured.err


@pytest.mark.parametrize(
    ("kind", "record", "detail"),
    [
        ("structure", "{", "line 2: is no JSON"),
        ("structure", {"id": "x"}, "`conversations` is no list"),
        ("role", {"id": "x", "conversations": [{"from": "bot", "value": "a"}]}, 'turn 1 is from "bot"'),
        ("order", sample("x", conversations=[{"from": "gpt", "value": "<image>"}] * 2), "two turns of assistant"),
        ("marks", sample("x", "What is it?"), "0 <image> in the text, but 1 images"),
        ("marks", sample("x", image=None), "1 <image> in the text, but 0 images"),
        ("missing-image", sample("x", image="b.png"), "b.png does not exist"),
        ("bad-image", sample("x", image="broken.png"), "broken.png"),
        ("duplicate-id", sample("good"), "line 2 has the id of"),
        ("empty-answer", sample("x", answer=" \n"), "the answer to question 1 is empty"),
        ("special-token", sample("x", "<image>\n<s>old</s>"), "</s>"),
    ],
)
def test_a_problem_is_a_line(tmp_path, images, capsys, kind, record, detail):
    assert check(tmp_path, images, [sample("good"), record]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith(f"{kind}, ") and detail in line]
    ident = record["id"] if isinstance(record, dict) else "1"
    assert len(lines) == 1 and lines[0].startswith(f"{kind}, {ident}, ")
    assert f"1 {kind}" in captured.err or f"2 {kind}" in captured.err


def test_turns_that_training_drops_or_cannot_learn(tmp_path, images, capsys):
    greeting = sample("x", image=None, conversations=[{"from": "gpt", "value": "Hello!"}])
    unanswered = sample("y", image=None, conversations=[{"from": "human", "value": "Hello?"}])
    assert check(tmp_path, images, [greeting, unanswered]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [
        ["order", "x"],
        ["nothing-learned", "x"],
        ["order", "y"],
        ["nothing-learned", "y"],
    ]


def test_lengths_count_the_tokens_of_images(tmp_path, images, capsys, smollm2_dir):
    records = [sample("short"), sample("long", answer=LONG), sample("text", "hi", LONG, image=None)]
    args = ["--tokenizer", smollm2_dir, "--template", "chatml", "--max-length"]
    assert check(tmp_path, images, records, *args, 128, "--image-tokens", 16) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [["too-long", "long"], ["too-long", "text"]]
    assert "images of 16) will be cut to 128" in lines[0]
    assert check(tmp_path, images, records, *args, 200, "--image-tokens", 16) == 0
    assert check(tmp_path, images, records, *args, 200) == 1


def test_special_tokens_are_the_tokenizers(tmp_path, images, capsys, smollm2_dir):
    records = [sample("a", "<image> <|im_end|>"), sample("b", "<image> <s>")]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # which is no special token of a text
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert check(tmp_path, images, records, "--tokenizer", tmp_path / "tokenizer") == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "special-token, a, warning: the text of a user holds <|im_end|>"


def test_lines_are_whole_and_single(tmp_path, images, capsys):
    names = ["x" * 300 + "\n\ud800.png", "é\u2028.png"]
    assert check(tmp_path, images, [sample(name, image=name) for name in names[1:]] + [sample(names[0], "q")]) == 1
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert [line.split(",")[0] for line in lines] == ["marks", "missing-image"]
    assert "x" * 300 + " \\ud800.png" in lines[0]


def test_all_users_of_a_bad_picture_are_told(tmp_path, images, capsys):
    assert check(tmp_path, images, [sample(str(i), image="b.png") for i in range(600)]) == 1
    assert len(set(capsys.readouterr().out.splitlines())) == 600


def test_bad_arguments(tmp_path, images):
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path, tmp_path / "nowhere", [sample("a")])
    with pytest.raises(UserError, match="no such file"):
        main(["--json", str(tmp_path / "no.json"), "--images", str(images)])
    with pytest.raises(SystemExit):
        check(tmp_path, images, [sample("a")], "--max-length", 5)
