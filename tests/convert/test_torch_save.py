"""Files as torch writes them: read by torch itself, by nothing but its weights_only reader, and by ours."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llava_jax.cli import UserError
from llava_jax.convert.outgoing import Tensor
from llava_jax.convert.torch_files import open_torch
from llava_jax.convert.torch_save import save_torch

DTYPES = [np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)]


def tensors(values: dict[str, np.ndarray]) -> list[Tensor]:
    return [Tensor(name, value.shape, value.dtype, lambda value=value: value) for name, value in values.items()]


@given(
    shapes=st.dictionaries(st.text(max_size=300), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0), max_size=4),
    seed=st.integers(0, 9),
)
def test_torch_and_we_read_every_bit(shapes, seed, tmp_path_factory):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("saved") / "mm_projector.bin"
    values = {}
    for name, shape in shapes.items():
        dtype = DTYPES[rng.integers(3)]
        bits = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        values[name] = bits.view(dtype).reshape(shape)
    save_torch(path, tensors(values))
    loaded, ours = torch.load(path, weights_only=True), open_torch(path)
    assert list(loaded) == list(ours) == list(values)
    for name, value in values.items():
        assert str(loaded[name].dtype) == f"torch.{value.dtype.name}"
        assert tuple(loaded[name].shape) == ours[name].shape == value.shape
        assert loaded[name].reshape(-1).view(torch.uint8).numpy().tobytes() == value.tobytes()
        assert ours[name].read().tobytes() == value.tobytes()


def test_as_torch_writes_it(tmp_path):
    """The same entries but for ids and hints, and a pickle that says the same."""
    values = {"model.mm_projector.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_torch(tmp_path / "ours.bin", tensors(values))
    torch.save({name: torch.from_numpy(value) for name, value in values.items()}, tmp_path / "torch.bin")
    entries = []
    for file in ("ours.bin", "torch.bin"):
        with zipfile.ZipFile(tmp_path / file) as archive:
            assert archive.testzip() is None
            entries.append({entry.filename.split("/", 1)[1]: archive.read(entry) for entry in archive.infolist()})
    ours, theirs = entries
    assert set(theirs) - set(ours) <= {".data/serialization_id", ".format_version", ".storage_alignment"}
    for name in set(ours) - {"data.pkl"}:
        assert ours[name] == theirs[name], name


def test_no_room_is_said_before_anything_is_written(tmp_path):
    huge = Tensor("weight", (2**40, 2**10), np.dtype(np.float32), lambda: pytest.fail("read"))
    with pytest.raises(UserError, match="the weights take"):
        save_torch(tmp_path / "file.bin", [huge])
    assert not list(tmp_path.iterdir())
