"""Contexts from COCO's files and from JSONL."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import Box, Context, make_box
from llava_jax.datagen.load import load
from llava_jax.llm_api.ledger import Ledger, Request

IMAGES = [
    {"id": 7, "file_name": "b.jpg", "width": 200, "height": 100},
    {"id": 3, "file_name": "a.jpg", "width": 100, "height": 100},
    {"id": 4, "file_name": "missing.jpg", "width": 100, "height": 100},
    {"id": 5, "file_name": "silent.jpg", "width": 100, "height": 100},
]
CAPTIONS = [
    {"image_id": 3, "caption": "A cat\n sits. "},
    {"image_id": 7, "caption": "Two dogs."},
    {"image_id": 3, "caption": "A grey cat."},
    {"image_id": 4, "caption": "Nobody sees this."},
    {"image_id": 5, "caption": "  "},
]
INSTANCES = [
    {"image_id": 7, "category_id": 18, "bbox": [20, 10, 100.25, 50], "segmentation": [[1.5, 2.5]]},
    {"image_id": 7, "category_id": 18, "bbox": [150, 50, 100, 100]},  # out of the frame on two sides
    {"image_id": 7, "category_id": 18, "bbox": [250, 50, 10, 10]},  # out of it altogether
    {"image_id": 7, "category_id": 17, "bbox": [10, 10, 0, 10]},
    {"image_id": 7, "category_id": 17, "bbox": [0, 0, 200, 100], "iscrowd": 1},
]
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}]
DOGS = (Box("dog", 0.1, 0.1, 0.601, 0.6), Box("dog", 0.75, 0.5, 1.0, 1.0))


@pytest.fixture
def ledger(tmp_path: Path):
    ledger = Ledger(tmp_path / "out" / "ledger.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """COCO's two files and a folder of pictures, one of which is missing."""
    write_coco(tmp_path)
    for name in ("a.jpg", "b.jpg", "silent.jpg"):
        Image.new("RGB", (10, 20)).save(tmp_path / name)
    return tmp_path


def write_coco(folder: Path, captions: Any = CAPTIONS, instances: Any = INSTANCES, images: Any = IMAGES) -> None:
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": captions}))
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "annotations": instances, "categories": CATEGORIES})
    )


def load_coco(ledger: Ledger, folder: Path) -> dict[str, int]:
    return load(ledger, f"{folder}/captions.json", f"{folder}/instances.json", str(folder))


def test_coco(ledger: Ledger, folder: Path):
    left_out = load_coco(ledger, folder)
    assert list(contexts.read(ledger.db)) == [
        Context("7", "b.jpg", ("Two dogs.",), DOGS),
        Context("3", "a.jpg", ("A cat sits.", "A grey cat."), ()),
    ]
    assert left_out == {"no caption": 1, f"not in {folder}": 1}
    assert contexts.get(ledger.db, "3").image == "a.jpg" and contexts.get(ledger.db, "4") is None
    assert contexts.count(ledger.db) == 2 and contexts.count(ledger.db, 1) == 1
    assert [context.id for context in contexts.read(ledger.db, 1)] == ["7"]


def test_pictures_that_come_later_are_taken_as_long_as_nothing_was_asked(ledger: Ledger, folder: Path):
    load_coco(ledger, folder)
    Image.new("RGB", (10, 20)).save(folder / "missing.jpg")
    assert load_coco(ledger, folder) == {"no caption": 1} and contexts.count(ledger.db) == 3
    (folder / "missing.jpg").unlink()
    ledger.failed(ledger.begin(Request("3", 0, []), 0.0), "wrong key", 0.0)  # nothing was made of the contexts
    assert load_coco(ledger, folder) == {"no caption": 1, f"not in {folder}": 1} and contexts.count(ledger.db) == 2
    Image.new("RGB", (10, 20)).save(folder / "missing.jpg")
    assert load_coco(ledger, folder) == {"no caption": 1}
    (folder / "missing.jpg").unlink()
    ledger.begin(Request("7", 0, []), 0.0)
    assert load_coco(ledger, folder) == {"no caption": 1} and contexts.count(ledger.db) == 3


def test_text_is_that_of_the_authors():
    context = Context("7", "b.jpg", ("Two dogs.", "Dogs play."), DOGS)
    assert context.text(boxes=False) == "Two dogs.\nDogs play."
    assert context.text(boxes=True) == (
        "Two dogs.\nDogs play.\n\ndog: [0.100, 0.100, 0.601, 0.600]\ndog: [0.750, 0.500, 1.000, 1.000]"
    )


def test_jsonl_with_the_size_of_the_picture(ledger: Ledger, folder: Path):
    boxes = [{"category": "dog", "bbox": [1, 5, 4, 10]}, {"category": "dog", "bbox": [1, 5, 4, 10], "iscrowd": 1}]
    records = [{"image": "a.jpg", "captions": "One.", "boxes": boxes}, {"id": 9, "image": "b.jpg", "captions": ["B."]}]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    load(ledger, f"{folder}/own.jsonl", None, str(folder))
    assert list(contexts.read(ledger.db)) == [
        Context("a.jpg", "a.jpg", ("One.",), (Box("dog", 0.1, 0.25, 0.5, 0.75),)),
        Context("9", "b.jpg", ("B.",), ()),
    ]


