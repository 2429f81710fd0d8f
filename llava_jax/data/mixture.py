"""The data of a run: LLaVA JSON and a folder, a built set, or several of these with weights.

A mixture is a source: the samples of one set after those of another. `plan.Visits` applies the weights.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.data.built import Built
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.parquet import ParquetImages
from llava_jax.data.plan import Lengths, Visits
from llava_jax.data.selection import Joined, files_of, open_json
from llava_jax.data.sources import LlavaJson, Source

KEYS = {"json", "images", "built", "weight"}


class Mixture(Joined):
    """The samples of several sources, one source after the other, with weights: a `Source`."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        super().__init__(sources)
        self.weights = tuple(weights)


def open_data(data: ConfigDict, lenient: bool = False) -> Source:
    """Opens the source that `config.data` names. Raises `UserError` if it names none, or more than one."""
    single = {key: data[key] for key in ("json", "images", "built") if data[key]}
    if not data.mixture:
        return _open("config.data", single, data, lenient)
    if single:
        names = " and ".join(f"config.data.{key}" for key in single)
        raise UserError(f"config.data.mixture stands beside {names}: set either, or name that in the mixture too")
    entries = [(f"config.data.mixture[{i}]", entry) for i, entry in enumerate(data.mixture)]
    for name, entry in entries:
        if not isinstance(entry, Mapping) or not entry.keys() <= KEYS:
            raise UserError(f"{name} is {entry!r}: it has to be a dict of {', '.join(sorted(KEYS))}")
        if paths := [key for key in KEYS - {"weight"} if not isinstance(entry.get(key, ""), str)]:
            raise UserError(f"{name}.{paths[0]} is {entry[paths[0]]!r}: it has to be one path; others are more entries")
        weight = entry.get("weight", 1.0)
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UserError(f"{name}: a weight has to be a number above 0, not {weight!r}")
    sources = [_open(name, entry, data, lenient) for name, entry in entries]
    return Mixture(sources, [float(entry.get("weight", 1.0)) for _, entry in entries])


def _open(name: str, given: Mapping[str, Any], data: ConfigDict, lenient: bool) -> Source:
    if bool(given.get("json")) == bool(given.get("built")):
        said = "names both" if given.get("json") else "names no data: set"
        raise UserError(f"{name} {said} json (with images) {'and' if given.get('json') else 'or'} built")
    if given.get("built"):
        if given.get("images"):
            raise UserError(f"{name}.images is set, but {given['built']} holds its own images")
        return Built(given["built"])
    images = ImageFolder(given.get("images", ""), data.get("allow_absolute_images", False))
    return open_json(given["json"], images, lenient)


def visits(source: Source, chosen: np.ndarray, seed: int) -> np.ndarray | Visits:
    """The samples of each epoch for `plan.Order`, of the samples chosen to train on, ascending indices."""
    if not isinstance(source, Mixture):
        return chosen
    bounds = np.searchsorted(chosen, source.starts)
    parts = [chosen[start:stop] for start, stop in itertools.pairwise(bounds)]
    for part, weight, data in zip(parts, source.weights, source.sources, strict=True):
        if not round(len(part) * weight):
            raise UserError(f"{data}: weight {weight} of {len(part)} samples is less than one an epoch: raise it")
    return Visits(tuple(parts), source.weights, seed)


def check_folders(source: Source, lengths: Lengths) -> None:
    """Raises `UserError` if samples have images but there is no folder of images."""
    for file, indices in files_of(source):
        if isinstance(file, LlavaJson) and not isinstance(file.images, ParquetImages) and lengths.images[indices].any():
            if not file.images:
                raise UserError(f"{file.path} has samples with images: give their folder (--config.data.images=...)")
            if not epath.Path(file.images).is_dir():
                raise UserError(f"{file.images}: no such folder of images (of {file.path})")
