"""Files of tensors that are not what they say."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from llava_jax.cli import UserError
from llava_jax.convert.tensors import MAX_HEADER, open_directory, open_files

TENSOR = '{"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'


def write_header(path: Path, header: str, size: int) -> Path:
    data = header.encode() + b" " * (-len(header) % 8)
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(size))
    return path


@pytest.mark.parametrize("second", [(0, 8), (8, 16)])
def test_a_name_that_comes_twice_is_refused(second, tmp_path):
    """The library refuses it where the bytes are others, and takes the last where they are the same."""
    header = f'{{"a": {TENSOR % (0, 8)}, "a": {TENSOR % second}}}'
    file = write_header(tmp_path / "model.safetensors", header, second[1])
    with pytest.raises(UserError, match="holds 'a' twice|not a whole safetensors file"):
        open_files([file])


def test_bytes_of_two_tensors_do_not_overlap(tmp_path):
    header = f'{{"a": {TENSOR % (0, 8)}, "b": {TENSOR % (0, 8)}}}'
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_files([write_header(tmp_path / "model.safetensors", header, 8)])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(name, tmp_path):
    file = tmp_path / name
    values = {"a": np.ones((64, 64), np.float32), "b": np.ones((64, 64), np.float32)}
    if file.suffix == ".bin":
        torch.save({key: torch.from_numpy(value) for key, value in values.items()}, file)
    else:
        save_file(values, file)
    tensors = open_files([file])
    np.testing.assert_array_equal(tensors["b"].read(), values["b"])
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(UserError, match=f"{name}: was cut short while it was read; download it again"):
        tensors["b"].read()


def test_a_header_beyond_the_bounds_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write((MAX_HEADER + 1).to_bytes(8, "little"))
        sparse.truncate(2**40)
    with pytest.raises(UserError, match="its header takes 16 MiB, more than that of any weights"):
        open_files([file])
    for header, message in {
        f'{{"a": {TENSOR % (0, 8)}, "__metadata__": {{"a": {"[" * 100_000}}}}}': "not a whole safetensors file",
        f'{{"{"a" * 501}": {TENSOR % (0, 8)}}}': "calls a tensor 'a{50}'...: a name of 501 characters",
        f'{{"a": {TENSOR[:-1] % (0, 8)}, "x": {"9" * 301}}}}}': "number of 301 digits|not a whole",
        f'{{"a": {TENSOR[:-1] % (0, 8)}, "x": 1}}}}': "",  # which the library takes
    }.items():
        write_header(file, header, 8)
        if message:
            with pytest.raises(UserError, match=message):
                open_files([file])
        else:
            assert open_files([file])["a"].read().tolist() == [0, 0]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_regular_files(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a device, pipe or socket, not a file"):
        open_directory(tmp_path)


def test_an_index_names_files_below_it(tmp_path):
    model, index = tmp_path / "model", "model.safetensors.index.json"
    model.mkdir()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "outside.safetensors")
    for value in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "x/../../outside.safetensors", "",
                  ".", "a\0b", 3, None, True, ["a"], {}):  # fmt: skip
        (model / index).write_text(json.dumps({"weight_map": {"a": value}}))
        with pytest.raises(UserError, match=f"{index}: weight_map: a is in .*, which is not a file beside it or below"):
            open_directory(model)
    (model / "shard.safetensors").symlink_to("../outside.safetensors")  # as the cache of the Hub links its files
    (model / "below").mkdir()
    save_file({"b": np.ones(3, np.float32)}, model / "below" / "b.safetensors")
    weight_map = {"a": "shard.safetensors", "b": "below/b.safetensors"}
    (model / index).write_text(json.dumps({"weight_map": weight_map}))
    assert open_directory(model)["b"].read().tolist() == [1, 1, 1]
    for names in ([f"{i}.safetensors" for i in range(1000)], ["shard.safetensors"] * 1000):
        (model / index).write_text(json.dumps({"weight_map": {f"t{i}": file for i, file in enumerate(names)}}))
        with pytest.raises(UserError, match="and 990 more") as raised:
            open_directory(model)
        assert len(str(raised.value)) < 500
