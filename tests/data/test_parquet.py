"""Parquet with images inside: the same samples and images as JSON and a folder, for training and all commands."""

import io
import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data import build, check, inspect
from llava_jax.data.built import Built
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.mixture import check_folders, open_data
from llava_jax.data.parquet import ParquetImages, texts
from llava_jax.data.plan import Lengths
from llava_jax.data.selection import open_json
from llava_jax.data.sources import LlavaJson, image_sizes, read_images


@pytest.fixture
def json_set(tmp_path, monkeypatch):
    """Samples as JSON and a folder, in the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file, images = tiny.data(tmp_path)
    return LlavaJson(file, images)


def rows_of(source, column="image"):
    """Rows as `datasets` writes them: an image or a list of them as bytes and path."""
    for record, (index, sample) in zip(json.loads(source.path.read_text()), enumerate(source), strict=True):
        cells = [{"bytes": data, "path": None} for data in source.read_images(index, sample.images)]
        row = {"id": sample.id, "conversations": record["conversations"], "data_source": "tiny"}
        yield row | {column: cells if column == "images" else cells[0] if cells else None}


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **{"row_group_size": 4} | options)
    return str(path)


def everything(source):
    """All that training reads of a source, but the names of images."""
    samples = [(sample.id, sample.turns, len(sample.images)) for sample in source]
    images = [read_images(source, index, sample, lambda data, _: data) for index, sample in enumerate(source)]
    sizes = [image_sizes(source, index, sample) for index, sample in enumerate(source)]
    return samples, images, sizes


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_it_holds_what_json_and_a_folder_hold(json_set, column, compression):
    path = write("data.parquet", rows_of(json_set, column), compression=compression)
    assert everything(open_json(path)) == everything(json_set)


def test_a_folder_of_shards_is_read_in_the_order_of_their_names(json_set, tmp_path):
    rows = list(rows_of(json_set))
    (tmp_path / "shards").mkdir()
    for number, start in ((0, 0), (1, 5)):
        write(tmp_path / f"shards/train-0000{number}-of-00002.parquet", rows[start : [5, 12][number]])
    source = open_data(tiny_config(json="shards"))
    assert everything(source) == everything(json_set)
    assert everything(pickle.loads(pickle.dumps(source))) == everything(json_set)
    for index in (11, 3, 3, 0, 7, 6):
        assert source.read_images(index, source[index].images) == json_set.read_images(index, json_set[index].images)
    images = [len(sample.images) for sample in source]
    check_folders(source, Lengths(*[np.array(images)] * 4))  # needs no folder


def tiny_config(**data):
    return ConfigDict({"json": "", "images": "", "built": "", "mixture": ()} | data)


def test_rows_without_paths_with_many_images_and_without_any(tmp_path, monkeypatch):
    """Plain bytes in place of bytes and path; `messages` in place of `conversations`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [png(size) for size in (4, 5, 6)]
    said = [{"role": "user", "content": "<image><image><image> é"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"images": files, "messages": said},
        {"images": [], "messages": [{"role": "user", "content": "q"}, said[1]]},
    ]
    source = open_json(write(tmp_path / "x.parquet", rows))
    assert [len(sample.images) for sample in source] == [3, 0] and source[1].id == "1"
    assert source.read_images(0, source[0].images) == files
    assert source[0].images == ("x.parquet/0/0", "x.parquet/0/1", "x.parquet/0/2")


