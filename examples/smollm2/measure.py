"""What a checkpoint says of easy-VQA's test images: which captions and answers are exactly right."""

import collections
import json
from typing import NamedTuple

from examples.easy_vqa.data import IMAGES, AskedImage, asked_images, caption
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.cli import Parser, run, track
from llava_jax.data.templates import IMAGE_TOKEN, get_template
from llava_jax.evaluate.benchmarks.easy_vqa import kind
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling

EVERY = 4  # test images: enough to tell 90 from 95 %
BATCH = 32


class Asked(NamedTuple):
    """A question about an image."""

    kind: str
    image: AskedImage
    text: str
    right: str


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m examples.smollm2.measure",
        description=__doc__,
        epilog="example:\n  python -m examples.smollm2.measure --checkpoint runs/smollm2/pretrain --what captions",
    )
    parser.add_argument("--checkpoint", required=True, metavar="D")
    parser.add_argument("--what", required=True, choices=("captions", "questions"))
    args = parser.parse_args(argv)
    chosen = asked_images("test")[::EVERY]
    if args.what == "captions":
        asked = [Asked("caption", p, "Describe the image briefly.", text) for p in chosen if (text := caption(p))]
        template = "plain"  # an image and its caption, as in stage 1
    else:
        # One of the questions of each image, another one each time.
        questions = [(p, p.questions[i % len(p.questions)]) for i, p in enumerate(chosen)]
        asked = [
            Asked(kind(question.text, question.answer), p, question.text, question.answer) for p, question in questions
        ]
        template = "chatml"
    print(json.dumps(score(asked, answers(open_checkpoint(args.checkpoint), template, asked))))


def answers(checkpoint: Checkpoint, template: str, asked: list[Asked]) -> list[str]:
    generator = Generator.from_checkpoint(checkpoint, get_template(template))
    said: list[str] = []
    for start in track(range(0, len(asked), BATCH), "answering"):
        requests = [
            Request([("user", f"{IMAGE_TOKEN}\n{one.text}")], [IMAGES / one.image.name])
            for one in asked[start : start + BATCH]
        ]
        said += generator.answer(requests, Sampling(max_new_tokens=12), batch_rows=BATCH)
    return said


def score(asked: list[Asked], said: list[str]) -> dict:
    """Shares of exactly right answers, in all and by kind, and the first three as an impression."""
    right = collections.Counter(one.kind for one, text in zip(asked, said, strict=True) if text == one.right)
    number = collections.Counter(one.kind for one in asked)
    return {
        "right": right.total() / number.total(),
        "by_kind": {kind: right[kind] / number[kind] for kind in sorted(number)},
        "asked": number.total(),
        "for_example": [
            {"question": one.text, "said": text, "right": one.right}
            for one, text in list(zip(asked, said, strict=True))[:3]
        ],
    }


if __name__ == "__main__":
    run(main)
