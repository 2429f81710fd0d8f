"""The files of a built data set: its texts in one file, its samples with their images in shards of ArrayRecord.

    metadata.json        digest of the source, counts of samples and images; written first
    text.jsonl           the samples, one a line, as LLaVA JSON
    text_offsets.npy     int64[N + 1]: the first byte of each line, and the end of the file
    lengths-*.npz        optional: tokens, targets and images of each sample, as in the cache
    llava-train.array_record-00000-of-00042, ...   a tf.Example a sample: text and images, the bytes of their files
    dataset_info.json, features.json               description for TFDS; written last

Texts, a hundredth of the data, have their own file, because training measures and plans all samples before the first
step without reading images. Records have them, too, for readers that use only `tfds.data_source`. `text.jsonl` is LLaVA
JSON, which all commands for that read.

A shard is a function of the lines and images of its samples. It is written atomically: a shard that exists is complete,
however a build was interrupted.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from llava_jax.cli import UserError
from llava_jax.data.images import decode_image
from llava_jax.data.parquet import ImageSource, ParquetImages, read_named
from llava_jax.data.samples import ROLES, Sample, conversation
from llava_jax.files.reading import read_object
from llava_jax.files.writing import atomic_path
from llava_jax.remote import is_remote

MANIFEST, TEXT, OFFSETS = "metadata.json", "text.jsonl", "text_offsets.npy"
SHARD_NAME = "llava-train.array_record-{index:05}-of-{count:05}"  # as TFDS names them

# One record a group gives random access. Images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"

FEATURES = tfds.features.FeaturesDict(
    {
        "id": tfds.features.Text(),
        "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
        "image_names": tfds.features.Sequence(tfds.features.Text()),
        "num_images": tfds.features.Scalar(np.int32),
        "images": tfds.features.Sequence(tfds.features.Image(doc="The bytes of the file: JPEG, PNG, ...")),
    }
)
_SERIALIZER = ExampleSerializer(FEATURES.get_serialized_info())


BadImage = tuple[str, str]  # the id of a sample, and why an image of it cannot be read


@dataclass(frozen=True)
class Shard:
    """A shard to write. It is pickled for workers of Beam."""

    output: str  # the directory of the data set, local or remote
    images: ImageSource
    index: int
    count: int  # of all shards
    begin: int  # its samples are the bytes from `begin` to `end` of `text.jsonl`
    end: int
    samples: int  # the number of its samples
    decode: bool = True  # whether to find images that cannot be decoded

    @property
    def path(self) -> epath.Path:
        return epath.Path(self.output) / SHARD_NAME.format(index=self.index, count=self.count)


def read_manifest(file: epath.Path) -> dict[str, Any]:
    """Reads `metadata.json`. Raises `UserError` if the file is damaged."""
    manifest = read_object(file)
    if not isinstance(manifest.get("digest"), str) or not isinstance(manifest.get("shards"), int):
        raise UserError(f"{file}: is damaged: it has no digest and number of shards; build the set again")
    return manifest


def write_shard(shard: Shard, stopped: Callable[[], bool] = lambda: False) -> list[BadImage]:
    """Writes a shard unless it is complete. Returns the images that cannot be read; with any it is not written.

    `stopped` is called before each sample. If it returns true, `InterruptedError` is raised.
    """
    bad: list[BadImage] = []
    if is_complete(shard):
        return bad
    with atomic_path(shard.path) as file:
        with _record_writer(file) as writer:
            for sample in read_samples(shard):
                if stopped():
                    raise InterruptedError
                images = [_read_image(shard, name) for name in sample.images]
                bad += [(sample.id, str(fault)) for fault in images if isinstance(fault, UserError)]
                if not bad:
                    writer.write(serialize(sample, images))
        if bad:
            os.unlink(file)
    return bad


def is_complete(shard: Shard) -> bool:
    """Whether a shard exists with all its records, according to its footer, which is written last."""
    if is_remote(shard.path):
        return shard.path.exists()  # object stores have no partially written objects
    return shard.path.exists() and ArrayRecordReader(os.fspath(shard.path)).num_records() == shard.samples


def read_samples(shard: Shard) -> Iterator[Sample]:
    """The samples of a shard, from its part of `text.jsonl`."""
    with (epath.Path(shard.output) / TEXT).open("rb") as file:
        file.seek(shard.begin)
        lines = file.read(shard.end - shard.begin).splitlines()
    return map(sample_of_line, lines)


def sample_of_line(line: bytes) -> Sample:
    """The sample of a line of `text.jsonl`."""
    try:
        value = json.loads(line)
        turns = tuple((ROLES[turn["from"]], turn["value"]) for turn in value["conversations"])
        return Sample(value["id"], tuple(value.get("image", ())), turns)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{TEXT}: a line is damaged ({error}): build the set again") from error


def line_of(sample: Sample) -> bytes:
    """A sample as a line of `text.jsonl`."""
    value: dict = {"id": sample.id}
    if sample.images:
        value["image"] = sample.images
    value["conversations"] = conversation(sample.turns)
    return json.dumps(value).encode() + b"\n"


def serialize(sample: Sample, images: list[bytes]) -> bytes:
    """The record of a sample: a tf.Example of `FEATURES`."""
    example = {
        "id": _utf8(sample.id),
        "conversations": conversation(sample.turns),
        "image_names": [_utf8(name) for name in sample.images],
        "num_images": len(sample.images),
        "images": images,
    }
    # Otherwise the order of maps, and so the bytes of shards, would differ between processes.
    return _SERIALIZER.get_tf_example(FEATURES.encode_example(example)).SerializeToString(deterministic=True)


@contextlib.contextmanager
def _record_writer(file: str) -> Iterator[ArrayRecordWriter]:
    """Raises `UserError` if the disk is full."""
    try:
        writer = ArrayRecordWriter(file, WRITER_OPTIONS)
        yield writer
        writer.close()
    except RuntimeError as error:
        raise UserError(f"a shard cannot be written: {error}") from error


def _read_image(shard: Shard, name: str) -> bytes | UserError:
    try:
        data = read_named(shard.images, name)
        if shard.decode:
            decode_image(data, name if isinstance(shard.images, ParquetImages) else f"{shard.images}/{name}")
    except UserError as error:
        return error
    return data


def _utf8(text: str) -> bytes:
    return text.encode(errors="backslashreplace")
