"""JSONL files of any origin. Errors name the file and the line."""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from etils import epath

from llava_jax.cli import UserError, short, warn
from llava_jax.files.reading import loads, require_regular, to_utf8
from llava_jax.files.writing import atomic_file

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

ID = re.compile(rb'"(?:question_id|questionId|id|image)": *("[^"\\]*"|-?[0-9]+)')
MAX_BYTES = 4 * 2**30  # of a file, since it is read into memory


class Line(NamedTuple):
    """A JSON object of a file."""

    where: str  # file and line, for errors
    value: dict[str, Any]

    def get(self, *names: str) -> Any:
        """The value of the first of these fields that exists. Raises `UserError` if none does."""
        for name in names:
            if name in self.value:
                return self.value[name]
        raise UserError(f"{self.where}: has no {' or '.join(names)}")

    def text(self, *names: str) -> str:
        """The same as a text. Raises `UserError` if it is null."""
        value = self.get(*names)
        if value is None:
            raise UserError(f"{self.where}: {' or '.join(names)} is null")
        return str(value)


def read_lines(path: epath.PathLike, partial: bool = False) -> list[Line]:
    """All lines that are not empty. `partial` skips a last line that is cut off, with a warning."""
    return list(_lines(path, read_bytes(path).split(b"\n"), partial))


def write_lines(path: epath.PathLike, values: Iterable[dict[str, Any]]) -> None:
    """Writes objects to a file atomically."""
    with atomic_file(path) as file:
        file.writelines(json.dumps(value).encode() + b"\n" for value in values)


def once(
    items: Iterable[tuple[Key, Value, str]],
    differs: str,
    what: str = "question",
    name: Callable[[Key], Any] = lambda key: key,
) -> dict[Key, tuple[Value, str]]:
    """A dict of key to (value, where) from (key, value, where). An equal value of a key counts once, with a warning,
    since published files repeat some lines.

    Args:
      differs: the error's message for a different value of a key, with `{key}` and `{first}`, the place of the first.
      what: what a key identifies, for messages.
      name: key -> its name in messages.

    Raises:
      UserError: if two values of a key differ.
    """
    found: dict[Key, tuple[Value, str]] = {}
    repeats = []
    for key, value, where in items:
        if key not in found:
            found[key] = value, where
        elif found[key][0] == value:
            repeats.append((where, key))
        else:
            first = found[key][1].removeprefix(where.rpartition(": ")[0] + ": ")  # the message begins with the file
            raise UserError(f"{where}: {differs.format(key=name(key), first=first)}")
    if repeats:
        (where, key), more = repeats[0], f" (and {len(repeats) - 1} more)" if len(repeats) > 1 else ""
        warn(f"{where}: repeats {what} {short(str(name(key)))}{more} word for word; it counts once")
    return found


def read_text(path: epath.PathLike) -> str:
    """The text of a file. Raises `UserError` with the line that is not UTF-8."""
    data = read_bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}: is not UTF-8 (byte {data[error.start]:#x}); convert it: iconv -t utf-8"
        ) from error


def read_bytes(path: epath.PathLike) -> bytes:
    """The bytes of a text file, in UTF-8 without a byte order mark. Raises `UserError` for a pipe, since some files are
    read twice."""
    require_regular(path)
    if (size := epath.Path(path).stat().length) > MAX_BYTES:
        raise UserError(f"{path}: has {size:,} bytes, more than {MAX_BYTES >> 30} GiB")
    return to_utf8(epath.Path(path).read_bytes(), path)


def _lines(path: epath.PathLike, lines: list[bytes], partial: bool) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = loads(line, strict=False)
        except ValueError as error:
            # A line that ends within a character is cut off. Other bytes that are not UTF-8 have another reason.
            cut = not isinstance(error, UnicodeDecodeError) or error.reason == "unexpected end of data"
            if number < len(lines) or not cut:
                raise UserError(f"{where}: {_fault(error)}{_question(line)}") from error
            if not partial:
                raise UserError(
                    f"{where}: the last one, is cut off{_question(line)}: resume what wrote it, or use --partial"
                ) from error
            warn(f"{where}, the last one, is cut off{_question(line)} and left out")
            return
        if not isinstance(value, dict):
            raise UserError(f"{where}: is no JSON object")
        yield Line(where, value)


def _question(line: bytes) -> str:
    """The question id in a damaged line, if it has one."""
    found = ID.search(line)
    return f" (question {found[1].decode('latin-1').strip(chr(34))})" if found else ""


def _fault(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 (byte {error.start}: {error.object[error.start]:#x}); convert it"
    return f"is no JSON: {error}"
