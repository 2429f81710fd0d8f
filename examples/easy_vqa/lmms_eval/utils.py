"""What lmms-eval's task of easy-VQA makes of a sample of LLaVA JSON. Pictures are those of the package `easy-vqa`."""

import importlib.util
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = Path(importlib.util.find_spec("easy_vqa").submodule_search_locations[0]) / "data"


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(IMAGES / doc["image"]).convert("RGB")]


def doc_to_text(doc: dict[str, Any], kwargs: dict[str, Any] | None = None) -> str:
    return doc["conversations"][0]["value"].replace("<image>", "").strip()


def doc_to_target(doc: dict[str, Any]) -> str:
    return doc["conversations"][1]["value"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(results[0].strip() == doc_to_target(doc))}
