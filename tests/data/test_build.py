"""Built data sets: the same bytes whatever interrupts, and errors before and after."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata

import pytest
import tensorflow_datasets as tfds
import tiny
from built_sets import FORMATS, contents, run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from llava_jax.cli import UserError
from llava_jax.data import build, published, shards
from llava_jax.data.built import Built
from llava_jax.data.sources import LlavaJson, Sample

# Builds, and waits for ever where it would read d.webp.
WAITING = """
import sys, time
from llava_jax.data import build, shards
read = shards.read_named
shards.read_named = lambda images, name: time.sleep(9999) if name.endswith("d.webp") else read(images, name)
build.main(sys.argv[1:])
"""


def test_records_hold_texts_and_the_very_bytes_of_the_files(data, built):
    source, images = LlavaJson(data[0]), data[1]
    records = tfds.builder_from_directory(str(built)).as_data_source(
        "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    assert len(records) == len(source) == 8
    for sample, record in zip(source, records, strict=True):
        feature = tf_example_pb2.Example.FromString(record).features.feature
        assert list(feature["images"].bytes_list.value) == [(images / name).read_bytes() for name in sample.images]
        assert [name.decode() for name in feature["image_names"].bytes_list.value] == list(sample.images)
        assert feature["id"].bytes_list.value[0].decode() == sample.id
        assert list(feature["num_images"].int64_list.value) == [len(sample.images)]
        texts = [text.decode() for text in feature["conversations/value"].bytes_list.value]
        assert texts == [text for _, text in sample.turns]
    assert "tensorflow" not in sys.modules


def test_others_read_it_with_tfds_alone_and_its_texts_as_json(data, built):
    builder = tfds.builder_from_directory(str(built))
    assert builder.info.splits["train"].shard_lengths == [2, 2, 2, 2] and builder.info.full_name == "llava/custom/1.0.0"
    example = builder.as_data_source("train")[2]
    for name, pixels in zip(("folder/b.png", "c.jpg"), example["images"], strict=True):
        assert pixels.shape == (20, 30 + list(FORMATS).index(name), 3)
    texts = LlavaJson(built / "text.jsonl")
    assert list(texts) == list(LlavaJson(data[0])) and texts.digest == LlavaJson(data[0]).digest
    metadata = json.loads((built / "metadata.json").read_text())
    assert (metadata["samples"], metadata["samples_without_images"], metadata["images"]) == (8, 2, 8)


def test_killed_in_a_shard_it_goes_on_and_ends_with_the_same_bytes(data, built, tmp_path):
    """The process is killed for good where it waits for an image, d.webp of samples 5 and 7: shards 2 and 3."""
    images = shutil.copytree(data[1], tmp_path / "images")
    output = tmp_path / "set"
    options = ["--json", data[0], "--images", images, "--output", output, "--shards", 4, "--workers", 1]
    process = subprocess.Popen([sys.executable, "-c", WAITING, *map(str, options)])
    whole = [output / shards.SHARD_NAME.format(index=i, count=4) for i in range(2)]
    while not (whole[1].exists() and list(output.glob("*.partial"))):
        assert process.poll() is None
        time.sleep(0.02)
    with pytest.raises(UserError, match=f"{output}: is in use by another process .{process.pid} on "):
        run((data[0], images), output)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(output.glob("*.partial")) and not (output / "dataset_info.json").exists()
    before = [file.stat().st_mtime_ns for file in whole]
    run((data[0], images), output, "--workers", 2)
    assert contents(output) == contents(built)
    assert [file.stat().st_mtime_ns for file in whole] == before, "whole shards were written again"


def test_shards_that_lost_their_end_are_written_again(data, built, tmp_path):
    output = shutil.copytree(built, tmp_path / "set")
    (output / "dataset_info.json").unlink()
    cut = output / shards.SHARD_NAME.format(index=1, count=4)
    os.truncate(cut, cut.stat().st_size // 2)
    (output / shards.SHARD_NAME.format(index=2, count=4)).unlink()
    assert contents(run(data, output)) == contents(built)


def test_missing_pictures_are_told_by_folder_before_anything_is_written(data, tmp_path):
    images = shutil.copytree(data[1], tmp_path / "images")
    (images / "folder" / "b.png").rename(images / "folder" / "b.gif")
    (images / "a.jpg").unlink()
    with pytest.raises(
        UserError, match=r"1 images missing in \S+images, such as a.jpg; it is of sample 0; .*1 of the first 1 are"
    ):
        run((data[0], images), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match="no such folder"):
        run((data[0], tmp_path / "nowhere"), tmp_path / "set")


def test_damaged_pictures_are_all_told_and_cost_their_shards_alone(data, built, tmp_path, capsys):
    images = shutil.copytree(data[1], tmp_path / "images")
    picture = (images / "d.webp").read_bytes()
    (images / "d.webp").write_bytes(picture[: len(picture) // 2])
    output = tmp_path / "set"
    with pytest.raises(UserError, match="^2 images cannot be read"):
        run((data[0], images), output, "--shards", 4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[:2] for line in lines] == [["bad-image", " s5"], ["bad-image", " s7"]]
    assert str(images / "d.webp") in lines[0]
    assert len(list(output.glob("*array_record*"))) == 2 and not (output / "dataset_info.json").exists()
    (images / "d.webp").write_bytes(picture)
    assert contents(run((data[0], images), output)) == contents(built)


def test_who_trusts_the_pictures_need_not_decode_them(data, tmp_path):
    images = shutil.copytree(data[1], tmp_path / "images")
    (images / "a.jpg").write_bytes(b"no picture")
    run((data[0], images), tmp_path / "set", "--no-decode")


def test_a_full_disk_is_an_error_of_one_line_that_leaves_nothing(data, tmp_path):
    output = run(data, tmp_path / "set", "--shards", 2)
    shard = build._shards({"shards": 1}, str(output), str(data[1]), decode=True)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="a shard cannot be written: .*File too large"):
            shards.write_shard(shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(output.glob("*.partial")) and not shard.path.exists()


def test_more_shards_than_samples_can_be_asked_for_again(data, tmp_path):
    for _ in range(2):
        output = run(data, tmp_path / "set", "--shards", 64)
        assert (output / shards.SHARD_NAME.format(index=7, count=8)).exists()


def test_an_output_of_something_else_is_refused(data, built, tmp_path):
    with pytest.raises(UserError, match="has 4 shards, not 2"):
        run(data, built, "--shards", 2)
    other = tiny.data(tmp_path)
    with pytest.raises(UserError, match="built from other samples"):
        run(other, built)
    with pytest.raises(UserError, match="exists and holds no built data set"):
        run(data, data[1])


def test_shards_have_a_size(data, tmp_path, monkeypatch):
    total = sum((data[1] / name).stat().st_size for sample in LlavaJson(data[0]) for name in sample.images)
    monkeypatch.setattr(build, "SHARD_BYTES", -(-total // 3))
    names = contents(run(data, tmp_path / "set"))
    assert sum("-of-00003" in name for name in names) == 3
    monkeypatch.setattr(build, "MAX_SHARDS", 2)
    assert sum("-of-00002" in name for name in contents(run(data, tmp_path / "fewer"))) == 2
    assert sum("-of-00008" in name for name in contents(run(data, tmp_path / "most", "--shards", 100))) == 8


def test_published_sets_are_checked(data, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="coco/train2017 is missing.*ocr_vqa/images is missing.*8 samples where .*665,298"
    ):
        run(data, tmp_path / "set", "--dataset", "mix665k")
    assert not (tmp_path / "set").exists()
    mix = next(known for known in published.PUBLISHED if known.name == "mix665k")
    small = dataclasses.replace(mix, samples=8, text_only=3, folders={"folder": "b"})
    (tmp_path / "folder").mkdir()
    assert list(published.problems(small, tmp_path, 8, 2)) == [
        "2 samples without an image where llava_v1_5_mix665k.json has 3"
    ]
    monkeypatch.setattr(build, "PUBLISHED", [dataclasses.replace(small, text_only=2)])
    output = run(data, tmp_path / "set", "--dataset", "mix665k")
    assert tfds.builder_from_directory(str(output)).info.full_name == "llava/mix665k/1.0.0"


texts = st.text(st.characters(exclude_categories=["Cs"]))
samples = st.builds(
    Sample, st.text(), st.lists(st.text(), max_size=3).map(tuple), st.lists(texts, min_size=1, max_size=4).map(
        lambda values: tuple(zip(("user", "assistant", "user", "assistant"), values, strict=False))
    )
)  # fmt: skip


@given(samples)
def test_any_sample_survives(sample):
    line = shards.line_of(sample)
    assert line.count(b"\n") == 1 and shards.sample_of_line(line) == sample
    record = tf_example_pb2.Example.FromString(shards.serialize(sample, [b"x"] * len(sample.images)))
    values = record.features.feature["conversations/value"].bytes_list.value
    assert [value.decode() for value in values] == [text for _, text in sample.turns]
    assert len(record.features.feature["images"].bytes_list.value) == len(sample.images)


def test_system_prompts_and_names_in_another_unicode_form(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / unicodedata.normalize("NFD", "\u00e9.png"))
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]
    record = {"id": "a", "image": "\u00e9.png", "system": "Be brief.", "messages": turns}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    source = LlavaJson(tmp_path / "data.json", tmp_path / "images")
    built = Built(run((tmp_path / "data.json", tmp_path / "images"), tmp_path / "set"))
    assert list(built) == list(source) == list(LlavaJson(tmp_path / "set" / "text.jsonl"))
    assert built[0].turns[0] == ("system", "Be brief.")
    assert built.read_images(0, source[0].images) == source.read_images(0, source[0].images)


@pytest.mark.parametrize("name", tiny.OUTSIDE)
@pytest.mark.parametrize("options", [(), ("--no-decode",)])
def test_names_that_leave_the_folder_are_refused_before_anything_is_written(data, tmp_path, name, options):
    images = shutil.copytree(data[1], tmp_path / "images")
    tiny.add_irregular(images)
    samples = json.loads(data[0].read_text())
    samples[3]["image"] = samples[6]["image"][0] = name
    (tmp_path / "data.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match="^sample s3: image .*(leaves the folder|absolute|NUL)"):
        run((tmp_path / "data.json", images), tmp_path / "set", *options)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", tiny.IRREGULAR)
def test_what_is_no_file_is_refused_with_its_sample(data, tmp_path, name, capsys):
    images = shutil.copytree(data[1], tmp_path / "images")
    tiny.add_irregular(images)
    samples = json.loads(data[0].read_text())
    samples[3]["image"] = name
    (tmp_path / "data.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match="1 images cannot be read"):
        run((tmp_path / "data.json", images), tmp_path / "set", "--no-decode")
    assert re.match(f"bad-image, s3, image .*{name}", capsys.readouterr().out)


def test_absolute_names_are_built_by_an_option(data, tmp_path):
    samples = json.loads(data[0].read_text())
    samples[3]["image"] = str(data[1] / "c.jpg")
    (tmp_path / "data.json").write_text(json.dumps(samples))
    with pytest.raises(UserError, match="sample s3: .*--allow-absolute-images"):
        run((tmp_path / "data.json", data[1]), tmp_path / "set")
    built = Built(run((tmp_path / "data.json", data[1]), tmp_path / "set", "--allow-absolute-images"))
    assert built.read_images(3, built[3].images) == [(data[1] / "c.jpg").read_bytes()]
