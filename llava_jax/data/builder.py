"""The TFDS builder: writes LLaVA JSON and images to ArrayRecord shards, on the cores of this machine or on Apache Beam.

TFDS's own `download_and_prepare` works in a directory that it deletes when it is interrupted. This one works in place
and writes `dataset_info.json`, which makes the directory a TFDS data set, last. So an interrupted build can continue.
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from llava_jax.cli import track
from llava_jax.data.published import PUBLISHED
from llava_jax.data.shards import FEATURES, BadImage, Shard, write_shard

BAD_IMAGES = "bad_pictures.json"  # that workers of Beam found


class LlavaBuilder(FileReaderBuilder, skip_registration=True):
    """Writes `shards` and their description; `tfds.builder_from_directory` reads the result."""

    name = "llava"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="custom", description="Data in LLaVA's format."), *PUBLISHED]

    def __init__(self, shards: Sequence[Shard], config: str = "custom", workers: int = 0):
        self.shards = shards
        self.workers = workers or os.cpu_count()  # threads that write
        # Found by `download_and_prepare`; with any of these the set is not finished.
        self.bad_images: list[BadImage] = []
        super().__init__(data_dir=shards[0].output, config=config, file_format="array_record")

    def _build_data_dir(self, given_data_dir: str) -> tuple[str, str]:
        return given_data_dir, given_data_dir  # without a folder for name, configuration and version

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations about pictures, in the order of the file that they come from.",
            features=FEATURES,
            disable_shuffling=True,
        )

    def download_and_prepare(self, *, download_config: tfds.download.DownloadConfig | None = None) -> None:
        """Writes the missing shards, on Beam if the configuration has `beam_runner` or `beam_options`."""
        if download_config and (download_config.beam_runner or download_config.beam_options):
            self.bad_images = write_on_beam(self.shards, download_config)
        else:
            self.bad_images = write_in_threads(self.shards, self.workers)
        if self.bad_images:
            return
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.data_path, dataset_name=self.name, split="train", filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[shard.samples for shard in self.shards],
            num_bytes=sum(shard.path.stat().length for shard in self.shards),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.SplitDict([split]))
        self.info.write_to_directory(self.data_path)

    _download_and_prepare = download_and_prepare  # which is abstract


def write_in_threads(shards: Sequence[Shard], workers: int) -> list[BadImage]:
    """Threads are enough: files are read, images decoded and records written without the interpreter's lock."""
    bad: list[BadImage] = []
    leave = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(write_shard, shard, leave.is_set) for shard in shards]
        try:
            for future in track(as_completed(futures), "writing shards", len(futures)):
                bad += future.result()
        except BaseException:
            leave.set()
            pool.shutdown(cancel_futures=True)
            raise
    return bad


def write_on_beam(shards: Sequence[Shard], config: tfds.download.DownloadConfig) -> list[BadImage]:
    import apache_beam as beam

    found = epath.Path(shards[0].output) / BAD_IMAGES
    with beam.Pipeline(runner=config.beam_runner, options=config.beam_options) as pipeline:
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
