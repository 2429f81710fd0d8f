"""A data set like llava_v1_5_mix665k: its size, its lengths, its share of samples without a picture; not its meaning.

Subsets have the published numbers of samples (665,298 together, ShareGPT's 40,688 without a picture, one in sixteen).
How long each one's samples are follows from what its sources say of themselves:

  LLaVA-Instruct   files of 126, 20.5 and 79.6 MB for its conversations, details and reasoning
  VQAv2, GQA       443,757 questions on 82,783 pictures, 943,000 on 72,140, all of a picture in one conversation
  OCR-VQA          five questions a book cover
  RefCOCO, VG      conversations of fewer than ten and of mostly ten regions, each a box to be described
  A-OKVQA          multiple choice; OKVQA and TextCaps one question each
  ShareGPT         conversations cut at 2048 tokens: more than half come near that

The check on it: the published file has 1.03 GB, and what this writes comes to 0.95 without being scaled to it.
Rounds are Poisson around their mean, words a turn lognormal, both drawn for each sample from the seed. Words are runs
of Python's documentation (module `pydoc_data`), so tokenizers make as many tokens of a word as they do of English.

Pictures are scikit-image's photographs: random crops, resized to the sizes that COCO's pictures have, as JPEG. There
may be fewer than samples, whose names then repeat.
"""

import functools
import json
import os
import pydoc_data.topics
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from llava_jax.cli import Parser, track

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
REGION = "Please provide a short description for this region: "
CAPTION = "Provide a one-sentence caption for the provided image.\nReference OCR token: "

SIZES = {(640, 480): 5, (480, 640): 2, (640, 427): 4, (427, 640): 1, (640, 426): 1, (500, 375): 2, (640, 360): 1}
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
QUALITY = 95  # files of 88 kB on average; COCO's are larger, its photographs having more detail


class Subset(NamedTuple):
    """How the samples of a source are drawn; means of rounds, and of words a turn."""

    name: str
    samples: int
    rounds: float
    question: float
    answer: float
    spread: float = 0.4  # of the lognormal words a turn
    most_rounds: int = 40
    before: str = ""  # stands before each question
    prompt: str = ""  # stands after the first question
    boxes: str = ""  # which side of a round is a box: "question" or "answer"
    picture: bool = True


SUBSETS = (
    Subset("llava_conversation", 58_000, 4.4, 11, 53, spread=0.6),
    Subset("llava_detail", 23_069, 1, 9, 114),
    Subset("llava_reasoning", 76_643, 1, 14, 136),
    Subset("sharegpt", 40_688, 5.0, 60, 330, spread=1.0, picture=False),
    Subset("vqav2", 82_783, 5.36, 6, 1.1, prompt=SHORT),
    Subset("gqa", 72_140, 13.07, 8, 1.1, prompt=SHORT),
    Subset("okvqa", 8_998, 1, 8, 1.3, prompt=SHORT),
    Subset("ocrvqa", 80_000, 5, 6, 3.5, prompt=SHORT),
    Subset("aokvqa", 66_160, 1, 22, 1, prompt=LETTER),
    Subset("textcaps", 21_953, 1, 10, 12, before=CAPTION),
    Subset("refcoco", 48_447, 7, 6, 4, most_rounds=9, before=REGION, boxes="question"),
    Subset("vg", 86_417, 14, 6, 6, most_rounds=10, before=REGION, boxes="question"),
)
SHAREGPT_WORDS = 1400  # near 2048 tokens


