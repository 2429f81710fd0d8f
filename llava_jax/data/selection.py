"""What `json` names: a file of samples, several as `folder/{a,b}.json`, Parquet or a folder of it, or a mixture.

Mixtures have LLaVA-NeXT's YAML format:

    datasets:
      - json_path: a.json
        sampling_strategy: random:50%   # or all, the default; first:1000, end:20%, ...

X% of n samples are ceil(X n / 100). Paths are relative to the working directory, and image names to one folder, as in
LLaVA-NeXT. Which samples `random` takes depends on their number and the place of the entry alone, not on a run's seed:
all commands see the same samples.
"""

import bisect
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml
from etils import epath

from llava_jax.cli import UserError, one_line, shown, warn
from llava_jax.data.features import Size
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.parquet import ParquetImages, parquet_files, texts
from llava_jax.data.plan import permutation
from llava_jax.data.records import Record
from llava_jax.data.sources import LlavaJson, Sample, Source
from llava_jax.files.reading import read_bytes, to_utf8

_SEVERAL = re.compile(r"(.*)\{([^{}]*)\}(\.jsonl?)")
_PART = re.compile(r"(first|end|random):(\d{1,15})(%?)")
_KEYS = {"json_path", "sampling_strategy"}


class _View(Sequence[Sample]):
    """A `Source` whose samples are those of other sources."""

    def find(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and its index there."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        source, index = self.find(index)
        return source[index]

    def record(self, index: int) -> Record:
        source, index = self.find(index)
        return source.record(index)

    def read_images(self, index: int, names: Sequence[str]) -> list[bytes]:
        source, index = self.find(index)
        return source.read_images(index, names)

    def read_sizes(self, index: int, names: Sequence[str]) -> list[Size]:
        source, index = self.find(index)
        return source.read_sizes(index, names)


class Joined(_View):
    """The samples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.starts = [0, *itertools.accumulate(len(source) for source in sources)]  # and the end of the last one
        self.digest = hashlib.sha256(" ".join(source.digest for source in sources).encode()).hexdigest()

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]


class Subset(_View):
    """Some samples of a source, by their indices."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices  # int64[N]
        self.digest = hashlib.sha256(source.digest.encode() + indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def find(self, index: int) -> tuple[Source, int]:
        return self.source, int(self.indices[index])


class Entry(NamedTuple):
    """An entry of a YAML file, not opened yet."""

    where: str  # the file, and the place in it
    path: str
    strategy: str


def open_json(path: epath.PathLike, images: epath.PathLike = "", lenient: bool = False) -> Source:
    """Opens what `json` names, with `LlavaJson`, whose arguments and errors it has."""
    if is_yaml(path):
        entries = enumerate(read_entries(path))
        return Joined([_part(open_json(e.path, images, lenient), e, number) for number, e in entries])
    if files := parquet_files(path):
        inside, parts = ParquetImages(files), [(file, *texts(file)) for file in files]
        return Joined([LlavaJson(f, inside if embedded else images, lenient, text) for f, text, embedded in parts])
    files = several(path)
    sources = [LlavaJson(file, images, lenient) for file in files]
    return sources[0] if files == [path] else Joined(sources)


def is_one_json(path: epath.PathLike) -> bool:
    """Whether a path names a single JSON or JSONL file."""
    return not is_yaml(path) and several(path) == [path] and not parquet_files(path)


def files_of(source: Source) -> Iterator[tuple[Source, np.ndarray]]:
    """The files that a source is of, and for each the indices in the source of the samples that are of it; int64[n]."""
    if isinstance(source, Joined):
        for part, start in zip(source.sources, source.starts, strict=False):
            yield from ((file, start + indices) for file, indices in files_of(part))
    elif isinstance(source, Subset):
        for file, indices in files_of(source.source):
            yield file, np.flatnonzero(np.isin(source.indices, indices))
    else:
        yield source, np.arange(len(source))


def images_of(source: Source, folder: ImageFolder) -> ImageFolder | ParquetImages:
    """Where the images of a source are: inside its Parquet files, or in a folder.

    Raises `UserError` if there are several such places.
    """
    places = {id(file.images): file.images for file, _ in files_of(source)}.values()
    inside = [place for place in places if isinstance(place, ParquetImages)]
    if inside and len(places) > 1:
        raise UserError(
            "has images at several places: check or build each set by itself, and train on a mixture of them"
        )
    return inside[0] if inside else folder


def is_yaml(path: epath.PathLike) -> bool:
    return os.fspath(path).lower().endswith((".yaml", ".yml"))


def several(path: epath.PathLike) -> list[epath.PathLike]:
    """The files that `folder/{a,b}.json` names; any other path alone."""
    if found := _SEVERAL.fullmatch(os.fspath(path)):
        before, names, suffix = found.groups()
        return [f"{before}{name.strip()}{suffix}" for name in names.split(",")]
    return [path]


def read_entries(path: epath.PathLike) -> list[Entry]:
    """The entries of a YAML file. Raises `UserError` naming file, entry and key for all that is not understood."""
    value = _read_yaml(path)
    if not isinstance(value, dict) or value.keys() != {"datasets"}:
        found = f"its keys are {', '.join(map(shown, value))}" if isinstance(value, dict) else _kind(value)
        raise UserError(f"{path}: has to hold `datasets` alone, a list of json_path and sampling_strategy; {found}")
    if not isinstance(value["datasets"], list) or not value["datasets"]:
        raise UserError(f"{path}: `datasets` is no list of json_path and sampling_strategy: {_kind(value['datasets'])}")
    return [_entry(f"{path}: datasets[{number}]", entry) for number, entry in enumerate(value["datasets"])]


def _entry(where: str, entry: Any) -> Entry:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is no json_path and sampling_strategy: {_kind(entry)}")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise UserError(f"{where}: `{unknown[0]}` is not read: json_path and sampling_strategy are")
    path, strategy = entry.get("json_path"), entry.get("sampling_strategy", "all")
    if not isinstance(path, str) or not path or is_yaml(path):
        raise UserError(f"{where}: `json_path` has to name a .json or .jsonl file: {_kind(path)}")
    part = _PART.fullmatch(strategy) if isinstance(strategy, str) else None
    if strategy != "all" and (not part or not int(part[2]) or (part[3] and int(part[2]) > 100)):
        raise UserError(
            f"{where}: `sampling_strategy` has to be all, first:X, end:X or random:X, where X is a number above 0, or "
            f"a whole percentage such as 20%: {_kind(strategy)}"
        )
    return Entry(where, path, strategy)


def _part(source: Source, entry: Entry, number: int) -> Source:
    """The samples of a source that an entry takes, in their order."""
    if entry.strategy == "all":
        return source
    which, asked, percent = _PART.fullmatch(entry.strategy).groups()
    count = -(-int(asked) * len(source) // 100) if percent else int(asked)
    if count > len(source):
        warn(f"{entry.where}: {entry.path} has {len(source)} samples: {entry.strategy} takes them all")
    order = permutation(len(source), "random", number) if which == "random" else np.arange(len(source))
    return Subset(source, np.sort(order[-count:] if which == "end" else order[:count]))


class _Loader(yaml.SafeLoader):
    """Builds plain values only. A key that is given twice is an error: YAML would keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                message = f"{shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: epath.PathLike) -> Any:
    data = to_utf8(read_bytes(path), path)
    try:
        return _Loader(data).get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML: {one_line(str(error))}") from error
    except (ValueError, RecursionError) as error:  # a date that is none, a value nested too deeply
        raise UserError(f"{path}: is no YAML: {type(error).__name__}: {error}") from error


def _kind(value: Any) -> str:
    """A value for a message; lists and dicts, which aliases can make huge, by their type alone."""
    return f"it is a {type(value).__name__}" if isinstance(value, list | dict) else f"it is {shown(value)}"
