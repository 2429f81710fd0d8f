"""Files of torch.save are read as torch reads them, and nothing that they ask for is run."""

import collections
import os
import pickle
import struct
import tracemalloc
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


GLOBAL = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"


def tensor(shape, strides, length=4, offset=0, entry=b"0", kind=b"FloatStorage", arguments=b"\x89N"):
    """The instructions of a tensor, as torch writes them, with any numbers."""

    def integer(value):
        data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return pickle.LONG1 + bytes([len(data)]) + data

    def tuple_of(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(entry)) + entry
    storage += b"X\x03\0\0\0cpu" + integer(length) + b"tQ"
    return GLOBAL + b"(" + storage + integer(offset) + tuple_of(shape) + tuple_of(strides) + arguments + b"tR"


def named(*values):
    return b"\x80\x02}(" + b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + v for i, v in enumerate(values)) + b"u."


def zipped(path, pickled, compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(16))
        for name, data in entries.items():
            archive.writestr(f"a/{name}", data)
    return path


def test_the_tensors_of_these_tests_are_read(tmp_path):
    found = open_torch(zipped(tmp_path / "a.bin", named(tensor((2, 2), (2, 1)), tensor((2,), (2,), offset=1))))
    assert {name: value.read().shape for name, value in found.items()} == {"a": (2, 2), "b": (2,)}


NESTED = b"K\x01" + b"q\x00h\x00\x86" * 60  # a tuple of 2**60 items, which takes ages to hash or to print
HOSTILE = {
    "memo": (b"Nr" + struct.pack("<I", 2**32 - 1) + b".", "holds a NoneType"),
    "tuples as key": (b"}" + NESTED + b"K\x01s.", "a tuple names a tensor"),
    "tuples as storage": (NESTED + b"Q.", "names as a storage is none"),
    "tuples as entry": (tensor((2,), (1,)).replace(b"X\x01\0\0\x000", NESTED) + b".", "names as a storage is none"),
    "tuples in a dict": (ORDERED + NESTED + b"\x85\x85R.", "not described as one"),
    "tuples in a tensor": (GLOBAL + NESTED + b"R.", "not described as one"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"aaa", "damaged"),
    "frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"K\x01.", "holds a int"),
    "number": (b"\x8b" + struct.pack("<i", 2**30) + b"1.", "asks for LONG4"),
    "digits": (b"L" + b"9" * 5000 + b"L\n.", "asks for LONG"),
    "BUILD of a function": (GLOBAL + b"}X\x08\0\0\0__code__Nsb.", "asks for BUILD"),
    "BUILD of a tensor": (tensor((2,), (1,)) + b"}X\x05\0\0\0shapeK\x09sb.", "asks for BUILD"),
    "BUILD with slots": (ORDERED + b")RN}X\x01\0\0\0aK\x01s\x86b.", "asks for BUILD"),
    "object": (ORDERED + b")\x81.", "asks for NEWOBJ"),
    "extension": (b"\x82\x01.", "asks for EXT1"),
    "unknown": (b"\xff.", "asks for 255"),
    "same name": (b"}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.", "holds 'a' twice"),
    "many": (b"}" * (2**21 + 1), "takes more than 2 MiB"),
    "endless list": (b"]q\x00h\x00a.", "holds a list"),
    "sizes": (named(tensor((2**62, 2), (0, 0))), "no such shape"),
    "negative": (named(tensor((-1, 2), (2, 1))), "no such shape"),
    "negative stride": (named(tensor((2,), (-1,), offset=1)), "no such shape"),
    "boolean": (named(tensor((2,), (1,), offset=1).replace(b"\x8a\x01\x01", b"\x88", 1)), "no such shape"),
    "repeated": (named(tensor((10**6, 10**6), (0, 0))), "a is larger than what is stored"),
    "beyond": (named(tensor((2,), (1,), offset=3)), "a is larger than what is stored"),
    "not there": (named(tensor((2,), (1,), entry=b"1")), "numbers of a are not in it"),
    "too long": (named(tensor((5,), (1,), length=5)), "numbers of a are not in it"),
    "outside": (named(tensor((2,), (1,), entry=b"../../data/0")), "numbers of a are not in it"),
    "axes": (named(tensor((1,) * 9, (1,) * 9)), "not described as one"),
    "ranks": (named(tensor((1, 2), (1,))), "not described as one"),
    "type": (named(tensor((2,), (1,), kind=b"QInt8Storage")), "asks to run torch.QInt8Storage"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_that_would_take_all_memory_or_for_ever_are_refused(kind, tmp_path):
    pickled, message = HOSTILE[kind]
    path = zipped(tmp_path / "weights.bin", pickled)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as raised:
            print(open_torch(path))
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_numbers_that_many_tensors_share_are_counted(tmp_path):
    shared = [tensor((4,), (1,)) for _ in range(26)]
    assert len(open_torch(zipped(tmp_path / "tied.bin", named(*shared[:2])))) == 2
    data = zipped(tmp_path / "some.bin", named(*shared)).stat().st_size
    big = (data // 26 + 100) * 4
    pickled = named(*(tensor((big // 4,), (1,), length=big // 4, entry=b"big") for _ in range(26)))
    with pytest.raises(UserError, match="more numbers than it has bytes"):
        open_torch(zipped(tmp_path / "weights.bin", pickled, **{"data/big": bytes(big)}))


def test_zips_that_unpack_to_more_than_they_are_are_refused(tmp_path):
    path = tmp_path / "weights.bin"
    good = named(tensor((2,), (1,)))
    cases = [
        (good, zipfile.ZIP_DEFLATED, {"byteorder": bytes(2**26)}, "are compressed or overlap"),
        (good, zipfile.ZIP_DEFLATED, {}, "compressed"),
        (good, zipfile.ZIP_LZMA, {}, "compressed"),
        (good, zipfile.ZIP_STORED, {"byteorder": bytes(3 * 2**20)}, "byteorder' in it takes more than 2 MiB"),
        (good, zipfile.ZIP_STORED, {"b" * 60 + str(i): b"" for i in range(25_000)}, "table of contents"),
    ]
    for pickled, compression, entries, message in cases:
        with pytest.raises(UserError, match=message):
            open_torch(zipped(path, pickled, compression, **entries))
    data = zipped(path, good).read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b/data/0", bytes(16))
    with pytest.raises(UserError, match="holds an entry twice"):
        open_torch(path)
    path.write_bytes(data.replace(struct.pack("<II", 16, 16), struct.pack("<II", 2**31, 2**31)))
    with pytest.raises(UserError, match="compressed or overlap"):
        open_torch(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.bin")
    (tmp_path / "zero.bin").symlink_to("/dev/zero")
    for name in ("fifo.bin", "zero.bin"):
        with pytest.raises(UserError, match=f"{name}: is a device, pipe or socket, not a file"):
            open_torch(tmp_path / name)
