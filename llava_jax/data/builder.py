"""Writes shards of LLaVA JSON and images, on the cores of this machine or on Apache Beam, and describes them for TFDS.

TFDS's own `download_and_prepare` works in a directory that it deletes when it is interrupted. Here shards are written
in place, and `dataset_info.json`, which makes the directory a TFDS data set, last. So an interrupted build can go on.
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from llava_jax.cli import track
from llava_jax.data.published import PUBLISHED
from llava_jax.data.shards import FEATURES, BadImage, Shard, write_shard

BAD_IMAGES = "bad_pictures.json"  # that workers of Beam found


class LlavaBuilder(FileReaderBuilder, skip_registration=True):
    """The builder of TFDS that describes a data set; `tfds.builder_from_directory` reads the result."""

    name = "llava"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="custom", description="Data in LLaVA's format."), *PUBLISHED]

    def _build_data_dir(self, given_data_dir: str) -> tuple[str, str]:
        return given_data_dir, given_data_dir  # without a folder for name, configuration and version

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about images, in the order of the file that they come from.",
            features=FEATURES,
            disable_shuffling=True,
        )

    def _download_and_prepare(self, *_: Any) -> None:
        raise NotImplementedError  # the shards are written by the functions below


def describe(shards: Sequence[Shard], config: str) -> None:
    """Writes the description of complete shards."""
    builder = LlavaBuilder(data_dir=shards[0].output, config=config, file_format="array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=builder.data_path, dataset_name=builder.name, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[shard.samples for shard in shards],
        num_bytes=sum(shard.path.stat().length for shard in shards),
        filename_template=template,
    )
    builder.info.set_splits(tfds.core.SplitDict([split]))
    builder.info.write_to_directory(builder.data_path)


def write_in_threads(shards: Sequence[Shard], workers: int) -> list[BadImage]:
    """Writes the missing shards; with bad images, which are returned, the set is not finished.

    Threads are enough: files are read, images decoded and records written without the interpreter's lock.
    """
    bad: list[BadImage] = []
    leave = threading.Event()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = [pool.submit(write_shard, shard, leave.is_set) for shard in shards]
        try:
            for future in track(as_completed(futures), "writing shards", len(futures)):
                bad += future.result()
        except BaseException:
            leave.set()
            pool.shutdown(cancel_futures=True)
            raise
    return bad


def write_on_beam(shards: Sequence[Shard], options: Any) -> list[BadImage]:
    """The same on Beam, with `PipelineOptions`."""
    import apache_beam as beam

    found = epath.Path(shards[0].output) / BAD_IMAGES
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create(shards)
            | "spread" >> beam.Reshuffle()
            | "write" >> beam.FlatMap(write_shard)
            | "gather" >> beam.combiners.ToList()
            | "report" >> beam.Map(lambda bad: found.write_text(json.dumps(bad)))
        )
    bad = [(ident, detail) for ident, detail in json.loads(found.read_text())]
    found.unlink()
    return bad
