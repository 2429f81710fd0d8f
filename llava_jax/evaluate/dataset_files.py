"""The files of benchmarks as people download them: VLMEvalKit's TSV with images in base64, the Hub's Parquet with
images inside, and the benchmarks' own JSON. Each row becomes an `Item`.
"""

import ast
import base64
import binascii
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError, short
from llava_jax.evaluate.answers import is_lines, read_json
from llava_jax.evaluate.lines import Line, read_lines
from llava_jax.evaluate.parquet import StoredImage, parquet_rows, row_count
from llava_jax.evaluate.sheets import is_sheet, read_sheet

IMAGES = ("image", *(f"image_{number}" for number in range(1, 8)), "decoded_image", "images")  # columns with content
FILES = (
    "image",
    "image_path",
    "image_local_name",
    "imgname",
    "filename",
    "img_path",
)  # columns with the name of a file
IDS = ("question_id", "questionId", "id", "pid", "index")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.parquet)")
LETTERS = string.ascii_uppercase
SUFFIXES = (".parquet", ".tsv", ".json")  # of the files that are read in a folder
NAME = re.compile(r"[^\n]+\.(?:jpe?g|png|gif|webp|bmp)", re.IGNORECASE)  # of an image; other texts are base64
MAX_NAME = 255  # characters

Image = str | bytes | StoredImage  # the name of a file, or the content of one


class Item(NamedTuple):
    """A question with its right answers."""

    id: str
    question: str
    options: tuple[str, ...] = ()  # texts
    answers: tuple[str, ...] = ()  # all of them right; the letter if there are options
    categories: tuple[str, ...] = ()
    cluster: str = ""  # what questions about the same image share
    kind: str = ""  # what a benchmark tells apart: its configuration, split or type of answer
    number: int = 0  # the row in its file
    where: str = ""
    more: dict[str, Any] = {}  # other columns
    reply: str | None = None  # of a judge about the answer

    @property
    def right(self) -> str:
        letter = self.answers[0] if self.answers else ""
        place = LETTERS.find(letter) if letter else -1
        return f"{letter}. {self.options[place]}" if self.options and 0 <= place < len(self.options) else letter

    @property
    def by_letter(self) -> dict[str, str]:
        return dict(zip(LETTERS, self.options, strict=False))


def item(line: Line, number: int, **fields: Any) -> Item:
    """The item in a row: its id (else the row's number), its question, options and answers, with other `fields`."""
    row = line.value
    known: dict[str, Any] = {"id": str(first(row, *IDS) or number), "options": tuple(options(row))}
    if "question" not in fields:
        known["question"] = text(line, "question", "query", "Question")
    if "answers" not in fields:
        known["answers"] = tuple(listing(first(row, "answers", "answer", "label")))
    if "categories" not in fields:
        known["categories"] = tuple(filter(None, [str(row.get("category") or "")]))
    more = {name: value for name, value in row.items() if name not in IMAGES or _is_name(value)}
    fields = {"number": number, "where": line.where} | known | fields
    return Item(**fields | {"more": more | fields.get("more", {})})


def _is_name(value: Any) -> bool:
    """Whether a value is the name of an image's file."""
    return isinstance(value, str) and len(value) <= MAX_NAME and NAME.fullmatch(value) is not None


def rows(path: str, images: bool = True) -> Iterator[Line]:
    """The rows of a file or of all files of a folder. Without `images`, columns of images are left out of Parquet."""
    if epath.Path(path).is_dir():
        files = sorted(file for file in epath.Path(path).iterdir() if file.suffix in SUFFIXES)
        if not files:
            below = next((file for file in sorted(epath.Path(path).glob("*/*")) if file.suffix in SUFFIXES), None)
            advice = f"; those in folders below it have to be named, such as {below}" if below else ""
            raise UserError(f"{path}: has no file that is read ({', '.join(SUFFIXES)}){advice}")
        for file in files:
            yield from rows(str(file), images)
    elif is_sheet(path):
        yield from (Line(line.where, _known(line.value)) for line in read_sheet(path))
    elif str(path).endswith(".parquet"):
        yield from parquet_rows(path, () if images else IMAGES)
    elif is_lines(path):
        yield from read_lines(path)
    else:
        yield from _json(path)


