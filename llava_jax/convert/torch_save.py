"""Writes files that `torch.load(file, weights_only=True)` reads, without torch.

Such a file is a zip without compression: a pickle that describes the tensors, and the bytes of each. The pickle is
written opcode by opcode, since Python's pickler would have to import torch for the functions that it names.
"""

import pickle
import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_jax.checkpoint.writing import check_free
from llava_jax.convert.outgoing import Tensor, tensor_bytes
from llava_jax.convert.stored_tensor import NAMES
from llava_jax.convert.torch_files import STORAGES

_STORAGES = {dtype: storage for storage, dtype in STORAGES.items()}
_PROTOCOL, _FORMAT = b"\x80\x02", b"3\n"  # of pickles, and of torch's zips since 1.6


def save_torch(path: Path, tensors: Sequence[Tensor]) -> None:
    """Writes a dict of these tensors by name, with one of them in memory at a time."""
    check_free(path.parent, sum(tensor.nbytes for tensor in tensors))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", _pickled(tensors))
        archive.writestr(f"{path.stem}/byteorder", b"little")
        for i, tensor in enumerate(tensors):
            with archive.open(f"{path.stem}/data/{i}", "w", force_zip64=True) as file:
                file.write(tensor_bytes(tensor))
        archive.writestr(f"{path.stem}/version", _FORMAT)


def _pickled(tensors: Iterable[Tensor]) -> bytes:
    items = b"".join(_text(tensor.name) + _tensor(tensor, key=str(i)) for i, tensor in enumerate(tensors))
    return _PROTOCOL + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor(tensor: Tensor, key: str) -> bytes:
    """The call `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)`."""
    strides, count = [], 1
    for size in reversed(tensor.shape):
        strides.insert(0, count)
        count *= size
    kind = _global("torch", _STORAGES[NAMES[tensor.dtype.name]])
    storage = _tuple([_text("storage"), kind, _text(key), _text("cpu"), _int(count)]) + pickle.BINPERSID
    no_hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    shape, strides = (_tuple(map(_int, lengths)) for lengths in (tensor.shape, strides))
    arguments = _tuple([storage, _int(0), shape, strides, pickle.NEWFALSE, no_hooks])
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _int(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x09" + value.to_bytes(9, "little")
