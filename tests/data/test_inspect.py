"""What the model will see, as files and on the screen."""

import json
from pathlib import Path

import pytest
import tiny
from PIL import Image
from rich.console import Console

from llava_jax.cli import UserError
from llava_jax.data.inspect import TARGET, main, view
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import encode_sample


@pytest.fixture
def data(tmp_path):
    samples = [
        {
            "id": i,
            "image": "absent.jpg",
            "conversations": [
                {"from": "human", "value": f"What [b]number[/b] is it?\n<image>{text}"},
                {"from": "gpt", "value": f"It is {i}."},
            ],
        }
        for i, text in enumerate(["", "</s>", "日本 🧑‍🚀"])
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    return path


def test_jsonl(data, tokenizer, tmp_path, capsys):
    directory, out = tmp_path / "tokenizer", tmp_path / "out.jsonl"
    tokenizer.save_pretrained(directory)
    args = ["--json", str(data), "--tokenizer", str(directory), "--template", "v1", "--image-position", "random"]
    main([*args, "--seed", "5", "--jsonl", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2"]
    for line, sample in zip(lines, LlavaJson(data), strict=True):
        encoded = encode_sample(sample, get_template("v1"), tokenizer, image_position="random", seed=5)
        assert line["input_ids"] == encoded.input_ids.tolist() and line["labels"] == encoded.labels.tolist()
        text = [(token, name) for token, name in zip(line["input_ids"], line["tokens"], strict=True) if token >= 0]
        assert tokenizer.convert_tokens_to_ids([name for _, name in text]) == [token for token, _ in text]
        assert line["tokens"][line["input_ids"].index(-200)] == "<image>"
    capsys.readouterr()
    main([*args, "--limit", "1", "--jsonl", "-"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["id"] == "0"


def test_view_marks_what_is_learned(data, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path)
    main(["--json", str(data), "--tokenizer", str(tmp_path), "--template", "v1", "--limit", "1"])
    shown = capsys.readouterr().out
    assert "<image>" in shown and "What [b]number[/b] is it?" in shown
    assert shown.rstrip().removesuffix("⟧").split("⟦")[1].strip() == "It is 0.</s>"
    encoded = encode_sample(LlavaJson(data)[0], get_template("v1"), tokenizer)
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(view(encoded, tokenizer))
    (start, end) = next((span.start, span.end) for span in view(encoded, tokenizer).spans if span.style == TARGET)
    assert "\x1b[1;32m" in capture.get() and "It is 0." in view(encoded, tokenizer).plain[start:end]


def test_without_a_template_it_is_the_tokenizers_own(data, smollm2_dir, bare_llama_dir, capsys):
    args = ["--json", str(data), "--jsonl", "-", "--tokenizer"]
    main([*args, str(smollm2_dir), "--template", "chatml"])
    expected = capsys.readouterr()
    main([*args, str(smollm2_dir)])
    shown = capsys.readouterr()
    assert shown.out == expected.out and "template chatml, which is the tokenizer's own chat template" in shown.err
    with pytest.raises(UserError, match="has no chat template: name the template"):
        main([*args, str(bare_llama_dir)])


def test_images_are_read_only_where_their_folder_is_given(data, bare_llama_dir, tmp_path, capsys):
    args = ["--json", str(data), "--tokenizer", str(bare_llama_dir), "--template", "v1"]
    main(args)
    assert "pixels" not in capsys.readouterr().out
    samples = json.loads(data.read_text())
    samples[1]["image"] = "[b]wide.png"
    del samples[2]["image"]
    samples[2]["conversations"][0]["value"] = "Text only"
    data.write_text(json.dumps(samples))
    images = tmp_path / "images"
    with pytest.raises(UserError, match="images: no such folder of images"):
        main([*args, "--images", str(images)])
    images.mkdir()
    Image.new("RGB", (30, 20)).save(images / "absent.jpg")
    Image.new("RGB", (7, 5)).save(images / "[b]wide.png")
    main([*args, "--images", str(images)])
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "pixels" in line] == ["absent.jpg: 30 x 20 pixels", "[b]wide.png: 7 x 5 pixels"]
    main([*args, "--images", str(images), "--jsonl", "-"])
    lines = [json.loads(line)["images"] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        [{"name": "absent.jpg", "width": 30, "height": 20}],
        [{"name": "[b]wide.png", "width": 7, "height": 5}],
        [],
    ]
    (images / "absent.jpg").write_bytes((images / "absent.jpg").read_bytes()[:200])
    with pytest.raises(UserError, match="sample 0: image absent.jpg is damaged"):
        main([*args, "--images", str(images)])
    (images / "absent.jpg").unlink()
    with pytest.raises(UserError, match="sample 0: .*absent.jpg: No such file"):
        main([*args, "--images", str(images)])


def test_bad_input(data, bare_llama_dir, tmp_path, capsys):
    args = ["--json", str(data), "--tokenizer", str(bare_llama_dir), "--template"]
    with pytest.raises(UserError, match="did you mean v1"):
        main([*args, "v1_"])
    with pytest.raises(UserError, match="cannot be written"):
        main([*args, "v1", "--jsonl", str(tmp_path / "absent" / "out.jsonl")])
    for more in (["v1", "--image-position", "last"], ["v1", "--limit", "-1"]):
        with pytest.raises(SystemExit) as exit_status:
            main([*args, *more])
        assert exit_status.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example:" in capsys.readouterr().out
    data.write_text(json.dumps([{"id": "mute", "conversations": [{"from": "human", "value": "hi"}]}]))
    with pytest.raises(UserError, match="sample mute: nothing to learn"):
        main([*args, "v1"])


def test_a_file_is_there_once_it_is_whole(data, tokenizer, tmp_path):
    directory, out = tmp_path / "tokenizer", tmp_path / "out.jsonl"
    tokenizer.save_pretrained(directory)
    out.write_text("precious")
    samples = json.loads(data.read_text())
    samples[2]["conversations"] = samples[2]["conversations"][:1]  # nothing to learn
    data.write_text(json.dumps(samples))
    with pytest.raises(UserError, match="sample 2: nothing to learn"):
        main(["--json", str(data), "--tokenizer", str(directory), "--template", "v1", "--jsonl", str(out)])
    assert out.read_text() == "precious" and not list(tmp_path.glob("*.partial"))


def test_devices_and_links_stay_what_they_are(data, tokenizer, tmp_path):
    directory, target, link = tmp_path / "tokenizer", tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    tokenizer.save_pretrained(directory)
    target.touch()
    link.symlink_to(target)
    for out in ("/dev/null", link):
        main(["--json", str(data), "--tokenizer", str(directory), "--template", "v1", "--jsonl", str(out)])
    assert link.is_symlink() and len(target.read_text().splitlines()) == 3
    assert not Path("/dev/null").is_file()


def test_escapes_are_visible(tokenizer, tmp_path, capsys):
    turns = [{"from": "human", "value": f"<image>{tiny.ESCAPES}"}, {"from": "gpt", "value": f"Yes.{tiny.ESCAPES}"}]
    sample = {"id": f"x{tiny.ESCAPES}", "image": "a.png", "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([sample]))
    tokenizer.save_pretrained(tmp_path)
    main(["--json", str(tmp_path / "data.json"), "--tokenizer", str(tmp_path), "--template", "v1"])
    shown = capsys.readouterr().out
    assert not tiny.obeyed(shown) and shown.count("\\x1b[31m") == 3
