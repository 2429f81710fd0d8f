"""Reads a data set that `llava_jax.data.build` made: a source of samples. `shards.py` describes its files.

Texts and indices of shards stay on disk, so memory does not grow with the number of samples. The files of a data set on
an object store are copied to the cache of this machine, unless they are there already.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from llava_jax.cli import UserError, shown
from llava_jax.data.features import Size
from llava_jax.data.images import open_image
from llava_jax.data.shards import MANIFEST, OFFSETS, TEXT, read_manifest, sample_of_line
from llava_jax.data.sources import Sample
from llava_jax.files import cache
from llava_jax.files.reading import read_object

OWN_FEATURES = "tensorflow_datasets.core.features."
# Indices of shards stay on disk: in memory they grow with the data and save only a tenth of a millisecond a record.
READER_OPTIONS = {"index_storage_option": "offloaded", "footer_prefetch_bytes": "0"}


def _refuse_code(file: epath.Path) -> None:
    """Raises `UserError` if TFDS would import modules other than its own to find the types of features."""
    parts: list[Any] = [read_object(file)]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        for key in ("type", "pythonClassName", "python_class_name"):
            if isinstance(part, dict) and not str(part.get(key, OWN_FEATURES)).startswith(OWN_FEATURES):
                raise UserError(f"{file}: has features of type {shown(part[key])}, not of TFDS: no built data set")


class Built(Sequence[Sample]):
    """The samples of a built data set: a `Source`. Raises `UserError` if it is none, damaged or not finished."""

    def __init__(self, path: epath.PathLike):
        self.path = os.fspath(path)
        directory = epath.Path(path)
        if not (directory / "dataset_info.json").exists():
            left = "is not finished: run the same build again" if (directory / MANIFEST).exists() else "is none"
            raise UserError(f"{path}: {left} (a data set that llava_jax.data.build makes)")
        self.digest = read_manifest(directory / MANIFEST)["digest"]
        _refuse_code(directory / "features.json")
        try:
            instructions = tfds.builder_from_directory(self.path).info.splits["train"].file_instructions
        except Exception as error:  # TFDS raises nearly anything on damaged files
            raise UserError(f"{path}: TFDS cannot read it ({type(error).__name__}: {error}): build it again") from error
        shards = [directory / os.path.basename(shard.filename) for shard in instructions]  # its folder may have moved
        names = [directory / TEXT, directory / OFFSETS, *shards]
        self._text, self._offsets, *shards = map(os.fspath, cache.local_files(names))
        instructions = [dataclasses.replace(i, filename=f) for i, f in zip(instructions, shards, strict=True)]
        self._records = grain.sources.ArrayRecordDataSource(instructions, READER_OPTIONS)
        for file in directory.glob("lengths-*.npz"):
            cache.adopt(file)
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._text, os.O_RDONLY)  # open while the process runs
        try:
            self._lines = np.load(self._offsets, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise UserError(f"{self.path}: {OFFSETS} is damaged ({error}): build it again") from error
        if len(self._lines) - 1 != len(self._records):
            raise UserError(f"{self.path}: {len(self._lines) - 1} texts, {len(self._records)} records: build it again")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        start, stop = self._lines[index : index + 2].tolist()
        return sample_of_line(os.pread(self._file, stop - start, start))

    def read_images(self, index: int, names: Sequence[str]) -> list[bytes]:
        if not names:
            return []
        try:
            example = tf_example_pb2.Example.FromString(self._records[range(len(self))[index]])
            stored = example.features.feature["images"].bytes_list.value
            return [stored[number] for number in range(len(names))]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"its record in {self.path} is damaged ({error}): remove that shard and dataset_info.json, and run the "
                "same build again"
            ) from error

    def read_sizes(self, index: int, names: Sequence[str]) -> list[Size]:
        files = zip(self.read_images(index, names), names, strict=True)
        return [open_image(data, name).size for data, name in files]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_file", "_lines")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"Built({self.path!r})"
