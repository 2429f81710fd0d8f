"""Mixtures in LLaVA-NeXT's YAML files: which samples they take, for training and all commands alike."""

import json
import math
import pickle
import re

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.data import build, check
from llava_jax.data.built import Built
from llava_jax.data.mixture import check_folders, open_data
from llava_jax.data.plan import Lengths
from llava_jax.data.selection import open_json
from llava_jax.data.sources import LlavaJson, read_images


@pytest.fixture
def files(tmp_path, monkeypatch):
    """`a.json` of twelve samples and `b.jsonl` of five, images of both in `images`; the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, images = tiny.data(tmp_path)
    samples = json.loads(file.read_text())
    (tmp_path / "a.json").write_text(json.dumps(samples))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(s | {"id": f"b{i}"}) for i, s in enumerate(samples[:5])))
    images.rename(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mixture(*entries, file="mixture.yaml"):
    lines = [f"  - json_path: {path}\n    sampling_strategy: {strategy}" for path, strategy in entries]
    with open(file, "w") as out:
        out.write("\n".join(["datasets:", *lines]))
    return file


def ids(source):
    return [sample.id for sample in source]


@pytest.mark.parametrize("strategy", ["all", "first:3", "end:3", "first:10%", "end:34%", "first:100%", "end:1%"])
def test_a_strategy_takes_what_llava_next_takes(files, strategy):
    every = ids(LlavaJson("a.json"))
    which, _, asked = strategy.partition(":")
    count = math.ceil(int(asked.strip("% ")) * 12 / 100) if "%" in asked else int(asked or 12)
    expected = every[-count:] if which == "end" else every[:count]
    assert ids(open_json(mixture(("a.json", strategy)))) == expected


def test_random_takes_a_part_that_stays_and_differs_between_entries(files):
    every = ids(LlavaJson("a.json"))
    source = open_json(mixture(("a.json", "random:50%"), ("a.json", "random:6")))
    first, second = ids(source)[:6], ids(source)[6:]
    for part in (first, second):
        assert len(set(part)) == 6 and part == sorted(part, key=every.index)
    assert first != second and first != every[:6]
    assert ids(open_json("mixture.yaml")) == first + second and open_json("mixture.yaml").digest == source.digest
    assert ids(pickle.loads(pickle.dumps(source))) == first + second  # as processes that read get it


def test_braces_name_several_files(files):
    (files / "c.json").write_text((files / "a.json").read_text().replace("sample-", "c-"))
    both = ids(LlavaJson("a.json")) + ids(LlavaJson("c.json"))
    assert ids(open_json(f"{files}/{{a,c}}.json")) == both
    assert ids(open_json(mixture((f'"{files}/{{c, a}}.json"', "end:13")))) == [both[23], *both[:12]]
    with pytest.raises(UserError, match=r"x\.json: no such file"):
        open_json(f"{files}/{{a,x}}.json")


def config(**data):
    return ConfigDict({"json": "", "images": "", "built": "", "mixture": ()} | data)


def test_training_reads_images_and_weights_of_a_yaml(files):
    source = open_data(config(json=mixture(("a.json", "end:4"), ("b.jsonl", "all")), images="images"))
    every = [*LlavaJson("a.json")][-4:] + [*LlavaJson("b.jsonl")]
    assert list(source) == every and len(source) == 9
    folder = LlavaJson("a.json", "images")
    for index, sample in enumerate(source):
        assert read_images(source, index, sample, lambda data, _: data) == folder.read_images(0, sample.images)
        assert source.read_sizes(index, sample.images) == folder.read_sizes(0, sample.images)
    weighted = open_data(
        config(mixture=({"json": "mixture.yaml", "images": "images", "weight": 2}, {"json": "b.jsonl"}))
    )
    assert list(weighted) == every + [*LlavaJson("b.jsonl")] and weighted.weights == (2.0, 1.0)


def test_the_folder_of_images_is_checked_for_the_samples_that_are_taken(files):
    texts = [sample for sample in json.loads((files / "a.json").read_text()) if "image" not in sample]
    pictured = [sample for sample in json.loads((files / "a.json").read_text()) if "image" in sample]
    (files / "a.json").write_text(json.dumps(texts + pictured))

    def check_it(strategy):
        source = open_data(config(json=mixture(("a.json", strategy))))
        images = np.array([len(sample.images) for sample in source])
        check_folders(source, Lengths(*[images] * 4))

    check_it(f"first:{len(texts)}")
    with pytest.raises(UserError, match="a.json has samples with images: give their folder"):
        check_it("end:1")


def test_the_build_and_the_check_take_it(files, capsys):
    mixture(("a.json", "random:7"), ("b.jsonl", "first:2"))
    assert check.main(["--json", "mixture.yaml", "--images", "images", "--workers", "1"]) == 0
    build.main(["--json", "mixture.yaml", "--images", "images", "--output", "built", "--workers", "1"])
    source = open_json("mixture.yaml")
    assert list(Built("built")) == list(source) and Built("built").digest == source.digest


def test_the_check_names_files_and_fix_joins_what_is_good(files, capsys):
    lines = (files / "b.jsonl").read_text().split("\n")
    (files / "b.jsonl").write_text("\n".join([lines[0], '{"id": "bad"}', *lines[1:]]))
    args = ["--json", mixture(("a.json", "end:2"), ("b.jsonl", "first:3")), "--images", "images", "--workers", "1"]
    assert check.main([*args, "--fix", "good.json"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("structure, bad, b.jsonl: sample 1: `conversations`") and out.count("\n") == 1
    assert ids(LlavaJson("good.json")) == [*ids(LlavaJson("a.json"))[-2:], "b0", "b1"]
    with pytest.raises(UserError, match=r"b.jsonl: line 2 .id bad."):
        open_json("mixture.yaml")


def test_more_than_all_is_all_with_a_warning(files, capsys):
    assert len(open_json(mixture(("a.json", "first:13")))) == 12
    assert "mixture.yaml: datasets[0]: a.json has 12 samples: first:13 takes them all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", "mixture.yaml: is no YAML: "),
        ("a: " + "[" * 5000, "mixture.yaml: is no YAML: "),
        ("- json_path: a.json", "mixture.yaml: has to hold `datasets` alone.*; it is a list"),
        ("datasets: []\nroot: x", "has to hold `datasets` alone.*; its keys are 'datasets', 'root'"),
        ("datasets: a.json", "`datasets` is no list of json_path and sampling_strategy: it is 'a.json'"),
        ("datasets: []", "`datasets` is no list"),
        ("datasets: [a.json]", r"datasets\[0\]: is no json_path and sampling_strategy: it is 'a.json'"),
        ("datasets: [{json_path: a.json}, {json: b}]", r"datasets\[1\]: `json` is not read"),
        ("datasets: [{sampling_strategy: all}]", r"datasets\[0\]: `json_path` has to name .*: it is None"),
        ("datasets: [{json_path: b.yaml}]", "has to name a .json or .jsonl file: it is 'b.yaml'"),
        ("datasets:\n- json_path: a\n  json_path: b", "is no YAML: 'json_path' is given twice .*line 3"),
        ("!!python/object/apply:os.system [echo]", "is no YAML: could not determine a constructor"),
        *[
            (f"datasets: [{{json_path: a, sampling_strategy: {strategy}}}]", rf"datasets\[0\]: `sampling_.*{shown}")
            for strategy, shown in [
                ("half", "it is 'half'"), ("first", "it is 'first'"), ("'first:x'", "it is 'first:x'"),
                ("'end:0'", "it is 'end:0'"), ("'random:101%'", "it is 'random:101%'"), ("'first:-1'", "'first:-1'"),
                ("'first:0.5%'", "'first:0.5%'"), ("10", "it is 10"), ("[all]", "it is a list"), ("null", "it is None"),
            ]
        ],
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_file_entry_and_key(files, text, message):
    (files / "mixture.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        open_json("mixture.yaml")
    assert re.search(message, str(error.value), re.DOTALL)


def test_a_file_of_an_entry_that_does_not_exist_is_named(files):
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        open_json(mixture(("a.json", "all"), ("nowhere.json", "all")))
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        open_json("nowhere.yaml")
