"""What the commands of llava_jax.datagen take that ask no model: captions, filter, report, on files that are made up.

  JAX_PLATFORMS=cpu python benchmarks/datagen_files.py

Words are as frequent as in language (Zipf). The contexts are as many as COCO's, and as the samples of LLaVA-Instruct.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from llava_jax.datagen.objects import SYNONYMS

NOUNS = [*SYNONYMS, *(f"{a}{b}{c}o" for a, b, c in itertools.product("bdfgklmnprst", repeat=3))]
ADJECTIVES = [f"{a}{b}{c}y" for a, b, c in itertools.product("bdfgklmnprst", "aeiou", "bdfgkmnprst")]
QUESTIONS = (
    "What is it?",
    "How many are there?",
    "Where is the dog?",
    "Is it red?",
    "What is he doing?",
    "Why is that?",
)
ANSWERS = ((4, 3), (1, 12), (1, 12))  # questions a sample, phrases an answer: a third are conversations


class Text:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.nouns = list(itertools.accumulate(1 / rank for rank in range(1, len(NOUNS) + 1)))
        self.adjectives = list(itertools.accumulate(1 / rank for rank in range(1, len(ADJECTIVES) + 1)))

    def sentence(self, phrases: int) -> str:
        nouns = self.random.choices(NOUNS, cum_weights=self.nouns, k=phrases)
        adjectives = self.random.choices(ADJECTIVES, cum_weights=self.adjectives, k=phrases)
        parts = (f"{a} {n}" if self.random.random() < 0.4 else n for a, n in zip(adjectives, nouns, strict=True))
        return f"The {' with a '.join(parts)}."


def captions(count: int) -> Iterator[dict]:
    text = Text(0)
    for i in range(count):
        yield {"id": f"{i:09d}", "image": f"{i:09d}.jpg", "caption": text.sentence(3)}


def contexts(count: int) -> Iterator[dict]:
    """Of five captions and seven boxes, as COCO has on average."""
    text = Text(1)
    for i in range(count):
        boxes = [{"category": text.random.choice(list(SYNONYMS)), "bbox": [9, 9, 99, 99]} for _ in range(7)]
        lines = [text.sentence(3) for _ in range(5)]
        yield {"image": f"{i:09d}.jpg", "width": 640, "height": 480, "captions": lines, "boxes": boxes}


def samples(count: int, pictures: int) -> Iterator[dict]:
    text = Text(2)
    for i in range(count):
        questions, phrases = ANSWERS[i % 3]
        turns = []
        for question in text.random.choices(QUESTIONS, k=questions):
            turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
            turns.append({"from": "gpt", "value": text.sentence(phrases)})
        yield {"id": str(i), "image": f"{text.random.randrange(pictures):09d}.jpg", "conversations": turns}


def write(path: Path, records: Iterator[dict]) -> Path:
    with path.open("w") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)
    return path


def measure(*command: object) -> None:
    """Runs a command and prints what it says last, its seconds of processor and its peak memory."""
    arguments = [sys.executable, "-m", "llava_jax.datagen", *map(str, command)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    said = [line.rstrip() for line in process.stderr if " after " not in line]
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("\n".join(said))
    print(*said, sep="\n")
    print(f"{command[0]}: {usage.ru_utime + usage.ru_stime:.0f} s of processor, {usage.ru_maxrss / 1024:.0f} MiB\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=3_000_000, metavar="N")
    parser.add_argument("--contexts", type=int, default=118_000, metavar="N")
    parser.add_argument("--samples", type=int, default=158_000, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = write(folder / "captions.jsonl", captions(args.captions))
        measure("captions", "--captions", file, "--output", folder / "chat.json")
        measure("filter", "--captions", file, "--phrases", "words", "--output", folder / "balanced.jsonl")
        images = folder / "images"
        images.mkdir()
        Image.effect_noise((640, 480), 64).save(folder / "picture.jpg")
        for i in range(args.contexts):
            (images / f"{i:09d}.jpg").symlink_to(folder / "picture.jpg")
        context_file = write(folder / "contexts.jsonl", contexts(args.contexts))
        sample_file = write(folder / "samples.jsonl", samples(args.samples, args.contexts))
        page = folder / "report.html"
        os.environ["XDG_CACHE_HOME"] = scratch
        measure("report", "--json", sample_file, "--captions", context_file, "--images", images, "--output", page)
        print(f"the page: {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
