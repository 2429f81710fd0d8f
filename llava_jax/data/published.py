"""Published data sets: their contents and where their images come from, to explain incomplete downloads."""

import collections
import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds
from etils import epath

OTHER_EXTENSIONS = (".png", ".gif", ".jpeg", ".JPG", ".webp")


@dataclasses.dataclass(eq=False, kw_only=True)
class Published(tfds.core.BuilderConfig):
    """A published data set."""

    json: str  # the name of its file
    samples: int
    text_only: int = 0  # samples without an image; -1 if unknown
    folders: dict[str, str]  # subfolders of the folder of images ("" is that itself) -> their origin
    source: str  # who publishes the file


_FILE = Path(__file__).with_name("published.toml")
PUBLISHED = tuple(Published(**fields) for fields in tomllib.loads(_FILE.read_text(encoding="utf-8"))["data_sets"])


def problems(published: Published, images: epath.Path, samples: int, text_only: int) -> Iterator[str]:
    """Messages about missing folders of images, and about numbers of samples that differ from the published ones."""
    for folder, origin in published.folders.items():
        if not (images / folder).is_dir():
            yield f"{images / folder} is missing: it holds {origin}"
    if samples != published.samples:
        yield f"{samples:,} samples where {published.json} of {published.source} has {published.samples:,}"
    elif published.text_only not in (-1, text_only):
        yield f"{text_only:,} samples without an image where {published.json} has {published.text_only:,}"


def explain_missing(images: epath.Path, missing: Mapping[str, str]) -> Iterator[str]:
    """Messages about missing images (name -> the id of a sample), by folder, and whether they were renamed."""
    folders = collections.defaultdict(list)
    for name in missing:
        folders[str(PurePosixPath(name).parent)].append(name)
    for folder, names in sorted(folders.items()):
        message = f"{len(names):,} images missing in {images / folder}, such as {names[0]}; it is "
        message += f"of sample {missing[names[0]]}"
        first = names[:100]
        renamed = sum(any((images / name).with_suffix(s).exists() for s in OTHER_EXTENSIONS) for name in first)
        if renamed:
            message += (
                f"; {renamed} of the first {len(first)} are there with another extension: rename them to "
                "what the data calls them (the content of a file decides what it is, not its name)"
            )
        yield message
