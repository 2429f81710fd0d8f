"""Records of a JSON array or of JSONL of any size: read as a stream, or at random by their positions.

Memory holds no more of the file than a block and a record.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
from etils import epath

from llava_jax.cli import UserError, track
from llava_jax.files import cache
from llava_jax.files.reading import MAX_DEPTH, POINTER, broken, loads, refuse_pointer, require_regular
from llava_jax.remote import is_remote, new_local

BLOCK = 4 * 2**20  # bytes read at a time
MAX_RECORD = 64 * 2**20  # bytes; a longer record is no sample
BOM = b"\xef\xbb\xbf"
# First bytes of files that are not text -> what converts them to text.
_BINARY = {
    b"\x1f\x8b": "compressed by gzip: gunzip it",
    b"PK\x03\x04": "a ZIP archive: unzip it",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard: unzstd it",
    b"BZh": "compressed by bzip2: bunzip2 it",
    b"\xfd7zXZ\x00": "compressed by xz: unxz it",
    b"PAR1": "Parquet: write it as JSON, such as by pandas.read_parquet(OLD).to_json(NEW, orient='records')",
    b"ARROW1": "Arrow: write it as JSON, such as by datasets.Dataset.from_file(OLD).to_json(NEW)",
}

_SPACE = re.compile(r"[ \t\n\r]*")
_LIST = re.compile(r"\[[ \t\n\r]*")


class Record(NamedTuple):
    """A record of a file, not checked yet."""

    where: str  # its file, and its line or index
    index: int
    start: int  # its first byte
    stop: int  # one after its last
    value: Any  # its JSON value, or bytes that are not parsed yet


class RecordFile:
    """Random access to the bytes of records. It holds only their positions.

    When it is pickled for other processes of this machine, the positions go to a file, which these processes map.
    """

    def __init__(self, path: Path, starts: np.ndarray, stops: np.ndarray):
        self.path = path
        self.starts = starts  # int64[N]
        self.stops = stops  # int64[N]
        self._file: BinaryIO | None = None
        self._shared: Path | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> bytes:
        if (file := self._file) is None:  # several threads may open it at once: each reads its own
            file = self._file = self.path.open("rb", buffering=0)
        start = int(self.starts[index])
        return os.pread(file.fileno(), int(self.stops[index]) - start, start)

    def __getstate__(self) -> dict[str, Any]:
        if self._shared is None:
            directory = new_local()
            np.save(directory / "starts.npy", self.starts)
            np.save(directory / "stops.npy", self.stops)
            self._shared = directory
        return {"path": self.path, "_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        starts, stops = (np.load(state["_shared"] / f"{name}.npy", mmap_mode="r") for name in ("starts", "stops"))
        self.__init__(state["path"], starts, stops)
        self._shared = state["_shared"]


def local_data(path: epath.PathLike) -> Path:
    """A local file of records in UTF-8: the file itself, or a copy of a remote file or one in UTF-16.

    Raises `UserError` if it does not exist, is a Git LFS pointer, compressed or a table, or breaks its encoding.
    """
    if is_remote(path) and not epath.Path(path).is_file():
        raise UserError(f"{path}: {'is a folder, not a file' if epath.Path(path).is_dir() else 'no such file'}")
    require_regular(path)  # pipes cannot be read at random
    file = cache.local_file(path)
    with file.open("rb") as data:
        head = data.read(len(POINTER))
    refuse_pointer(head, path)
    if kind := next((kind for start, kind in _BINARY.items() if head.startswith(start)), None):
        raise UserError(f"{path}: is {kind}; a JSON array of samples, or one a line, was expected")
    encoding = json.detect_encoding(head[:4])
    if encoding.startswith("utf-8"):
        return file
    return cache.derived("utf8", os.path.abspath(file), lambda target: _write_utf8(file, encoding, target, path))


def _write_utf8(file: Path, encoding: str, target: Path, name: epath.PathLike) -> None:
    try:
        with file.open(encoding=encoding, newline="") as text, cache.replacing(target) as out:
            while block := text.read(BLOCK):
                out.write(block.encode())
    except UnicodeDecodeError as error:
        raise broken(name, encoding, error) from error


def scan(file: Path, name: epath.PathLike, show: str = "") -> Iterator[Record]:
    """The records of a local file in order. Errors call the file `name`, and progress, if it is shown, `show`.

    Lines of JSONL and records that are not ASCII are not parsed, so that a bad line hides no other one.

    Raises:
      UserError: the file is no JSON array where it should be one, a record is too long, there is no record, or an
        object is spread over several lines instead of being a line of JSONL.
    """
    if not show:
        return _scan(file, name)
    size = file.stat().st_size
    return track(_scan(file, name), show, share=lambda record: record.stop / size)


def _scan(file: Path, name: epath.PathLike) -> Iterator[Record]:
    with file.open("rb") as data:
        begin = len(BOM) if data.read(len(BOM)) == BOM else 0
        data.seek(begin)
        while (first := data.read(1)).isspace():
            pass
        if first == b"{":
            _refuse_spread_object(data, begin, name)
        data.seek(begin)
        index = -1
        for index, (line, start, stop, value) in enumerate((_array if first == b"[" else _lines)(data, begin, name)):
            yield Record(f"{name}: {line or f'sample {index}'}", index, start, stop, value)
        if index < 0:
            raise UserError(f"{name}: holds no samples: a JSON array of them, or one a line, was expected")


def load_json(data: bytes, where: str) -> Any:
    """The value of JSON text. Raises `UserError` naming `where`."""
    try:
        return loads(data, strict=False)
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data" and error.doc[error.pos] in "{["
        hint = "; several values follow each other: jq -c . OLD > NEW.jsonl writes each on a line" if several else ""
        raise UserError(f"{where}: is no JSON: {error}{hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is no UTF-8: {error}; convert it: iconv -t utf-8") from error
    except ValueError as error:
        raise UserError(f"{where}: is no JSON: {error}") from error


def _refuse_spread_object(file: BinaryIO, start: int, name: epath.PathLike) -> None:
    """Raises `UserError` if the file begins with an object that is spread over several lines."""
    file.seek(start)
    while not (line := file.readline(MAX_RECORD)).strip():
        pass
    try:
        if len(line) < MAX_RECORD:
            json.JSONDecoder().raw_decode(line.decode("latin-1").lstrip())
            return
    except json.JSONDecodeError as error:
        if error.pos < len(line.strip()):
            return  # the line is damaged, not cut off
    except (RecursionError, ValueError):
        pass
    file.seek(start)
    try:
        key = _list_key(_Window(file, start, name))
    except UserError:
        return  # a damaged line: another error gives its number
    expected = "a JSON array of samples, or one a line, was expected"
    if key in (None, "conversations", "messages"):
        if len(line) == MAX_RECORD:
            return  # a line that is too long: another error gives its number
        raise UserError(
            f"{name}: begins with an object that is spread over several lines: {expected}: jq -c . OLD > NEW.jsonl "
            "writes each on a line"
        )
    raise UserError(
        f"{name}: is one object whose {key!r} holds a list of objects: {expected}: jq '.[{json.dumps(key)}]' "
        "OLD > NEW.json writes the list alone"
    )


def _list_key(window: "_Window") -> str | None:
    """The first key of an object that holds a list of objects, None without one. Raises `UserError` for no JSON."""
    for _ in window.elements("}"):
        key = window.read_value()[2]
        if window.peek() != ":":
            window.fail("Expecting ':' delimiter", window.at)
        window.at += 1
        window.peek()
        if window.at_list_of_objects():
            return str(json.loads(key) if isinstance(key, bytes) else key)
        window.read_value()
    return None


def _lines(file: BinaryIO, start: int, name: epath.PathLike) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, start, stop and bytes of every line that is not empty."""
    number = 0
    while line := file.readline(MAX_RECORD):
        number += 1
        if len(line) == MAX_RECORD:
            raise _too_long(f"{name}: line {number}")
        if text := line.rstrip():
            yield f"line {number}", start, start + len(text), text
        start += len(line)


