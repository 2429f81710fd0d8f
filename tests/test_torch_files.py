"""Files of torch.save are read as torch reads them, and nothing that they ask for is run."""

import collections
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.convert.torch_files import open_torch


def save(tensors, path):
    torch.save(tensors, path)
    return path


def test_every_type_and_view_comes_in_bit_equal(tmp_path):
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    tensors = collections.OrderedDict(
        half=torch.randn(3, 4).half(),
        brain=torch.randn(2, 3, 4).bfloat16(),
        double=torch.randn(3).double(),
        ids=torch.arange(7),
        flag=torch.tensor([True, False]),
        scalar=torch.tensor(3.5),
        none=torch.zeros(0, 4),
        parameter=torch.nn.Parameter(torch.randn(4, 2)),
        whole=base,
        rows=base[2:4],
        columns=base[:, 3:5],
        transposed=base.T,
    )
    tensors._metadata = {"": {"version": 1}}  # as state_dict() leaves it
    found = open_torch(save(tensors, tmp_path / "weights.bin"))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        ours = found[name].read()
        assert found[name].shape == ours.shape == tuple(tensor.shape)
        theirs = tensor.detach().flatten().contiguous().view(torch.uint8)
        assert ours.tobytes() == theirs.numpy().tobytes(), name
    assert (found["brain"].dtype, found["half"].dtype, found["ids"].dtype) == ("BF16", "F16", "I64")


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("where", ["value", "key", "metadata"])
def test_a_pickle_runs_nothing(where, tmp_path):
    marker = tmp_path / "owned"
    tensors = collections.OrderedDict(weight=torch.zeros(2))
    if where == "metadata":
        tensors._metadata = Attack(marker)
    else:
        tensors["evil"] = Attack(marker) if where == "value" else [Attack(marker)]
    path = save(tensors, tmp_path / "weights.bin")
    with pytest.raises(UserError, match=r"weights\.bin: asks to run posix\.system, which no weights need"):
        open_torch(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"model": {"weight": torch.zeros(2)}}, "'model' is a dict, not a tensor"),
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ({3: torch.zeros(2)}, "3 names a tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(held, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_torch(save(held, tmp_path / "weights.bin"))


def test_damaged_files_are_refused(tmp_path):
    whole = save({"weight": torch.randn(100, 100)}, tmp_path / "weights.bin").read_bytes()
    path = tmp_path / "damaged.bin"
    for data, message in {
        whole[: len(whole) // 2]: "it is cut short",
        b"": "it is no zip",
        b"<html>not found</html>" * 10: "it is no zip",
    }.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_torch(path)
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="of torch before 1.6"):
        open_torch(path)
    with pytest.raises(UserError, match="no such file"):
        open_torch(tmp_path / "nothing.bin")


@given(data=st.data())
def test_a_damaged_pickle_is_an_error_of_one_line_or_still_right(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("damaged")
    path = save({"weight": torch.arange(8.0).reshape(2, 4), "bias": torch.ones(3).half()}, directory / "weights.bin")

    def spoil(entry, stored):
        if entry != "data.pkl":
            return stored
        at = data.draw(st.integers(0, len(stored) - 1))
        return stored[:at] + data.draw(st.binary(min_size=1, max_size=3)) + stored[at + 1 :]

    try:
        found = open_torch(rewrite(path, directory / "spoilt.bin", spoil))
    except UserError as error:
        assert "spoilt.bin" in str(error)
    else:
        assert all(tensor.read().shape == tensor.shape for tensor in found.values())


def rewrite(source, target, change):
    """Copies a zip through `change(entry, data) -> data or None`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = change(info.filename.partition("/")[2], old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda entry, data: None if entry == "data/0" else data,
        lambda entry, data: data[:-4] if entry == "data/0" else data,
        lambda entry, data: data[: len(data) // 2] if entry == "data.pkl" else data,
        lambda entry, data: None if entry == "data.pkl" else data,
        lambda entry, data: b"big" if entry == "byteorder" else data,
        lambda entry, data: pickle.dumps({"weight": 1}) if entry == "data.pkl" else data,
    ],
)
def test_zips_that_lack_something_are_refused(change, tmp_path):
    path = save({"weight": torch.randn(8)}, tmp_path / "weights.bin")
    with pytest.raises(UserError) as raised:
        open_torch(rewrite(path, tmp_path / "changed.bin", change))
    assert "changed.bin" in str(raised.value) and "\n" not in str(raised.value)
