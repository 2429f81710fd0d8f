"""Reads contexts from COCO's files or from JSONL, as a stream, into the table of the ledger.

  COCO   `captions_*.json` and, for boxes, `instances_*.json`. An id is that of COCO.
  JSONL  a picture a line (or an array of them): {"image": "a.jpg", "captions": ["A cat.", ...],
         "boxes": [{"category": "cat", "bbox": [x, y, width, height]}, ...]}. There may be no `boxes`, and there may be
         `id` (the name of the image is, where there is none), `width` and `height` (the picture's own, else).

Boxes are in pixels. One of a crowd, which is no single object, is left out, and so are those of which `make_box` leaves
nothing. Pictures without a caption, and those that are not in the folder, are left out and counted.
"""

import collections
import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from PIL import ExifTags, Image

from llava_jax.cli import UserError, short, track
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import FORMATS
from llava_jax.data.records import load_json, local_data, scan
from llava_jax.datagen import contexts
from llava_jax.datagen.caption_files import coco_items, is_coco
from llava_jax.datagen.contexts import Box, Context, make_box, make_captions
from llava_jax.files.reading import require_regular
from llava_jax.llm_api.ledger import Ledger
from llava_jax.remote import is_remote

CONTEXTS_OF = "CREATE TABLE IF NOT EXISTS contexts_of (files TEXT NOT NULL, left_out TEXT NOT NULL)"  # both JSON
COCO = """
DROP TABLE IF EXISTS temp.picture;
DROP TABLE IF EXISTS temp.caption;
DROP TABLE IF EXISTS temp.box;
CREATE TEMP TABLE picture (number INTEGER PRIMARY KEY, id INTEGER NOT NULL UNIQUE, name, width, height);
CREATE TEMP TABLE caption (picture INTEGER NOT NULL, text TEXT NOT NULL);
CREATE TEMP TABLE box (picture INTEGER NOT NULL, category, x, y, width, height);
"""
INDEXES = """
CREATE INDEX caption_of ON caption (picture);
CREATE INDEX box_of ON box (picture);
"""
# What records raise that are not as they should be.
FAULTS = (LookupError, TypeError, ValueError, AttributeError, sqlite3.Error)


def load(
    ledger: Ledger, captions: str, instances: str | None, images: epath.PathLike, anywhere: bool = False
) -> dict[str, int]:
    """Fills the table of a ledger, unless it is full of the same. Returns how many pictures were left out why.

    Args:
      anywhere: whether to take pictures that are not in the folder, too.

    Raises:
      UserError: for a file that cannot be read, that holds no contexts, or where requests were made for others.
    """
    files = {name: local_data(name) for name in (captions, instances) if name}
    digests = json.dumps([_digest(file) for file in files.values()])
    with ledger.transaction():
        ledger.db.execute(contexts.SCHEMA)
        ledger.db.execute(CONTEXTS_OF)
        if row := ledger.db.execute("SELECT files, left_out FROM contexts_of").fetchone():
            asked, left_out = ledger.totals().requests, json.loads(row[1])
            if row[0] == digests and (asked or not left_out):
                return left_out  # as long as nothing was asked, what was left out may have come to the folder
            if asked:
                raise UserError(f"{ledger.path} was made from other captions or boxes; choose another directory")
            ledger.db.execute("DELETE FROM contexts_of")
            ledger.db.execute("DELETE FROM contexts")
        if is_coco(files[captions]):
            found = _coco(ledger.db, files, captions, instances)
        elif instances:
            raise UserError(f"{captions}: has its own boxes: do not give {instances}")
        else:
            found = _jsonl(files[captions], captions)
        left_out = _fill(ledger.db, found, captions, images, anywhere)
        ledger.db.execute("INSERT INTO contexts_of VALUES (?, ?)", [digests, json.dumps(left_out)])
    return left_out


def _fill(
    db: sqlite3.Connection, found: Iterable[tuple[str, Any]], file: str, images: epath.PathLike, anywhere: bool
) -> dict[str, int]:
    """Puts contexts into the table. `found` gives where each comes from and its record, as JSONL has it."""
    left_out: collections.Counter[str] = collections.Counter()
    number = 0
    for where, record in track(found, f"reading contexts of {file}"):
        try:
            name, texts = record["image"], record["captions"]
            captions = make_captions([texts] if isinstance(texts, str) else texts)
            if not captions:
                left_out["no caption"] += 1
                continue
            if not (anywhere or _is_there(images, name)):
                left_out[f"not in {images}"] += 1
                continue
            id = record.get("id")
            context = Context(str(name if id is None else id), name, captions, tuple(_boxes(record, images)))
            contexts.insert(db, number, context)
            number += 1
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except sqlite3.IntegrityError as error:
            raise UserError(
                f"{where}: there is another picture of id {short(context.id)}: give each its own"
            ) from error
        except FAULTS as error:
            raise UserError(f"{where}: no picture with captions and boxes: {type(error).__name__} {error}") from error
    if not number:
        reasons = "; ".join(f"{count} pictures: {reason}" for reason, count in left_out.items())
        raise UserError(f"{file}: no picture to make anything of ({reasons or 'it holds none'})")
    return dict(left_out)


