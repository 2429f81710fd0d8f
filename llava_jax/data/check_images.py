"""Checks that the images of samples exist and can be decoded. Good images that did not change are not read again.

The cache is a file of eight bytes for each good image, appended as they are found, so that an interrupted check
continues where it was. Bad images are read each time.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from llava_jax.cli import UserError, track
from llava_jax.data.check_records import CheckedRecords, Problem
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import decode_image, in_any_spelling, load_image
from llava_jax.data.parquet import ImageSource, ParquetImages
from llava_jax.data.samples import Fault
from llava_jax.files import cache

AT_ONCE = 256
IMAGES = 1  # version of the cache: raise it when other images would be found bad


class GoodImages:
    """The good images of a folder, by hashes of name and version."""

    def __init__(self, folder: epath.PathLike):
        where = folder if cache.is_remote(folder) else os.path.abspath(folder)
        self.file = cache.directory() / f"pictures-{cache.digest(IMAGES, str(where))}"
        self.known = np.zeros(0, np.uint64)
        with contextlib.suppress(OSError):
            size = self.file.stat().st_size
            if size % 8:  # the last write was cut off
                os.truncate(self.file, size - size % 8)
            self.known = np.sort(np.fromfile(self.file, np.uint64))

    def __contains__(self, key: int) -> bool:
        place = int(np.searchsorted(self.known, np.uint64(key)))
        return place < len(self.known) and int(self.known[place]) == key

    def add(self, keys: list[int]) -> None:
        with cache.kept(), (cache.made() / self.file.name).open("ab") as file:
            file.write(np.array(keys, np.uint64).tobytes())


def image_problems(checked: CheckedRecords, folder: ImageSource, workers: int) -> Iterator[Problem]:
    """The faults of the images in a folder, for each sample that names them. No image is read twice."""
    good = GoodImages("" if isinstance(folder, ParquetImages) else folder)
    order = np.argsort(np.array(checked.names), kind="stable")
    names, users = np.array(checked.names)[order], np.array(checked.users)[order]
    hashes, firsts, counts = np.unique(names, return_index=True, return_counts=True)

    def look(number: int) -> tuple[Fault | None, int | None]:
        sample = checked.sample(int(users[firsts[number]]))
        name = next(name for name in sample.images if hash(name) == hashes[number])
        return _look(folder, name, good)

    def faults() -> Iterator[Fault | None]:
        with ThreadPoolExecutor(workers) as pool:  # decoding releases the interpreter's lock
            for start in range(0, len(hashes), AT_ONCE):
                found = list(pool.map(look, range(start, min(start + AT_ONCE, len(hashes)))))
                good.add([key for _, key in found if key is not None])
                yield from (fault for fault, _ in found)

    for number, fault in enumerate(track(faults(), "reading images", len(hashes))):
        if fault:
            for index in users[firsts[number] : firsts[number] + counts[number]].tolist():
                yield Problem(fault.kind, checked.id(index), fault.detail, index)


def _look(folder: ImageSource, name: str, good: GoodImages) -> tuple[Fault | None, int | None]:
    """The fault of an image, or its key if it is good and not cached yet. Those inside Parquet have no key."""
    if isinstance(folder, ParquetImages):
        try:
            decode_image(folder.read(name), name)
        except UserError as error:
            return Fault("bad-image", str(error)), None
        return None, None
    try:
        path = image_path(folder, name)
    except UserError as error:
        return Fault("image-name", str(error)), None
    try:
        version = in_any_spelling(cache.version, path)
    except FileNotFoundError:
        return Fault("missing-image", f"{path} does not exist"), None
    except (OSError, ValueError) as error:  # ValueError where the name holds a null byte
        return Fault("bad-image", f"image {path}: {error}"), None
    hashed = hashlib.blake2b(f"{name}\0{version}".encode(errors="surrogatepass"), digest_size=8)
    key = int.from_bytes(hashed.digest(), "little")
    if key in good:
        return None, None
    try:
        load_image(path)
    except UserError as error:
        return Fault("bad-image", str(error)), None
    return None, key
