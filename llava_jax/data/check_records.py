"""Checks the records of a file of any size in one pass, which keeps some 60 bytes of each for the other checks."""

import array
import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from llava_jax.cli import UserError, one_line, short, track
from llava_jax.data.conversation import has_interleaved_images
from llava_jax.data.features import Size
from llava_jax.data.formats import FORMATS
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import read_size
from llava_jax.data.records import Record, RecordFile, local_data, scan
from llava_jax.data.samples import Sample, from_first_question, parse_sample, read_sample, sample_id, sample_value
from llava_jax.data.selection import is_one_json, open_json
from llava_jax.data.unsupported import READ, doubtful_mark, unread_texts

MAX_ID = 500  # characters of an id in a line
INTERLEAVED = "has text between the images of a turn, which are moved before it: image_position=as_is keeps them"


class Problem(NamedTuple):
    """A line of the report. A warning is about something that training accepts but that is seldom intended."""

    kind: str
    id: str
    detail: str
    index: int
    warning: bool = False

    def __str__(self) -> str:
        detail = f"warning: {self.detail}" if self.warning else self.detail
        line = one_line(f"{self.kind}, {short(self.id, MAX_ID)}, {detail}")
        return line.encode(errors="backslashreplace").decode()


class CheckedRecords(Sequence[Sample]):
    """The good samples of a file: a `Source` of texts after `read` has ended."""

    def __init__(self, path: epath.PathLike, image_position: str = "first", images: epath.PathLike = ""):
        self.path = path
        self.image_position = image_position
        self.images = images
        self.selected = None if is_one_json(path) else open_json(path, images, lenient=True)
        self.file = None if self.selected else local_data(path)
        self.records: RecordFile | None = None
        self.starts, self.stops = array.array("q"), array.array("q")
        self.lines = array.array("q")  # line numbers of JSONL, indices in an array
        self.unit = ""  # "line" or "sample"
        self.good = array.array("q")  # indices of the samples
        self.ids, self.contents = array.array("q"), array.array("q")  # hashes of each record
        self.names, self.users = array.array("q"), array.array("q")  # hashes of image names, and indices of their users
        self.unread: collections.Counter[str] = collections.Counter()  # keys that are ignored, with counts
        self._digest = hashlib.sha256()
        self.formats = tuple(FORMATS.values())  # unpickling these imports their modules in reading processes

    def read(self, special_tokens: Iterable[str]) -> Iterator[Problem]:
        """Reads the file; yields the problems of single records."""
        if self.selected:
            records = map(self.record, track(range(len(self.selected)), "reading samples"))
        else:
            records = scan(self.file, self.path, show="reading samples")
        for record in records:
            self.unit, _, line = record.where.rpartition(" ")
            self.lines.append(int(line))
            self.starts.append(record.start)
            self.stops.append(record.stop)
            yield from self._read_record(record, special_tokens)
        if not self.selected:
            self.records = RecordFile(self.file, np.array(self.starts), np.array(self.stops))
        self.digest = self._digest.hexdigest()

    def _read_record(self, record: Record, special_tokens: Iterable[str]) -> Iterator[Problem]:
        key = content = hash(("record", record.index))  # equal to no other
        try:
            value = sample_value(record)
        except UserError as error:
            yield Problem("structure", str(record.index), str(error), record.index)
        else:
            ident = sample_id(record, value)
            key = hash(ident)
            reading = read_sample(value)
            yield from (Problem(f.kind, ident, f"{record.where}: {f.detail}", record.index) for f in reading.faults)
            if not reading.faults:
                self.unread.update(key for key in value if key not in READ)
                sample = Sample(ident, reading.images, from_first_question(reading.turns))
                content = hash(sample)
                self._add(sample, record.index)
                if len(reading.turns) > len(sample.turns):
                    detail = "begins with an answer, which training drops"
                    yield Problem("order", ident, detail, record.index, warning=True)
                yield from _turn_problems(sample, special_tokens, record.index)
                for text in unread_texts(value, [text for _, text in sample.turns]):
                    detail = f"`{text}` is not read, and no turn says the same"
                    yield Problem("key", ident, detail, record.index, warning=True)
                if self.image_position != "as_is" and has_interleaved_images(sample.turns):
                    yield Problem("image-position", ident, INTERLEAVED, record.index, warning=True)
        self.ids.append(key)
        self.contents.append(content)

    def _add(self, sample: Sample, index: int) -> None:
        self.good.append(index)
        self._digest.update(repr(sample).encode(errors="surrogatepass"))
        for name in dict.fromkeys(sample.images):
            self.names.append(hash(name))
            self.users.append(index)

    def duplicates(self) -> Iterator[Problem]:
        """Records with the id of an earlier one: an error if all else is equal, too, else a warning."""
        first_id, first_content = _first_equal(self.ids), _first_equal(self.contents)
        for index in np.flatnonzero(first_id != np.arange(len(first_id))).tolist():
            same = first_content[index] != index
            first = int((first_content if same else first_id)[index])
            what = "is the same as" if same else "has other turns or images than, and the id of,"
            detail = f"{self.record(index).where} has the id of {self.record(first).where}: it {what} that one"
            yield Problem("duplicate-id", self.id(index), detail, index, warning=not same)

    def record(self, index: int) -> Record:
        """A record, with its index in all files or its line in the only one."""
        if self.selected:
            return self.selected.record(index)._replace(index=index)
        return Record(f"{self.unit} {self.lines[index]}", index, 0, 0, self.records[index])

    def id(self, index: int) -> str:
        """The id of a record."""
        record = self.record(index)
        return sample_id(record, sample_value(record))

    def sample(self, index: int) -> Sample:
        """The sample at record `index`."""
        return parse_sample(self.record(index))

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, number: int) -> Sample:
        return self.sample(self.good[number])

    def read_sizes(self, number: int, names: Sequence[str]) -> list[Size]:
        if self.selected:
            return self.selected.read_sizes(self.good[number], names)
        return [read_size(image_path(self.images, name)) for name in names]

    def __getstate__(self) -> dict:
        """What reading processes need."""
        names = ("path", "images", "selected", "unit", "lines", "good", "records", "digest", "formats")
        return {name: self.__dict__[name] for name in names}


def _first_equal(hashes: array.array) -> np.ndarray:
    """The index of the first item that equals each item; int64[N]."""
    _, first, inverse = np.unique(np.array(hashes), return_index=True, return_inverse=True)
    return first[inverse]


def _turn_problems(sample: Sample, special_tokens: Iterable[str], index: int) -> Iterator[Problem]:
    if sample.turns and sample.turns[-1][0] == "user":
        yield Problem("order", sample.id, "ends with a question that has no answer", index, warning=True)
    questions = 0
    for role, text in sample.turns:
        questions += role == "user"
        if role == "assistant" and not text.strip():
            yield Problem("empty-answer", sample.id, f"the answer to question {questions} is empty", index)
        for token in special_tokens:
            if token in text:
                yield Problem("special-token", sample.id, f"the text of a {role} holds {token}", index, warning=True)
        if role == "user" and (mark := doubtful_mark(text)):
            detail = f"question {questions} holds {mark}: if it is meant as a mark, nothing stands for it"
            yield Problem("marks", sample.id, detail, index, warning=True)
    if not any(role == "assistant" for role, _ in sample.turns):
        yield Problem("nothing-learned", sample.id, "has no answer to learn from", index)
