"""Sources of samples: their interface, and LLaVA's JSON format with an image folder.

The format is a JSON array of samples, or JSONL with one a line. A sample is `{"id": ..., "image": "a.jpg",
"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}`. `image`
may be a list, be called `images` or be absent. `id` may be a number, or be absent: then it is the index. `samples` has
the other keys that are read.
"""

import array
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from etils import epath

from llava_jax.cli import UserError, short
from llava_jax.data.features import Size
from llava_jax.data.formats import FORMATS
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import open_image, read_size
from llava_jax.data.parquet import ImageSource, ParquetImages, read_named
from llava_jax.data.records import Record, RecordFile, local_data, scan
from llava_jax.data.samples import Sample, parse_sample
from llava_jax.files import cache

T = TypeVar("T")

INDEX = 4  # version of the cached indices: raise it when files would have other faults or digests


class Source(Protocol):
    """Random access to samples. Their texts are read apart from their images. It is pickled for reading processes."""

    digest: str  # of all samples in order, the same for each way to store them

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def read_images(self, index: int, names: Sequence[str]) -> list[bytes]:
        """The files of the first images of a sample, called `names` in it. Raises `UserError` naming the image."""
        ...

    def read_sizes(self, index: int, names: Sequence[str]) -> list[Size]:
        """The sizes of these images, without decoding them. Raises `UserError` naming the image."""
        ...


class LlavaJson(Sequence[Sample]):
    """The samples of a file and of folder `images`, which is needed only to read images: a `Source`.

    Opening it checks all samples; the cache keeps the result. Texts stay in the file. Raises `UserError` with file,
    line or index, and id for a record that is no sample; if `lenient`, only when that record is read. `texts` is a JSON
    file to read instead, made of the one at `path`, which errors name.
    """

    def __init__(
        self, path: epath.PathLike, images: ImageSource = "", lenient: bool = False, texts: Path | None = None
    ):
        self.path = path
        self.images = images
        self.formats = tuple(FORMATS.values())  # unpickling these imports their modules in reading processes
        self._records, self.digest = _index(path, lenient, texts)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        return parse_sample(self.record(index))

    def record(self, index: int) -> Record:
        """A record, not parsed yet."""
        index = range(len(self))[index]
        return Record(f"{self.path}: sample {index}", index, 0, 0, self._records[index])

    def read_images(self, index: int, names: Sequence[str]) -> list[bytes]:
        return [read_named(self.images, name) for name in names]

    def read_sizes(self, index: int, names: Sequence[str]) -> list[Size]:
        if isinstance(self.images, ParquetImages):
            return [open_image(self.images.read(name), name).size for name in names]
        return [read_size(image_path(self.images, name)) for name in names]

    def __repr__(self) -> str:
        return f"LlavaJson({str(self.path)!r})"


def read_images(
    source: Source, index: int, sample: Sample, decode: Callable[[bytes, str], T], count: int | None = None
) -> list[T]:
    """Reads and decodes the images of a sample of a source, all or the first `count`.

    `decode` makes of an image's file and name what is returned of it. Raises `UserError` naming image and sample.
    """
    names = sample.images[:count]
    try:
        return [decode(data, name) for data, name in zip(source.read_images(index, names), names, strict=True)]
    except UserError as error:
        raise UserError(f"sample {short(sample.id)}: {error}") from error


def image_sizes(source: Source, index: int, sample: Sample) -> list[Size]:
    """The sizes of the images of a sample of a source. Raises `UserError` naming image and sample."""
    try:
        return source.read_sizes(index, sample.images)
    except UserError as error:
        raise UserError(f"sample {short(sample.id)}: {error}") from error


def _index(path: epath.PathLike, lenient: bool, texts: Path | None) -> tuple[RecordFile, str]:
    """The positions and the digest of the records of a file. Raises `UserError` for a bad one unless `lenient`."""
    file = texts or local_data(path)
    formats = [(data_format.name, data_format.version) for data_format in FORMATS.values()]
    parts = (INDEX, lenient, os.path.abspath(file), cache.content_version(file), *formats)
    name = f"index-{cache.digest(*parts)}"
    index = cache.load(name)
    if index is None or not _is_index(index, file):
        starts, stops, digest = array.array("q"), array.array("q"), hashlib.sha256()
        for record in scan(file, path, show=f"reading {path}"):
            try:
                digest.update(repr(parse_sample(record)).encode())
            except UserError:
                if not lenient:
                    raise
                digest.update(repr(record.value).encode(errors="surrogatepass"))
            starts.append(record.start)
            stops.append(record.stop)
        index = {"starts": np.array(starts), "stops": np.array(stops), "digest": np.array(digest.hexdigest())}
        cache.save(name, **index)
    return RecordFile(file, index["starts"], index["stops"]), str(index["digest"])


def _is_index(index: dict[str, np.ndarray], file: Path) -> bool:
    """Whether arrays of the cache can be the index of a file: records that follow each other."""
    if index.keys() != {"starts", "stops", "digest"} or index["digest"].dtype.kind != "U":
        return False
    places = [index["starts"], index["stops"]]
    if any(part.ndim != 1 or part.dtype != np.int64 for part in places) or len(places[0]) != len(places[1]):
        return False
    ends = np.stack(places, axis=1).ravel()
    return len(ends) > 0 and ends[0] >= 0 and ends[-1] <= file.stat().st_size and bool(np.all(np.diff(ends) >= 0))
