"""Training with AnyRes: tiles and newlines in batches, a fresh newline, resuming, and what does not fit."""

import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image
from training_runs import assert_same_run, final, metrics, run_config, stop_at

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.__main__ import main as convert
from llava_jax.data.anyres import AnyRes, Grid
from llava_jax.training import loop

SIZES = [(12, 9), (40, 30), (90, 16), (20, 80), None, (33, 33)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A LLaVA-1.5, and samples with images of many sizes, one with two, one without."""
    root = tmp_path_factory.mktemp("anyres")
    init = tiny.checkpoint(root)
    (root / "images").mkdir()
    samples = []
    for number in range(12):
        size = SIZES[number % len(SIZES)]
        names = [f"{number}.png"] if size else []
        if number == 1:
            names.append("2.png")
        if size:
            pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        marks = "<image>\n" * len(names)
        turns = [("human", f"{marks}What is it?"), ("gpt", f"It is {number}.")]
        sample = {"id": f"s{number}", "conversations": [{"from": role, "value": text} for role, text in turns]}
        samples.append(sample | ({"image": names} if names else {}))
    (root / "data.json").write_text(json.dumps(samples))
    return {"init": str(init), "json": str(root / "data.json"), "images": str(root / "images")}


def anyres_config(world, **changes):
    return run_config(world, image_aspect="anyres", max_length=128, rows_per_group=2, **changes)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(anyres_config(world), str(workdir))
    return workdir


def test_a_fresh_newline_is_trained(trained):
    checkpoint = open_checkpoint(trained)
    assert checkpoint.config.anyres == AnyRes() and checkpoint.config.image_aspect == "anyres"
    newline = final(trained)["image_newline"]
    assert newline.shape == (48,) and 0.5 < np.linalg.norm(newline) < 2  # drawn as randn / sqrt(48)
    assert metrics(trained)[-1]["loss"] < metrics(trained)[0]["loss"]


def test_a_run_that_is_stopped_goes_on_with_the_same_losses(world, trained, tmp_path):
    stop_at(3, anyres_config(world), tmp_path / "run")
    loop.train(anyres_config(world), str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize("changes", [{"pack": True, "row_length": 256, "batch_rows": 2}, {"data.workers": 1}])
def test_packed_rows_and_processes_that_read(world, changes, tmp_path):
    config = anyres_config(world, steps=2)
    config.update_from_flattened_dict(changes)
    loop.train(config, str(tmp_path / "run"))
    assert len(metrics(tmp_path / "run")) == 2


def test_the_summary_has_a_row_for_the_newline(world, tmp_path, capsys):
    loop.train(anyres_config(world, steps=1), str(tmp_path / "run"))
    told = capsys.readouterr().err
    assert any(line.split()[:2] == ["newline", "whole"] for line in told.splitlines()), told


def test_the_trained_model_goes_out_and_is_equal_there(trained, tmp_path):
    convert(["export", "--checkpoint", str(trained), "--output", str(tmp_path / "hf")])
    assert convert(["verify", "--checkpoint", str(trained), "--hf", str(tmp_path / "hf")]) == 0


def test_options_of_a_run(world, trained, tmp_path):
    config = anyres_config(world, steps=1)
    config.anyres.update(grids=((1, 1), (2, 2)), merge="flat", several="base")
    loop.train(config, str(tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").config.anyres == AnyRes((Grid(1, 1), Grid(2, 2)), "flat", "base")
    assert "image_newline" not in final(tmp_path / "run")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"stage": "pretrain"}, "has no image_newline, and the run does not train it: train it in stage 2"),
        ({"lora.rank": 2}, "has no image_newline"),
        ({"image_slots": 3}, "image_slots=3 is too few: a group of 2 rows needs"),
        ({"image_aspect": "pad", "anyres.merge": "flat"}, "config.anyres.merge is for image_aspect=anyres"),
        ({"anyres.grids": ((0, 1),)}, "config.anyres: grids"),
        ({"anyres.grids": (3,)}, "config.anyres: "),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(world, changes, message, tmp_path):
    config = anyres_config(world)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "llava.json").exists()


def test_a_model_with_a_newline_keeps_it(world, trained, tmp_path):
    with pytest.raises(UserError, match="config.image_aspect is pad, which would drop the newline"):
        loop.train(run_config(world, init=str(trained), image_aspect="pad"), str(tmp_path / "run"))


def test_an_image_that_is_too_thin_is_named(world, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(world["images"], folder)
    Image.new("RGB", (1, 2000)).save(folder / "3.png")
    with pytest.raises(UserError, match="sample s3: image 3.png: 1 x 2000 pixels are too thin for AnyRes: crop it"):
        config = anyres_config(world)
        config.data.images = str(folder)
        loop.train(config, str(tmp_path / "run"))


def test_an_image_that_comes_back_is_trained_by_a_new_run(world, tmp_path, capsys):
    """A run goes on with the bad samples that it began with."""
    folder, image = tmp_path / "images", tmp_path / "images" / "3.png"
    shutil.copytree(world["images"], folder)
    config = anyres_config(world, steps=4)
    with config.unlocked():
        config.max_length = 120  # lengths that no other test has in the cache
        config.data.images, config.data.on_bad_sample, config.data.max_bad_share = str(folder), "skip", 1.0
    image.rename(tmp_path / "away.png")
    stop_at(2, config, tmp_path / "first")
    (tmp_path / "away.png").rename(image)
    loop.train(config, str(tmp_path / "first"))
    bad = [json.loads(line) for line in (tmp_path / "first" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["part"]) for entry in bad] == [("s3", "text")]
    loop.train(config, str(tmp_path / "second"))
    assert not (tmp_path / "second" / "bad_samples.jsonl").exists()
    image.unlink()  # all are in the cache now; the first sample that can be read is shown
    capsys.readouterr()
    loop.train(config, str(tmp_path / "third"))
    assert "the first sample, s" in capsys.readouterr().err


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_images_that_changed_since_they_were_measured(world, on_bad_sample, tmp_path, monkeypatch):
    """Another size is an error, since rows are planned; an image that is gone is skipped where that is asked for."""
    folder = tmp_path / "images"
    shutil.copytree(world["images"], folder)
    config = anyres_config(world, steps=3)
    with config.unlocked():
        config.data.images, config.data.on_bad_sample, config.data.max_bad_share = str(folder), on_bad_sample, 1.0
    loop.train(config, str(tmp_path / "first"))  # measures, and keeps the lengths
    if on_bad_sample == "skip":
        (folder / "3.png").unlink()
        loop.train(config, str(tmp_path / "second"))
        assert "3.png" in (tmp_path / "second" / "bad_samples.jsonl").read_text()
        return
    Image.new("RGB", (90, 16)).save(folder / "3.png")
    with pytest.raises(UserError, match="sample s3: its images have other sizes than when they were measured"):
        loop.train(config, str(tmp_path / "second"))
