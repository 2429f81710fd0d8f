"""Runs of the commands that ask a language model: pictures of numbered dogs, and what the model says of them."""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from scripted_llm import ScriptedLLM

from llava_jax.datagen.__main__ import main

COUNT = 30
WORDS = "a red dog runs along a wide beach with old friends and their small boat near grey houses at noon"


def write_contexts(folder: Path, count: int = COUNT) -> Path:
    """Pictures of dogs with numbers, and the file of their contexts."""
    lines = []
    for i in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        boxes = [{"category": "dog", "bbox": [1, 2, 3, 4]}]
        lines.append(json.dumps({"id": i, "image": f"{i}.png", "captions": [f"Dog number {i}."], "boxes": boxes}))
    (folder / "contexts.jsonl").write_text("\n".join(lines))
    return folder


def sentence(key: object) -> str:
    return " ".join(random.Random(repr(key)).choices(WORDS.split(), k=40)) + "."


def reply(body: dict[str, Any]) -> str:
    """A reasoning, on the first try in some other form where the number of the dog is one of 0, 7, 14, ..."""
    asked = [message["content"] for message in body["messages"] if message["content"].startswith("Dog number")][-1]
    number = int(asked.split()[2].rstrip("."))
    if number % 7 == 0 and body["messages"][-1]["content"] == asked:
        return "A dog."
    return f"Question:\nWhy does the dog run?\n===\nAnswer:\nBecause {sentence(number)}"


def run(folder: Path, server: ScriptedLLM | None, *more: object, kind: str = "reasoning", output: str = "out") -> int:
    files = ["--captions", folder / "contexts.jsonl", "--images", folder, "--output", folder / output]
    asked = ["--base-url", server.url, "--model", "m"] if server else []
    return main([kind, *map(str, [*files, *asked, *more])])


def samples(folder: Path, output: str = "out") -> list[dict[str, Any]]:
    return json.loads((folder / output / "llava.json").read_text())


def rejects(folder: Path) -> dict[str, str]:
    lines = map(json.loads, (folder / "out" / "rejects.jsonl").read_text().splitlines())
    return {line["id"]: line["reason"] for line in lines}
