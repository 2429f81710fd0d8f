"""Files of JSON objects, one a line, that others wrote: every fault is named with its line."""

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError


class Line(NamedTuple):
    """An object of a file of lines."""

    where: str  # file and line, for errors
    value: dict[str, Any]

    def get(self, *names: str) -> Any:
        """The value of the first of these fields that is there. Raises `UserError` where none is."""
        for name in names:
            if name in self.value:
                return self.value[name]
        raise UserError(f"{self.where}: has no {' or '.join(names)}")


def read_lines(path: epath.PathLike, partial: bool = False) -> list[Line]:
    """All lines that aren't empty. With `partial`, a last line that was cut off is left out with a warning."""
    data = epath.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8")
    return list(_lines(path, data.split(b"\n"), partial))


def _lines(path: epath.PathLike, lines: list[bytes], partial: bool) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: is not UTF-8 (byte {error.start}: {line[error.start]:#x}); convert it"
            ) from error
        except (json.JSONDecodeError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{where}: is no JSON: {error}") from error
            if not partial:
                raise UserError(f"{where}: the last one, is cut off: resume what wrote it, or use --partial") from error
            print(f"warning: {where}, the last one, is cut off and left out", file=sys.stderr)
            return
        if not isinstance(value, dict):
            raise UserError(f"{where}: is no JSON object")
        yield Line(where, value)