def test_messages_of_parts_are_read_as_the_hub_has_them(tmp_path, monkeypatch):
    """The columns of HuggingFaceH4/llava-instruct-mix-vsft."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = [{"index": None, "text": "What is it?\n", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    answer = [{"index": None, "text": "A dot.", "type": "text"}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    (sample,) = open_json(
        write(tmp_path / "x.parquet", [{"messages": said, "images": [{"bytes": png(4), "path": None}]}])
    )
    assert sample.images == ("x.parquet/0/0",) and sample.turns[1] == ("assistant", "A dot.")
    assert sample.turns[0][1].count("<image>") == 1 and "What is it?" in sample.turns[0][1]


def png(size, colour=0):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def test_names_in_a_column_are_those_of_a_folder(json_set):
    rows = [{"image": "", **record} for record in json.loads(json_set.path.read_text())]
    source = open_json(write("names.parquet", rows), ImageFolder(json_set.images))
    assert list(source) == list(json_set) and everything(source) == everything(json_set)


def test_the_check_the_build_and_the_view_need_no_folder(json_set, capsys):
    path = write("data.parquet", rows_of(json_set))
    assert check.main(["--json", path, "--workers", "1"]) == 0
    build.main(["--json", path, "--output", "built", "--workers", "1"])
    assert everything(Built("built")) == everything(json_set)
    tiny.tokenizer().save_pretrained("tokenizer")
    inspect.main(["--json", path, "--tokenizer", "tokenizer", "--template", "v1", "--limit", "1"])
    assert "data.parquet/0/0: " in capsys.readouterr().out
    with pytest.raises(UserError, match="--fix writes JSON, which holds no images of Parquet"):
        check.main(["--json", path, "--fix", "good.json"])
    with pytest.raises(UserError, match="--dataset mix665k is published as JSON"):
        build.main(["--json", path, "--output", "other", "--dataset", "mix665k"])


def test_json_still_needs_its_folder(json_set, capsys):
    for command in (check.main, build.main):
        with pytest.raises(SystemExit):
            command(["--json", str(json_set.path), *(["--output", "o"] if command is build.main else [])])
        assert "arguments are required: --images" in capsys.readouterr().err


def test_the_check_names_rows_and_images(json_set, capsys):
    rows = list(rows_of(json_set))
    with_image = [number for number, row in enumerate(rows) if row["image"]]
    rows[with_image[0]]["image"]["bytes"] = b"no image"
    rows[with_image[1]]["image"] = {"bytes": None, "path": "a.jpg"}
    rows[with_image[2]]["conversations"] = []
    path = write("data.parquet", rows)
    assert check.main(["--json", path, "--workers", "1"]) == 1
    lines = sorted(capsys.readouterr().out.splitlines())
    assert len(lines) == 3
    ids = [rows[number]["id"] for number in with_image[:3]]
    assert any(line.startswith(f"bad-image, {ids[0]}, ") for line in lines)
    assert any(line.startswith(f"bad-image, {ids[1]}, ") and "has no bytes" in line for line in lines)
    assert lines[2].startswith(f"structure, {ids[2]}, data.parquet: sample {with_image[2]}: `conversations`")
    with pytest.raises(UserError, match=f"data.parquet: sample {with_image[2]} .id {ids[2]}.: `conversations`"):
        open_json(path)


def test_columns_that_would_change_the_samples_are_refused(json_set):
    rows = list(rows_of(json_set))
    sound = [row | {"audio": b"RIFF"} for row in rows]
    with pytest.raises(UserError, match=r"sample 0 .id .*: `audio` is not read: the model hears nothing"):
        open_json(write("sound.parquet", sound))
    with pytest.raises(UserError, match="both.parquet: has images in both `image` and `images`"):
        open_json(write("both.parquet", [row | {"images": [{"bytes": b"1"}]} for row in rows]))
    renamed = [{"jpg" if key == "image" else key: value for key, value in row.items()} for row in rows]
    with pytest.raises(UserError, match="1 <image> in the text, but 0 images"):
        open_json(write("renamed.parquet", renamed))


def test_damaged_files_are_named(json_set, tmp_path, capsys):
    path = write("data.parquet", rows_of(json_set))
    data = (tmp_path / path).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "none.parquet").write_bytes(b"[]")
    (tmp_path / "pointer.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x")
    for name, message in (("cut", "cannot be read as Parquet"), ("none", "cannot be read as Parquet"),
                          ("pointer", "Git LFS pointer"), ("nowhere", "no such file")):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}.parquet.*{message}"):
            open_json(f"{name}.parquet")
    page = len(b"PAR1")  # the header of the first page
    (tmp_path / "page.parquet").write_bytes(data[:page] + b"\xff" * 8 + data[page + 8 :])
    with pytest.raises(UserError, match="page.parquet: cannot be read as Parquet"):
        open_json("page.parquet")
    assert "cannot be written" not in capsys.readouterr().err
    images = ParquetImages([path])
    with pytest.raises(UserError, match="image data.parquet/99/0: cannot be read"):
        images.read("data.parquet/99/0")


def test_memory_holds_a_row_group_and_neighbours_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [os.urandom(100_000) for _ in range(200)]
    path = write(tmp_path / "x.parquet", [{"image": {"bytes": file, "path": "a"}} for file in files], row_group_size=10)
    before = pa.total_allocated_bytes()
    texts(path)
    images, most = ParquetImages([path]), 0
    for index, file in enumerate(files):
        assert images.read(f"x.parquet/{index}/0") == file
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 5 * 10 * 100_000  # of 20 MB