def test_tables_are_filled_once_and_for_the_same_files(ledger: Ledger, folder: Path):
    there = {"images": IMAGES[:2], "captions": CAPTIONS[:3]}
    write_coco(folder, **there)
    assert load_coco(ledger, folder) == {}
    ledger.db.execute("UPDATE contexts SET image = 'kept.jpg'")
    load_coco(ledger, folder)
    assert next(contexts.read(ledger.db)).image == "kept.jpg"
    write_coco(folder, **there, instances=INSTANCES[:1])
    load_coco(ledger, folder)
    assert next(contexts.read(ledger.db)).boxes == DOGS[:1]
    ledger.begin(Request("7", 0, []), 0.0)
    write_coco(folder, **there)
    with pytest.raises(UserError, match="other captions or boxes"):
        load_coco(ledger, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": [{"image_id": 3}]}, r"annotations\[0\].*KeyError 'caption'"),
        ({"captions": []}, "holds no `annotations`"),
        ({"images": [*IMAGES, IMAGES[0]]}, r"images\[4\].*UNIQUE"),
        ({"instances": [{"image_id": 7, "category_id": 99, "bbox": [0, 0, 1, 1]}]}, r"annotations\[0\].*99"),
        ({"instances": [{"image_id": 7, "category_id": 18, "bbox": [0, 0, 1]}]}, "not enough values"),
        ({"instances": [{"image_id": 7, "category_id": 18, "bbox": [0, 0, 1, "x"]}]}, "image 7.*ValueError"),
        ({"captions": CAPTIONS[3:]}, "no image with a caption"),
    ],
)
def test_bad_coco_is_one_line_and_leaves_nothing(ledger: Ledger, folder: Path, change: dict[str, Any], message: str):
    write_coco(folder, **change)
    with pytest.raises(UserError, match=message) as raised:
        load_coco(ledger, folder)
    assert str(folder) in str(raised.value)
    write_coco(folder)
    load_coco(ledger, folder)
    assert contexts.count(ledger.db) == 2


def test_bad_jsonl_is_one_line(ledger: Ledger, folder: Path):
    file = folder / "own.jsonl"
    good = json.dumps({"image": "a.jpg", "captions": ["One."]})
    for line, message in (
        ("{", "line 2: is no JSON"),
        ("[]", "line 2: not an image"),
        (good, "line 2: there is another image with id a.jpg"),
        ('{"image": "b.jpg", "captions": [1]}', "line 2: not an image"),
        ('{"image": "b.jpg", "captions": ["B."], "boxes": [7]}', "line 2: not an image"),
    ):
        file.write_text(f"{good}\n{line}\n")
        with pytest.raises(UserError, match=message):
            load(ledger, str(file), None, str(folder))
    with pytest.raises(UserError, match="has its own boxes"):
        load(ledger, str(file), f"{folder}/instances.json", str(folder))
    with pytest.raises(UserError, match="no such file"):
        load(ledger, f"{folder}/none.json", None, str(folder))


numbers = st.floats(-1e4, 1e4) | st.sampled_from([float("nan"), float("inf"), 0.0, 100.0])


@given(st.tuples(numbers, numbers, numbers, numbers))
def test_boxes_lie_in_the_picture_and_have_an_area(bbox: tuple[float, float, float, float]):
    box = make_box("cat", bbox, 640, 480)
    if box:
        assert 0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1
        assert abs(box.x1 - max(bbox[0] / 640, 0)) <= 0.0005 + 1e-9


@pytest.mark.parametrize("name", ["../secret.png", "/dev/zero", "gs://bucket/a.png"])
def test_names_that_leave_the_folder_are_faults(ledger: Ledger, tmp_path: Path, name: str):
    (tmp_path / "images").mkdir()
    tiny.add_irregular(tmp_path / "images")
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"image": name, "captions": ["One."], "boxes": [{"category": "x", "bbox": [0] * 4}]}))
    for anywhere in (False, True):  # where all are taken, one is opened for its size
        with pytest.raises(UserError, match="own.jsonl: line 1: image .*(leaves|absolute)"):
            load(ledger, str(file), None, str(tmp_path / "images"), anywhere)


@pytest.mark.parametrize("name", tiny.IRREGULAR)
def test_what_is_no_file_is_not_opened(ledger: Ledger, tmp_path: Path, name: str):
    (tmp_path / "images").mkdir()
    tiny.add_irregular(tmp_path / "images")
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"image": name, "captions": ["One."], "boxes": [{"category": "x", "bbox": [0] * 4}]}))
    for anywhere in (False, True):
        with pytest.raises(UserError, match=f"line 1: .*{name}: is a"):
            load(ledger, str(file), None, str(tmp_path / "images"), anywhere)