def _boxes(record: Any, images: epath.PathLike) -> Iterator[Box]:
    boxes = [box for box in record.get("boxes") or () if not box.get("iscrowd")]
    if not boxes:
        return
    width, height = record.get("width"), record.get("height")
    if not (width and height):
        width, height = picture_size(image_path(images, record["image"]))
    for box in boxes:
        if made := make_box(str(box["category"]), tuple(map(float, box["bbox"])), float(width), float(height)):
            yield made


def picture_size(path: epath.Path) -> tuple[int, int]:
    """Width and height of a picture as it is shown."""
    require_regular(path)
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if turned else image.size
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt data
        raise UserError(f"picture {path}: is needed for its size: {error}") from error


def _is_there(images: epath.PathLike, name: str) -> bool:
    """Whether an image is in its folder; on object stores, where asking takes long, it is taken to be. Raises
    `UserError` for what is there, but is no file."""
    path = image_path(images, name)
    if not is_remote(path) and not path.exists():
        return False
    require_regular(path)
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- JSONL


def _jsonl(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    for record in scan(file, name):
        value = load_json(record.value, record.where) if isinstance(record.value, bytes) else record.value
        yield record.where, value


# -------------------------------------------------------------------------------------------------------------- COCO


def _coco(
    db: sqlite3.Connection, files: dict[str, Path], captions: str, instances: str | None
) -> Iterator[tuple[str, Any]]:
    for statement in COCO.split(";"):
        db.execute(statement)
    for number, (where, picture) in enumerate(_items(files[captions], captions, "images")):
        with _named(where):
            row = [number, picture["id"], picture["file_name"], picture.get("width"), picture.get("height")]
            db.execute("INSERT INTO picture VALUES (?, ?, ?, ?, ?)", row)
    for where, annotation in _items(files[captions], captions, "annotations"):
        with _named(where):
            db.execute("INSERT INTO caption VALUES (?, ?)", [annotation["image_id"], annotation["caption"]])
    if instances:
        _coco_boxes(db, files[instances], instances)
    for statement in INDEXES.split(";"):
        db.execute(statement)
    for id, image, width, height in db.execute("SELECT id, name, width, height FROM picture ORDER BY number"):
        texts = db.execute("SELECT text FROM caption WHERE picture = ? ORDER BY rowid", [id])
        boxes = db.execute("SELECT category, x, y, width, height FROM box WHERE picture = ? ORDER BY rowid", [id])
        record = {"id": id, "image": image, "width": width, "height": height}
        record["captions"] = [text for (text,) in texts]
        record["boxes"] = [{"category": category, "bbox": bbox} for category, *bbox in boxes]
        yield f"{captions}: image {id}", record


def _coco_boxes(db: sqlite3.Connection, file: Path, name: str) -> None:
    categories = {}
    for where, category in _items(file, name, "categories"):
        with _named(where):
            categories[category["id"]] = category["name"]
    for where, annotation in _items(file, name, "annotations"):
        with _named(where):
            if not annotation.get("iscrowd"):
                x, y, width, height = annotation["bbox"]
                row = [annotation["image_id"], categories[annotation["category_id"]], x, y, width, height]
                db.execute("INSERT INTO box VALUES (?, ?, ?, ?, ?, ?)", row)


def _items(file: Path, name: str, key: str) -> Iterator[tuple[str, Any]]:
    """The members of one of the lists of a COCO file, and where they stand. Raises `UserError` if there are none."""
    number = -1
    for number, item in enumerate(track(coco_items(file, name, key), f"reading {key} of {name}")):
        yield f"{name}: {key}[{number}]", item
    if number < 0:
        raise UserError(f"{name}: holds no `{key}`: COCO's captions and instances were expected")


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Turns what goes wrong with a record into one line that says where."""
    try:
        yield
    except FAULTS as error:
        raise UserError(f"{where}: is not as COCO has it: {type(error).__name__} {error}") from error
