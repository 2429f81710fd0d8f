"""A small data set and what `data.build` makes of it: fixtures and helpers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llava_jax.data import build

FORMATS = {"a.jpg": "JPEG", "folder/b.png": "PNG", "c.jpg": "GIF", "d.webp": "WEBP"}  # c, as OCR-VQA names them


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight samples in which each picture is used twice, once together with another, and two without."""
    root = tmp_path_factory.mktemp("data")
    images = root / "images"
    for i, (name, kind) in enumerate(FORMATS.items()):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 20), (200, 60 * i, 30)).save(images / name, kind)
    names = list(FORMATS)
    pictures = [names[:1], [], names[1:3], names[2:3], [], names[3:], names[:2], names[3:]]
    records = []
    for i, used in enumerate(pictures):
        turns = [("human", "<image>\n" * len(used) + f"What is {i}? \u00e4\u2028"), ("gpt", f"It is {i}.")]
        record = {"conversations": [{"from": role, "value": text} for role, text in turns], "source": "lost"}
        records.append(record | ({"image": used} if used else {}) | ({"id": f"s{i}"} if i else {}))
    (root / "data.json").write_text(json.dumps(records))
    return root / "data.json", images


def run(data: tuple[Path, Path], output: Path, *options: object) -> Path:
    json_file, images = data
    build.main(["--json", str(json_file), "--images", str(images), "--output", str(output), *map(str, options)])
    return output


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def built(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(data, tmp_path_factory.mktemp("built") / "set", "--shards", 4)
