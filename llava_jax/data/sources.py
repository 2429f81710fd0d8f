"""Where samples come from: the interface of a source, and LLaVA's JSON format with an image folder.

The format is a JSON array of samples, or JSONL with one a line.

A sample is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A cat."}]}`. `image` may be a list (or be called `images`) or be absent; `id` may be a
number or be absent, and is then the index.
"""

import array
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from llava_jax.cli import UserError, track
from llava_jax.data import cache
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.images import read_picture
from llava_jax.data.records import Record, RecordFile, load_json, local_data, scan

INDEX = 1  # of the caches of files: raise it when another version would find other faults or digests

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation and the names of its images, one for every `<image>` in its turns, in their order."""

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # (role, text): 'user' and 'assistant' in turn, the user first


class Source(Protocol):
    """Random access to samples; texts are cheap and apart from pictures. Travels to processes that read.

    Attributes:
      digest: of all samples in their order, whatever holds them: `digest_of`.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def read_pictures(self, index: int, count: int) -> list[bytes]:
        """The first `count` pictures of a sample as they are stored. Raises `UserError` naming picture and sample."""
        ...


class Fault(NamedTuple):
    """Why a record is no sample."""

    kind: str
    detail: str


class LlavaJson(Sequence[Sample]):
    """The samples of a file, their pictures in folder `images` (not needed where none is read): a `Source`.

    All are checked when it is opened, which the cache remembers; texts stay in the file. Raises `UserError` with file,
    line or index, and id; if `lenient`, only where a record is asked for that is no sample.
    """

    def __init__(self, path: epath.PathLike, images: epath.PathLike = "", lenient: bool = False):
        self.path = path
        self.images = images
        self._records, self.digest = _index(path, lenient)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        where = f"{self.path}: sample {index}"
        return parse_sample(Record(where, index, 0, 0, self._records[index]))

    def read_pictures(self, index: int, count: int) -> list[bytes]:
        sample = self[index]
        try:
            return [read_picture(epath.Path(self.images) / name) for name in sample.images[:count]]
        except UserError as error:
            raise UserError(f"sample {sample.id}: {error}") from error

    def __repr__(self) -> str:
        return f"LlavaJson({str(self.path)!r})"


def _index(path: epath.PathLike, lenient: bool) -> tuple[RecordFile, str]:
    """Where the records of a file are, once all are known to be samples (or not, if `lenient`), and their digest."""
    file = local_data(path)
    name = f"index-{cache.digest(INDEX, lenient, os.path.abspath(file), cache.version(file))}"
    index = cache.load(name)
    if index is None:
        starts, stops, digest = array.array("q"), array.array("q"), hashlib.sha256()
        for record in track(scan(file, path), f"reading {path}"):
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


def digest_of(samples: Iterable[Sample]) -> str:
    """What tells these samples, their image names and their order from others."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode())
    return digest.hexdigest()


def parse_sample(record: Record) -> Sample:
    """The sample of a record; one that begins with an answer loses it, as published. Raises `UserError`."""
    value = record_value(record)
    for fault in find_faults(value):
        raise UserError(f"{record.where} (id {sample_id(record, value)}): {fault.detail}")
    return Sample(sample_id(record, value), image_names(value), turns_of(value))


def record_value(record: Record) -> Any:
    """The JSON value of a record. Raises `UserError` for a line that is no JSON."""
    return load_json(record.value, record.where) if isinstance(record.value, bytes) else record.value


def find_faults(value: Any) -> Iterator[Fault]:
    """All that keeps a JSON value from being a sample; those of a kind that hides others come alone."""
    if not isinstance(value, dict):
        yield Fault("structure", f"is no object but {_shown(value)}")
        return
    if not isinstance(value.get("id"), str | int | None):
        yield Fault("structure", f"`id` is neither text nor a number but {_shown(value['id'])}")
        return
    images = value.get("image", value.get("images"))
    if not (images is None or isinstance(images, str) or _all_strings(images)):
        yield Fault("structure", f"`image` is neither a name nor a list of names but {_shown(images)}")
        return
    sentences = value.get("conversations")
    if not isinstance(sentences, list) or not sentences:
        yield Fault("structure", f"`conversations` is no list of turns but {_shown(sentences)}")
        return
    faults = [fault for i, sentence in enumerate(sentences, 1) for fault in _turn_faults(i, sentence)]
    yield from faults or _conversation_faults(value)


def _turn_faults(number: int, sentence: Any) -> Iterator[Fault]:
    if not isinstance(sentence, dict):
        yield Fault("structure", f"turn {number} is no object but {_shown(sentence)}")
        return
    if sentence.get("from") not in ROLES:
        yield Fault("role", f"turn {number} is from {_shown(sentence.get('from'))}: human and gpt are known")
    text = sentence.get("value")
    if not isinstance(text, str):
        yield Fault("structure", f"`value` of turn {number} is no text but {_shown(text)}")
    elif not (text.isascii() or _encodable(text)):
        yield Fault("structure", f"`value` of turn {number} is no valid Unicode: it holds half a surrogate pair")


def _conversation_faults(value: dict) -> Iterator[Fault]:
    turns = turns_of(value)
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            yield Fault("order", f"two turns of {role} in a row: human and gpt take turns")
            break
    marks = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    images = len(image_names(value))
    if marks != images:
        yield Fault("marks", f"{marks} {IMAGE_TOKEN} in the text, but {images} images: there has to be one for each")


def sample_id(record: Record, value: Any) -> str:
    """The id of a record, its index where it has none."""
    given = value.get("id") if isinstance(value, dict) else None
    return str(record.index if given is None else given)


def image_names(value: dict) -> tuple[str, ...]:
    """The images of a record, whichever way it names them."""
    images = value.get("image", value.get("images")) or ()
    return (images,) if isinstance(images, str) else tuple(images)


def turns_of(value: dict) -> tuple[tuple[str, str], ...]:
    """The turns of a record from the first question on."""
    turns = [(ROLES[sentence["from"]], sentence["value"]) for sentence in value["conversations"]]
    return tuple(turns[1:] if turns[0][0] == "assistant" else turns)


def _all_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
