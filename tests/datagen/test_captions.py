"""Captions of every form become samples that the check finds clean; what is chosen depends on seed and id alone."""

import collections
import json

import pytest
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data import build, check
from llava_jax.data.sources import LlavaJson
from llava_jax.datagen.__main__ import main
from llava_jax.datagen.caption_files import read_captions
from llava_jax.datagen.instructions import BRIEF, DETAILED

COCO = {
    "info": {"year": 2017},
    "annotations": [
        {"id": 7, "image_id": 2, "caption": "A dog\non grass. "},
        {"id": 8, "image_id": 1, "caption": "A cat."},
        {"id": 9, "image_id": 2, "caption": "A brown dog."},
    ],
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
}
SAMPLE = {
    "id": "x",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}


def write(path, value):
    lines = value if isinstance(value, list) and path.suffix == ".jsonl" else [value]
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def expand(source, output, *args):
    main(["captions", "--captions", str(source), "--output", str(output), *args])
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("a.json", [{"id": 1, "image": "a.jpg", "caption": "A cat."}], [("1", "a.jpg", "A cat.")]),
        ("a.jsonl", [{"image": "d/a.jpg", "caption": " A\tcat. "}], [("a_0", "d/a.jpg", "A cat.")]),
        ("a.json", [{"id": "1", "image": "a.jpg", "blip_caption": "a cat"}], [("1", "a.jpg", "a cat")]),
        ("a.json", [SAMPLE], [("x", "a.jpg", "A cat.")]),
        ("a.json", COCO, [("7", "b.jpg", "A dog on grass."), ("8", "a.jpg", "A cat."), ("9", "b.jpg", "A brown dog.")]),
    ],
)
def test_all_forms(tmp_path, name, value, expected):
    found = [caption[:3] for caption in read_captions(write(tmp_path / name, value))]
    assert found == expected


def test_instructions_and_positions_depend_on_seed_and_id(tmp_path):
    records = [{"id": i, "image": "a.jpg", "caption": "A cät."} for i in range(2000)]
    source = write(tmp_path / "in.json", records)
    samples = expand(source, tmp_path / "out.json")
    questions = [sample["conversations"][0]["value"] for sample in samples]
    before = sum(question.startswith("<image>\n") for question in questions)
    assert 900 < before < 1100 and all(q.startswith("<image>\n") or q.endswith("\n<image>") for q in questions)
    counts = collections.Counter(question.replace("<image>", "").strip() for question in questions)
    assert set(counts) == set(BRIEF) and min(counts.values()) > 2000 / 11 * 0.7
    assert samples[0]["conversations"][1] == {"from": "gpt", "value": "A cät."}

    again = expand(write(tmp_path / "reversed.json", records[::-1]), tmp_path / "again.json")
    assert again[::-1] == samples
    assert expand(source, tmp_path / "seed.json", "--seed", "1") != samples
    detailed = expand(source, tmp_path / "detailed.json", "--style", "detailed")
    assert {s["conversations"][0]["value"].replace("<image>", "").strip() for s in detailed} == set(DETAILED)


def test_the_lists_are_as_long_as_the_papers():
    assert len(set(BRIEF)) == 11 and len(set(DETAILED)) == 16


def test_output_is_clean_and_builds(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8), name == "a" and "red" or "blue").save(folder / f"{name}.jpg")
    expand(write(tmp_path / "coco.json", COCO), tmp_path / "out.json")
    paths = ["--json", str(tmp_path / "out.json"), "--images", str(folder)]
    assert check.main(paths) == 0
    build.main([*paths, "--output", str(tmp_path / "built")])
    assert [sample.images for sample in LlavaJson(tmp_path / "out.json")] == [("b.jpg",), ("a.jpg",), ("b.jpg",)]


BAD = {
    "{": "is no JSON",
    "[1]": "is no object",
    '{"caption": "A cat."}': "`image` is not the name",
    '{"image": "a.jpg"}': "neither `caption` nor `blip_caption` nor `conversations`",
    '{"image": "a.jpg", "caption": 5}': "is no text",
    '{"image": "a.jpg", "caption": " "}': "is empty",
    '{"image": "a.jpg", "caption": "an <image>"}': "holds <image>",
    '{"image": "a.jpg", "caption": "\\ud800"}': "no valid Unicode",
    '{"image": "a\\ud800.jpg", "caption": "A cat."}': "no valid Unicode",
    '{"image": "a.jpg", "id": "\\ud800", "caption": "A cat."}': "no valid Unicode",
    '{"image": "a.jpg", "id": [], "caption": "A cat."}': "`id` is neither",
    '{"image": "https://a.org/a.jpg", "caption": "A cat."}': "a URL: save the image to a file",
    '{"image": "a.jpg", "caption": "A cat <image1>."}': "holds <image1>, which training would not take for text",
    json.dumps({**SAMPLE, "conversations": SAMPLE["conversations"] * 2}): "has 2 answers",
}


def test_bad_lines_are_all_named_and_can_be_skipped(tmp_path, capsys):
    good = {"image": "a.jpg", "caption": "A cat."}
    source = write(tmp_path / "in.jsonl", [good, *BAD, good])
    output = tmp_path / "out.json"
    output.write_text("what was there")
    with pytest.raises(UserError, match=f"{len(BAD)} records hold no caption"):
        expand(source, output)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(BAD)
    for number, (line, detail) in enumerate(zip(printed, BAD.values(), strict=True), 2):
        assert line.startswith(f"bad-caption, {source}: line {number}: ") and detail in line
    assert output.read_text() == "what was there" and sorted(tmp_path.iterdir()) == [source, output]

    assert [sample["id"] for sample in expand(source, output, "--skip-bad")] == ["a_0", f"a_{len(BAD) + 1}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no samples"),
        ('{"image": 1}', "1 records hold no caption"),
        ('{"info": {}, "annotations": []}', "holds no `annotations`"),
        ('{"info": {}, "images": [3]}', "holds what is no object"),
        ('{"info": {}, "annotations": [{"id": 1}', "is no JSON"),
        ('[{"image": "a.jpg", "caption": "A cat."}', "is no JSON"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, message):
    source = write(tmp_path / "in.json", text)
    with pytest.raises(UserError, match=message):
        expand(source, tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == [source]


def test_nothing_but_bad_lines_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match="not one of its records"):
        expand(write(tmp_path / "in.json", '{"image": 1}'), tmp_path / "out.json", "--skip-bad")


def test_commands(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "captions" in capsys.readouterr().out
    with pytest.raises(UserError, match="'caption' is no command") as error:
        main(["caption"])
    assert error.value.status == 2
    assert "captions" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["captions", "--help"])
    assert exit.value.code == 0 and "example:" in capsys.readouterr().out
