"""Reads contexts from COCO's files or from JSONL, as a stream, into the table of the ledger.

  COCO   `captions_*.json` and, for boxes, `instances_*.json`. Ids are COCO's.
  JSONL  one image a line (or an array of them): {"image": "a.jpg", "captions": ["A cat.", ...],
         "boxes": [{"category": "cat", "bbox": [x, y, width, height]}, ...]}. `boxes` is optional, and so are `id`
         (default: the name of the image), `width` and `height` (default: those of the image file).

Boxes are in pixels. Boxes of crowds, which are not single objects, are left out, and so are those without an area after
`make_box`. Images without a caption, and those that are not in the folder, are left out and counted.
"""

import collections
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.cli import UserError, short
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import read_size
from llava_jax.data.records import local_data, scan
from llava_jax.data.samples import record_value
from llava_jax.datagen import contexts
from llava_jax.datagen.caption_files import coco_items, is_coco
from llava_jax.datagen.contexts import Box, Context, make_box
from llava_jax.files.reading import require_regular
from llava_jax.llm_api.ledger import Ledger
from llava_jax.remote import is_remote

COCO = Path(__file__).with_name("coco.sql").read_text(encoding="utf-8")
INDEXES = """
CREATE INDEX caption_of ON caption (image);
CREATE INDEX box_of ON box (image);
"""
# Raised by records in another form.
FAULTS = (LookupError, TypeError, ValueError, AttributeError, sqlite3.Error)


def load(
    ledger: Ledger, captions: str, instances: str | None, images: epath.PathLike, anywhere: bool = False
) -> dict[str, int]:
    """Fills the table of a ledger, unless it holds the same. Returns how many images were left out for each reason.

    Args:
      anywhere: whether to keep images that are not in the folder.

    Raises:
      UserError: a file cannot be read or holds no contexts, or requests were sent for the contexts of other files.
    """
    files = {name: local_data(name) for name in (captions, instances) if name}
    digests = json.dumps([_digest(file) for file in files.values()])
    with ledger.transaction():
        for statement in contexts.SCHEMA.split(";"):
            ledger.db.execute(statement)
        if row := ledger.db.execute("SELECT files, left_out FROM contexts_of").fetchone():
            asked, left_out = ledger.in_use(), json.loads(row[1])
            if row[0] == digests and (asked or not left_out):
                return left_out  # until a request is answered, images may be added to the folder
            if asked:
                raise UserError(f"{ledger.path} was made from other captions or boxes; choose another directory")
            ledger.db.execute("DELETE FROM contexts_of")
            ledger.db.execute("DELETE FROM contexts")
        if is_coco(files[captions]):
            found = _coco(ledger.db, files, captions, instances)
        elif instances:
            raise UserError(f"{captions}: has its own boxes: do not give {instances}")
        else:
            records = scan(files[captions], captions, show=f"reading contexts of {captions}")
            found = ((record.where, record_value(record)) for record in records)
        left_out = _fill(ledger.db, found, captions, images, anywhere)
        ledger.db.execute("INSERT INTO contexts_of VALUES (?, ?)", [digests, json.dumps(left_out)])
    return left_out


def _fill(
    db: sqlite3.Connection, found: Iterable[tuple[str, Any]], file: str, images: epath.PathLike, anywhere: bool
) -> dict[str, int]:
    """Inserts contexts into the table. `found` yields the origin of each, for errors, and its record as in JSONL."""
    left_out: collections.Counter[str] = collections.Counter()
    number = 0
    for where, record in found:
        try:
            name, texts = record["image"], record["captions"]
            lines = (" ".join(text.split()) for text in ([texts] if isinstance(texts, str) else texts))
            captions = tuple(line.encode(errors="replace").decode() for line in lines if line)
            if not captions:
                left_out["no caption"] += 1
                continue
            if not (anywhere or _in_folder(images, name)):
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
                f"{where}: there is another image with id {short(context.id)}: give each its own"
            ) from error
        except FAULTS as error:
            raise UserError(f"{where}: not an image with captions and boxes: {type(error).__name__} {error}") from error
    if not number:
        reasons = "; ".join(f"{count} images: {reason}" for reason, count in left_out.items())
        raise UserError(f"{file}: no image with a caption ({reasons or 'it holds none'})")
    return dict(left_out)


def _boxes(record: Any, images: epath.PathLike) -> Iterator[Box]:
    boxes = [box for box in record.get("boxes") or () if not box.get("iscrowd")]
    if not boxes:
        return
    width, height = record.get("width"), record.get("height")
    if not (width and height):
        path = image_path(images, record["image"])
        require_regular(path)
        width, height = read_size(path)
    for box in boxes:
        if made := make_box(str(box["category"]), tuple(map(float, box["bbox"])), float(width), float(height)):
            yield made


def _in_folder(images: epath.PathLike, name: str) -> bool:
    """Whether an image is in its folder. On object stores, where the check is slow, it is assumed to be.

    Raises `UserError` for something that is not a file.
    """
    path = image_path(images, name)
    if not is_remote(path) and not path.exists():
        return False
    require_regular(path)
    return True


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------------------- COCO


def _coco(
    db: sqlite3.Connection, files: dict[str, Path], captions: str, instances: str | None
) -> Iterator[tuple[str, Any]]:
    categories: dict[Any, str] = {}

    def insert(table: str, *values: Any) -> None:
        db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)

    def insert_image(image: dict[str, Any]) -> None:
        insert("image", None, image["id"], image["file_name"], image.get("width"), image.get("height"))

    def insert_box(annotation: dict[str, Any]) -> None:
        if not annotation.get("iscrowd"):
            x, y, width, height = annotation["bbox"]
            insert("box", annotation["image_id"], categories[annotation["category_id"]], x, y, width, height)

    for statement in COCO.split(";"):
        db.execute(statement)
    _each(files[captions], captions, "images", insert_image)
    _each(files[captions], captions, "annotations", lambda one: insert("caption", one["image_id"], one["caption"]))
    if instances:
        _each(files[instances], instances, "categories", lambda one: categories.update({one["id"]: one["name"]}))
        _each(files[instances], instances, "annotations", insert_box)
    for statement in INDEXES.split(";"):
        db.execute(statement)
    for id, image, width, height in db.execute("SELECT id, name, width, height FROM image ORDER BY number"):
        texts = db.execute("SELECT text FROM caption WHERE image = ? ORDER BY rowid", [id])
        boxes = db.execute("SELECT category, x, y, width, height FROM box WHERE image = ? ORDER BY rowid", [id])
        record = {"id": id, "image": image, "width": width, "height": height}
        record["captions"] = [text for (text,) in texts]
        record["boxes"] = [{"category": category, "bbox": bbox} for category, *bbox in boxes]
        yield f"{captions}: image {id}", record


def _each(file: Path, name: str, key: str, read: Callable[[dict[str, Any]], None]) -> None:
    """Reads the members of a list of a COCO file. Raises `UserError` if there are none, or naming one that is not as
    COCO has it."""
    number = -1
    for number, item in enumerate(coco_items(file, name, key, show=True)):
        try:
            read(item)
        except FAULTS as error:
            detail = f"is not as COCO has it: {type(error).__name__} {error}"
            raise UserError(f"{name}: {key}[{number}]: {detail}") from error
    if number < 0:
        raise UserError(f"{name}: holds no `{key}`: COCO's captions and instances were expected")
