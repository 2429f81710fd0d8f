"""Files of tensors that are not what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from llava_jax.cli import UserError
from llava_jax.convert.tensors import open_files

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
    np.testing.assert_array_equal(tensors.get("b"), values["b"])
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(UserError, match=f"{name}: was cut short while it was read; download it again"):
        tensors.get("b")