class Words:
    """Runs of a real text."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        text = " ".join(pydoc_data.topics.topics.values())
        self.words = re.findall(r"[A-Za-z]+", text)

    def take(self, count: int) -> str:
        start = int(self.rng.integers(0, max(1, len(self.words) - count)))
        return " ".join(self.words[start : start + count])

    def box(self) -> str:
        corners = np.sort(self.rng.random((2, 2)), axis=0).ravel()
        return "[" + ", ".join(f"{corner:.2f}" for corner in corners) + "]"


def make_samples(count: int | None = None, pictures: int = 1000, seed: int = 0) -> Iterator[dict]:
    """`count` samples of the mixture (all by default), shuffled, that name pictures of `write_pictures`."""
    rng = np.random.default_rng(seed)
    words = Words(rng)
    kinds = rng.permutation(np.repeat(np.arange(len(SUBSETS)), [subset.samples for subset in SUBSETS]))
    for number, kind in enumerate(kinds[:count].tolist()):
        subset = SUBSETS[kind]
        sample = {"id": f"{subset.name}_{number:06}"}
        if subset.picture:
            sample["image"] = picture_name(number % pictures)
        yield sample | {"conversations": _turns(subset, words)}


def _turns(subset: Subset, words: Words) -> list[dict]:
    rng = words.rng
    rounds = int(np.clip(1 + rng.poisson(subset.rounds - 1), 1, subset.most_rounds))
    sigma = subset.spread
    lengths = np.array([[subset.question], [subset.answer]]) * np.exp(sigma * rng.standard_normal((2, rounds)))
    lengths = np.maximum(1, np.rint(lengths * np.exp(-(sigma**2) / 2))).astype(int)
    if not subset.picture:  # cut like the published file
        left = np.maximum(SHAREGPT_WORDS - np.cumsum(lengths.sum(0)) + lengths.sum(0), 0)
        lengths = np.minimum(lengths, np.maximum(left // 2, 1))[:, left > 0]
    turns = []
    for i, (asked, answered) in enumerate(lengths.T.tolist()):
        question = words.box() if subset.boxes == "question" else words.take(asked) + "?"
        answer = words.take(answered)
        mark = "<image>\n" if subset.picture and i == 0 else ""
        prompt = subset.prompt if i == 0 else ""
        turns.append({"from": "human", "value": f"{mark}{subset.before}{question}{prompt}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def picture_name(number: int) -> str:
    return f"{number:012}.jpg"


@functools.cache
def photographs() -> list[Image.Image]:
    """scikit-image's, as RGB."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    return [Image.open(data / name).convert("RGB") for name in PHOTOGRAPHS]


def write_pictures(folder: Path, count: int, seed: int = 0) -> None:
    """Writes those of images 0 to `count` - 1 that do not exist; each depends on the seed and its number alone."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, weights = list(SIZES), np.array(list(SIZES.values()))
    missing = [number for number in range(count) if not (folder / picture_name(number)).exists()]
    for number in track(missing, "making pictures"):
        rng = np.random.default_rng([seed, number])
        photograph = photographs()[rng.integers(len(PHOTOGRAPHS))]
        size = sizes[rng.choice(len(sizes), p=weights / weights.sum())]
        zoom, centre = rng.uniform(0.0, 0.2), tuple(rng.random(2))
        picture = ImageOps.fit(photograph, size, Image.Resampling.LANCZOS, bleed=zoom, centering=centre)
        partial = folder / f"{picture_name(number)}.partial"
        picture.save(partial, "JPEG", quality=QUALITY)
        partial.replace(folder / picture_name(number))


def write_json(path: Path, count: int | None = None, pictures: int = 1000, seed: int = 0) -> None:
    """Writes the samples as one JSON array, or as lines where the name ends in .jsonl."""
    opening, between, closing = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[", ", ", "]\n")
    total = sum(subset.samples for subset in SUBSETS)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(opening)
        samples = track(make_samples(count, pictures, seed), "making samples", min(count or total, total))
        for i, sample in enumerate(samples):
            file.write((between if i else "") + json.dumps(sample))
        file.write(closing)
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description=__doc__,
        epilog="example: python benchmarks/synthetic.py --json /tmp/mix665k.json --images /tmp/pictures",
    )
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="what to write; .jsonl writes lines")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where to write pictures; without, none is written")
    parser.add_argument("--pictures", type=int, default=1000, metavar="N", help="pictures that samples name (1000)")
    parser.add_argument("--samples", type=int, metavar="N", help="the first N only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    write_json(args.json, args.samples, args.pictures, args.seed)
    if args.images:
        write_pictures(args.images, args.pictures, args.seed)


if __name__ == "__main__":
    main()
