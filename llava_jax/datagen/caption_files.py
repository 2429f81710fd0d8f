"""Files of captions of any size, read as a stream: image and caption pairs, COCO's, or LLaVA samples of stage 1."""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ijson
from etils import epath

from llava_jax.cli import UserError, one_line, say, track
from llava_jax.data.records import Record, local_data, scan
from llava_jax.data.samples import ROLES, Fault, image_names, is_encodable, record_value
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.data.unsupported import foreign_mark

CAPTION_KEYS = ("caption", "blip_caption")
SPECIAL_TOKENS = (IMAGE_TOKEN, "<s>", "</s>")  # which training would not take for text

_COCO = re.compile(rb'\s*\{\s*"(info|licenses|images|annotations|categories)"\s*:\s*(\{|\[\s*\{)')


class Caption(NamedTuple):
    """An image's caption and the JSON of its record, both on one line."""

    id: str
    image: str
    text: str
    record: bytes


def read_captions(
    path: epath.PathLike,
    keys: tuple[str, ...] = CAPTION_KEYS,
    skip_bad: bool = False,
    quiet: bool = False,
    show: str = "",
) -> Iterator[Caption]:
    """The captions of a file, in their order.

    A record is `{"image": ..., "caption": ...}` (or another of `keys`), or a LLaVA sample of one question, whose answer
    is the caption. A `captions_*.json` of COCO may be given instead; the names of its images are held in memory.

    Args:
      skip_bad: whether to leave out the records without a caption.
      quiet: whether not to print a line `bad-caption, file: line, what is wrong` for each of these.
      show: what the progress is called; by default none is shown.

    Raises:
      UserError: for a file that is damaged; at the end, if there were bad records, unless `skip_bad`.
    """
    file = local_data(path)
    bad = 0
    for record in _coco_records(file, path, bool(show)) if is_coco(file) else scan(file, path, show):
        try:
            caption = _parse(record, keys)
        except UserError as error:
            bad += 1
            if not quiet:
                say(one_line(f"bad-caption, {error}"))
            continue
        yield caption
    if bad and not skip_bad:
        raise UserError(f"{path}: {bad} records hold no caption (listed above); mend them, or give --skip-bad")


def _parse(record: Record, keys: tuple[str, ...]) -> Caption:
    value = record_value(record)
    if not isinstance(value, dict):
        raise UserError(f"{record.where}: is no object")
    image, ident = value.get("image"), value.get("id")
    if not isinstance(image, str) or not image:
        raise UserError(f"{record.where}: `image` is not the name of an image")
    if isinstance(names := image_names({"image": image}), Fault):
        raise UserError(f"{record.where}: {names.detail}")
    if not isinstance(ident, str | int | None):
        raise UserError(f"{record.where}: `id` is neither text nor a number")
    if not is_encodable(f"{image}{ident}"):
        raise UserError(f"{record.where}: `image` or `id` is no valid Unicode: it holds half a surrogate pair")
    if ident is None:
        ident = f"{PurePosixPath(image).stem}_{record.index}"
    text = _caption(value, keys, record.where)
    one_line_of_json = isinstance(record.value, bytes) and b"\n" not in record.value
    raw = record.value if one_line_of_json else json.dumps(value).encode()
    return Caption(str(ident), image, text, raw)


def _caption(value: dict[str, Any], keys: tuple[str, ...], where: str) -> str:
    key = next((key for key in keys if key in value), None)
    if key is not None:
        text = value[key]
    else:
        turns = value.get("conversations")
        if not isinstance(turns, list):
            raise UserError(f"{where}: has neither {' nor '.join(f'`{key}`' for key in (*keys, 'conversations'))}")
        answers = [turn.get("value") for turn in turns
                   if isinstance(turn, dict) and ROLES.get(turn.get("from")) == "assistant"]  # fmt: skip
        if len(answers) != 1:
            raise UserError(f"{where}: has {len(answers)} answers; a caption is the only one")
        text = answers[0]
    return _clean(text, where)


def _clean(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: its caption is no text")
    if not is_encodable(text):
        raise UserError(f"{where}: its caption is no valid Unicode: it holds half a surrogate pair")
    if not text.strip():
        raise UserError(f"{where}: its caption is empty")
    for token in SPECIAL_TOKENS:
        if token in text:
            raise UserError(f"{where}: its caption holds {token}, which training would not take for text")
    if mark := foreign_mark(text, question=False):
        raise UserError(f"{where}: its caption holds {mark}, which training would not take for text")
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------------------- COCO


def is_coco(file: Path) -> bool:
    """Whether a file begins as COCO's do: with an object, the first value of which holds objects."""
    with file.open("rb") as data:
        return bool(_COCO.match(data.read(4096)))


def _coco_records(file: Path, name: epath.PathLike, show: bool) -> Iterator[Record]:
    names = {image.get("id"): image.get("file_name") for image in coco_items(file, name, "images", show)}
    index = -1
    for index, annotation in enumerate(coco_items(file, name, "annotations", show)):
        ident = annotation.get("id", index)
        value = {"id": ident, "image": names.get(annotation.get("image_id")), "caption": annotation.get("caption")}
        yield Record(f"{name}: annotation {ident}", index, 0, 0, value)
    if index < 0:
        raise UserError(f"{name}: holds no `annotations`")


def coco_items(file: Path, name: epath.PathLike, key: str, show: bool = False) -> Iterator[dict[str, Any]]:
    """The members of a list of a COCO file, which errors and progress, if it is shown, call `name`."""
    with file.open("rb") as data:
        try:
            items, size = ijson.items(data, f"{key}.item", use_float=True), file.stat().st_size
            if show:
                items = track(items, f"reading {key} of {name}", share=lambda item: data.tell() / size)
            for item in items:
                if not isinstance(item, dict):
                    raise UserError(f"{name}: `{key}` holds what is no object: {str(item)[:40]}")
                yield item
        except ijson.JSONError as error:
            raise UserError(f"{name}: is no JSON: {error}") from error
