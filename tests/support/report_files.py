"""A small data set of real photographs, and its report by the command."""

import json
from pathlib import Path

import skimage.data
from PIL import Image

from llava_jax.datagen.__main__ import main

EVIL = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


def write_files(directory: Path) -> None:
    """A data set of scikit-image's photographs: a cat that is told of right, a coffee of which a dog is told."""
    images = directory / "images"
    images.mkdir()
    for name in ("chelsea", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).save(images / f"{name}.jpg")
    contexts = [
        {"image": "chelsea.jpg", "captions": ["A cat."], "boxes": [{"category": "cat", "bbox": [0, 0, 451, 150]}]},
        {"image": "coffee.jpg", "captions": ["A cup of coffee.", EVIL], "boxes": []},
    ]
    (directory / "contexts.jsonl").write_text("\n".join(map(json.dumps, contexts)))

    def record(ident, image, *texts):
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"id": ident, "image": image, "conversations": turns}

    records = [
        record("good", "chelsea.jpg", "<image>\nWhat is it?", "A cat.", "Is it red?", "Yes."),
        record("bad", "coffee.jpg", f"Why?\n<image>\n{EVIL}", f"A puppy by a cup. {EVIL}"),
        record("lost", "lost.jpg", "Describe it.\n<image>", "A cat and a dog."),
    ]
    (directory / "llava.json").write_text(json.dumps(records))
    rejects = [{"id": "r", "image": "coffee.jpg", "reason": "refusal", "detail": EVIL}, {"id": 1, "reason": EVIL}]
    (directory / "rejects.jsonl").write_text("\n".join(map(json.dumps, rejects)))


def report(made: Path, *more: object) -> str:
    """The page."""
    files = {"--json": "llava.json", "--images": "images", "--rejects": "rejects.jsonl", "--output": "report.html"}
    main(["report", *(str(x) for option, name in files.items() for x in (option, made / name)), *map(str, more)])
    return (made / "report.html").read_text()
