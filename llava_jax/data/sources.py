"""Where samples come from: the interface of a source, and LLaVA's JSON format with an image folder.

The format is a JSON array of samples, or JSONL with one a line.

A sample is `{"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A cat."}]}`. `image` may be a list (or be called `images`) or be absent; `id` may be a
number or be absent, and is then the index.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from etils import epath

from llava_jax.cli import UserError
from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.images import read_picture

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


class Record(NamedTuple):
    """A sample before anything about it is known: where it stands, its index, and its JSON (bytes: a line, unread)."""

    where: str
    index: int
    value: Any


class Fault(NamedTuple):
    """Why a record is no sample."""

    kind: str
    detail: str


class LlavaJson(Sequence[Sample]):
    """The samples of a file, their pictures in folder `images` (not needed where none is read): a `Source`.

    All are checked when it is opened. Raises `UserError` with file, line or index, and id.
    """

    def __init__(self, path: epath.PathLike, images: epath.PathLike = ""):
        self.path = path
        self.images = images
        self._samples = [parse_sample(record) for record in read_records(path)]
        self.digest = digest_of(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def read_pictures(self, index: int, count: int) -> list[bytes]:
        sample = self[index]
        try:
            return [read_picture(epath.Path(self.images) / name) for name in sample.images[:count]]
        except UserError as error:
            raise UserError(f"sample {sample.id}: {error}") from error

    def __repr__(self) -> str:
        return f"LlavaJson({str(self.path)!r})"


def digest_of(samples: Iterable[Sample]) -> str:
    """What tells these samples, their image names and their order from others."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr(sample).encode())
    return digest.hexdigest()


def read_records(path: epath.PathLike) -> list[Record]:
    """The records of a JSON array, or of JSONL, whose lines stay unread so that one bad line hides no other."""
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip().startswith(b"["):
        records = [Record(f"{path}: sample {i}", i, value) for i, value in enumerate(_load_json(data, str(path)))]
    else:
        lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        records = [Record(f"{path}: line {number}", i, line) for i, (number, line) in enumerate(lines)]
    if not records:
        raise UserError(f"{path}: holds no samples: a JSON array of them, or one a line, was expected")
    return records


def parse_sample(record: Record) -> Sample:
    """The sample of a record; one that begins with an answer loses it, as published. Raises `UserError`."""
    value = record_value(record)
    for fault in find_faults(value):
        raise UserError(f"{record.where} (id {sample_id(record, value)}): {fault.detail}")
    return Sample(sample_id(record, value), image_names(value), turns_of(value))


def record_value(record: Record) -> Any:
    """The JSON value of a record. Raises `UserError` for a line that is no JSON."""
    return _load_json(record.value, record.where) if isinstance(record.value, bytes) else record.value


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


def _load_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: is no JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is no UTF-8: {error}") from error


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