def numbered(path: str, images: bool = True) -> Iterator[tuple[int, Line]]:
    """The rows with their numbers, which identify them in data sets without ids. Those of a shard come after all rows
    of the shards before. Raises `UserError` if one of these is not there."""
    first = 0
    if found := SHARD.fullmatch(str(path)):
        for shard in range(int(found[2])):
            file = f"{found[1]}-{shard:05d}-of-{found[3]}{found[4]}"
            if not epath.Path(file).exists():
                raise UserError(f"{path}: {file} is needed, too, since rows are identified by their number")
            first += row_count(file)
    yield from enumerate(rows(path, images), first)


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table without the cells that are empty, which pandas writes as `nan`."""
    return {name: value for name, value in row.items() if value not in (None, "", "nan")}


def _json(path: str) -> Iterator[Line]:
    """The objects of an array, of the array in `data`, or of an object by id."""
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict):
        pairs = [(f"question {ident}", {"id": ident} | row if isinstance(row, dict) else row)
                 for ident, row in value.items()]  # fmt: skip
    elif isinstance(value, list):
        pairs = [(f"element {number}", row) for number, row in enumerate(value)]
    else:
        raise UserError(f"{path}: holds neither an array of objects nor an object of them")
    for name, row in pairs:
        if not isinstance(row, dict):
            raise UserError(f"{path}: {name}: is no object but {short(json.dumps(row))}")
        yield Line(f"{path}: {name}", {column: cell for column, cell in row.items() if cell == cell})  # without NaN


# ----------------------------------------------------------------------------------------------------- cells of a row


def first(row: Mapping[str, Any], *names: str) -> Any:
    """The first of these columns that the row has; None if it has none."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def text(line: Line, *names: str) -> str:
    """The text in the first of these columns. Raises `UserError` if there is none."""
    value = first(line.value, *names)
    if value is None:
        raise UserError(f"{line.where}: has no {' or '.join(names)}: is it a file of another benchmark?")
    return str(value)


def listing(value: Any) -> list[str]:
    """A list, the list that a text is in Python's or JSON's notation, or a list of the text itself."""
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
    return [str(one) for one in value] if isinstance(value, list | tuple) else [] if value is None else [str(value)]


def options(row: Mapping[str, Any]) -> list[str]:
    """The options in `options` or `choices`, or in columns by letter."""
    found = first(row, "options", "choices")
    if found is not None:
        return listing(found)
    letters = [letter for letter in LETTERS if row.get(letter) is not None]
    if gap := next((letter for letter, own in zip(LETTERS, letters, strict=False) if letter != own), None):
        raise UserError(f"question {first(row, *IDS)}: has the option {letters[-1]} and none for {gap}: fill that in")
    return [str(row[letter]) for letter in letters]


def images(row: Mapping[str, Any], where: str, by_index: Mapping[str, str]) -> tuple[Image, ...]:
    """The images of a row: the content of files, or their names. `by_index` has the images of a table's rows."""
    found = [_content(row[name], where, by_index) for name in IMAGES if row.get(name) is not None]
    contents = [one for several in found for one in several if not isinstance(one, str)]
    if contents:
        return tuple(contents)
    names = [str(row[name]) for name in FILES if isinstance(row.get(name), str)]
    return tuple(names[:1])


def _content(value: Any, where: str, by_index: Mapping[str, str]) -> list[Image]:
    if isinstance(value, dict):  # of the Hub
        return [value.get("bytes") or str(value.get("path") or "")]
    if isinstance(value, StoredImage):
        return [value]
    if not isinstance(value, str | list):
        raise UserError(f"{where}: its image is of an unknown kind ({type(value).__name__})")
    several = value if isinstance(value, list) else listing(value)
    return [one for part in several for one in
            (_content(part, where, by_index) if isinstance(part, dict | StoredImage)
             else [_decoded(by_index.get(part, part), where)])]  # fmt: skip


def _decoded(value: str, where: str) -> bytes | str:
    """The bytes that a text in base64 has, or the text if it is the name of a file."""
    if _is_name(value):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: its image is neither base64 nor the name of an image: {short(value)!r}") from error


def fingerprint(images: Sequence[Image]) -> str:
    """A name of images, by which questions about the same ones are found."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.digest if isinstance(image, StoredImage) else image if isinstance(image, bytes) else
                      image.encode())  # fmt: skip
    return digest.hexdigest()[:16] if images else ""