def _array(file: BinaryIO, start: int, name: epath.PathLike) -> Iterator[tuple[None, int, int, Any]]:
    """None, start, stop and value of every element."""
    window = _Window(file, start, name)
    for _ in window.elements("]"):
        yield None, *window.read_value()
    if extra := window.peek():
        hint = ", a second array where one of all samples was expected (jq -s add joins them)" if extra == "[" else ""
        window.fail(f"Extra data{hint}", window.at)


class _Window:
    """The part of a file that is being parsed, as Latin-1: each byte is a character, and JSON's syntax is ASCII."""

    decoder = json.JSONDecoder()

    def __init__(self, file: BinaryIO, start: int, name: epath.PathLike):
        self.file = file
        self.name = name
        self.text = ""
        self.base = start  # position of the text in the file
        self.at = 0  # position of the next value in the text
        self.line = 1  # number of the line in which the text begins
        self.line_start = start  # position of that line in the file

    def peek(self) -> str:
        """Moves to the next character that is no space and returns it; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def elements(self, closing: str) -> Iterator[None]:
        """Moves to each element of the next array or object, which the caller reads, and then past the end of it."""
        self.peek()
        self.at += 1
        separator = "," if self.peek() != closing else closing
        if separator == closing:
            self.at += 1
        while separator == ",":
            self.peek()
            yield
            separator = self.peek()
            if separator not in (closing, ","):
                self.fail("Expecting ',' delimiter", self.at)
            self.at += 1

    def read_value(self) -> tuple[int, int, Any]:
        """Start, stop and value of the next value."""
        while True:
            try:
                value, stop = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._certain(error) or not self._grow():
                    self.fail(error.msg, error.pos)
                continue
            except (RecursionError, ValueError):  # or a number of too many digits
                self.fail("nested too deeply for a sample, or a number too long", self.at)
            if len(self.text) - stop <= 2 and self._grow():  # a number may continue, as 1e-5 after 1
                continue
            start, self.at = self.at, stop
            if not (raw := self.text[start:stop]).isascii():
                value = raw.encode("latin-1")
            elif raw.count("[") + raw.count("{") > MAX_DEPTH:  # it may be nested too deeply
                value = load_json(raw.encode(), f"{self.name}: byte {self.base + start}")
            return self.base + start, self.base + stop, value

    def at_list_of_objects(self) -> bool:
        """Whether the next value is a list of objects, by its first two characters."""
        while (found := _LIST.match(self.text, self.at)) and found.end() == len(self.text) and self._grow():
            pass
        return found is not None and self.text.startswith("{", found.end())

    def fail(self, message: str, position: int) -> NoReturn:
        line, line_start = self._line_at(position)
        place = f"line {line} column {self.base + position - line_start + 1} (byte {self.base + position})"
        raise UserError(f"{self.name}: is no JSON: {message}: {place}")

    def _certain(self, error: json.JSONDecodeError) -> bool:
        """Whether more text would not mend an error: it is not about a string or word that is cut off."""
        return len(self.text) - error.pos > 16 and "Unterminated" not in error.msg

    def _grow(self) -> bool:
        """Drops the text that was parsed and reads more, at least as much as is left; False at the end of the file."""
        kept = self.text[self.at :]
        if len(kept) > MAX_RECORD:
            raise _too_long(f"{self.name}: a sample at byte {self.base + self.at}")
        block = self.file.read(max(BLOCK, len(kept)))
        if not block:
            return False
        self.line, self.line_start = self._line_at(self.at)
        self.base += self.at
        self.at = 0
        self.text = kept + block.decode("latin-1")
        return True

    def _line_at(self, position: int) -> tuple[int, int]:
        """The number of the line at a position of the text, and the position of that line in the file."""
        newlines = self.text.count("\n", 0, position)
        line_start = self.base + self.text.rindex("\n", 0, position) + 1 if newlines else self.line_start
        return self.line + newlines, line_start


def _too_long(where: str) -> UserError:
    return UserError(
        f"{where} takes more than {MAX_RECORD >> 20} MiB: a JSON array of samples, or one a line, was expected"
    )
