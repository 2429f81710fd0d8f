"""Answers to the test's questions without a language model, as `evaluate score` reads them.

frequent  the most frequent right answer to questions of a category
pixels    what the nearest drawing of the vendors that are trained on would be right for, by squared differences of
          6 x 6 pixels
clip      what the name and the kind nearest to the image in the tower's space would be right for (zero-shot)
"""

import collections
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.emoji import data
from examples.emoji.data import ASK_WHETHER, HELD_OUT, KIND, NAME, TRAINED, Emoji
from llava_jax.cli import Parser, run, say

SIDE = 6  # pixels: 4, 8, 10, 12, 16, 24, 32 and 48 name fewer right


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.emoji.baselines", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, metavar="D", help="of examples.emoji.tower; gets answers/")
    args = parser.parse_args(argv)
    emoji = data.read(args.root)
    questions = [json.loads(line) for line in (args.root / "data/questions.jsonl").read_text().splitlines()]
    zero_shot = json.loads((args.root / "clip/zero_shot.json").read_text())
    same = nearest(args.root / "images", emoji)
    pixels = {one.id: [emoji[i].name, emoji[i].kind] for one, i in zip(emoji, same, strict=True)}
    (args.root / "answers").mkdir(exist_ok=True)
    for name, answer in (
        ("frequent", frequent(questions)),
        ("pixels", of_guess(pixels)),
        ("clip", of_guess(zero_shot)),
    ):
        lines = [
            {
                "question_id": asked["question_id"],
                "prompt": asked["text"],
                "text": answer(asked),
                "category": asked["category"],
            }
            for asked in questions
        ]
        data.write_lines(args.root / f"answers/{name}.jsonl", lines)
    say(f"{args.root}/answers: frequent.jsonl, pixels.jsonl and clip.jsonl answer {len(questions)} questions")


Answering = Callable[[dict[str, Any]], str]


def frequent(questions: Sequence[dict[str, Any]]) -> Answering:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for asked in questions:
        counts[asked["category"]][asked["answer"]] += 1
    return lambda asked: counts[asked["category"]].most_common(1)[0][0]


def of_guess(guesses: dict[str, Sequence[str]]) -> Answering:
    """Answers of one who takes an emoji, by id, for one of this name and kind."""

    def answer(asked: dict[str, Any]) -> str:
        name, kind = guesses[Path(asked["image"]).stem]
        if asked["category"] == NAME:
            return name
        if asked["category"] == KIND:
            return kind
        return "yes" if asked["text"] == ASK_WHETHER.format(name=name) else "no"

    return answer


def nearest(images: Path, emoji: Sequence[Emoji]) -> np.ndarray:
    """For each image of the held-out vendor the number of the emoji with the nearest drawing, int[N]."""

    def read(vendor: str) -> np.ndarray:
        files = [Image.open(images / one.image(vendor)) for one in emoji]
        return np.stack([np.asarray(file.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) for file in files])

    drawn, asked = np.concatenate([read(vendor) for vendor in TRAINED]), read(HELD_OUT)
    distances = np.array([np.square(drawn - image).sum((1, 2, 3)) for image in asked])
    return distances.argmin(1) % len(emoji)


if __name__ == "__main__":
    run(main)
