"""Contexts: the captions of an image and the boxes of its objects, from which a language model writes samples.

They are in a table of the ledger, which `load` fills, since there may be more than fit in memory.
"""

import json
import math
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = Path(__file__).with_name("contexts.sql").read_text(encoding="utf-8")
PENDING = "id NOT IN (SELECT task FROM results)"  # the SQL condition of contexts without a verdict
CHUNK = 256  # contexts read at a time


class Box(NamedTuple):
    """The category of an object, and its box in fractions of the image's width and height."""

    category: str
    x1: float
    y1: float
    x2: float
    y2: float

    def __str__(self) -> str:
        return f"{self.category}: [{self.x1:.3f}, {self.y1:.3f}, {self.x2:.3f}, {self.y2:.3f}]"


class Context(NamedTuple):
    id: str
    image: str  # its name in the image folder
    captions: tuple[str, ...]
    boxes: tuple[Box, ...]

    def text(self, boxes: bool) -> str:
        """The text for the model: captions, one a line, then an empty line and the boxes, one a line."""
        lines = [*self.captions, "", *map(str, self.boxes)] if boxes and self.boxes else self.captions
        return "\n".join(lines)


def make_box(category: str, bbox: tuple[float, float, float, float], width: float, height: float) -> Box | None:
    """The box of COCO's [x, y, width, height] in an image of that size, all in pixels.

    It is clipped to the image and rounded to three decimals. None if it has no area then.
    """
    x, y, box_width, box_height = bbox
    if not all(map(math.isfinite, bbox)):
        return None
    x1, x2 = (_fraction(edge, width) for edge in (x, x + box_width))
    y1, y2 = (_fraction(edge, height) for edge in (y, y + box_height))
    return Box(category, x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def insert(db: sqlite3.Connection, number: int, context: Context) -> None:
    """Raises `sqlite3.IntegrityError` if there is a context with the same id."""
    db.execute(
        "INSERT INTO contexts VALUES (?, ?, ?, ?, ?)",
        [number, context.id, context.image, json.dumps(context.captions), json.dumps(context.boxes)],
    )


def count(db: sqlite3.Connection, limit: int | None = None, where: str = "TRUE") -> int:
    """The number of those of the first `limit` contexts for which the SQL condition holds."""
    query = f"SELECT COUNT(*) FROM contexts WHERE number < ? AND ({where})"
    return db.execute(query, [sys.maxsize if limit is None else limit]).fetchone()[0]


def get(db: sqlite3.Connection, id: str) -> Context | None:
    row = db.execute("SELECT id, image, captions, boxes FROM contexts WHERE id = ?", [id]).fetchone()
    return _context(row) if row else None


def read(db: sqlite3.Connection, limit: int | None = None, where: str = "TRUE") -> Iterator[Context]:
    """Those of the first `limit` contexts, in their order, for which the SQL condition holds when they are read.

    The tables may be written in between.
    """
    after, end = -1, sys.maxsize if limit is None else limit
    while rows := db.execute(
        f"SELECT id, image, captions, boxes, number FROM contexts WHERE number > ? AND number < ? AND ({where})"
        " ORDER BY number LIMIT ?",
        [after, end, CHUNK],
    ).fetchall():
        for row in rows:
            yield _context(row)
        after = rows[-1][-1]


def _context(row: Any) -> Context:
    id, image, captions, boxes = row[:4]
    return Context(id, image, tuple(json.loads(captions)), tuple(Box(*box) for box in json.loads(boxes)))


def _fraction(edge: float, size: float) -> float:
    return round(min(max(edge / size, 0.0), 1.0), 3)
