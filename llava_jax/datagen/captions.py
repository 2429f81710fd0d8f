"""Makes the samples of stage 1 from captions: an instruction, chosen by seed and id, and the caption as the answer.

The image is before or after the instruction, at random, as in the paper. Captions are {image, caption} records (JSON or
JSONL, also with `blip_caption`), COCO's captions_*.json, or LLaVA samples of one question. The file is read and written
as a stream, and the output is replaced at the end.
"""

import argparse
import json
import sys

from llava_jax.cli import Parser, UserError, say
from llava_jax.data.samples import conversation
from llava_jax.datagen.caption_files import CAPTION_KEYS, Caption, read_captions
from llava_jax.datagen.instructions import BRIEF, DETAILED, pick, with_image
from llava_jax.files.writing import atomic_list

EPILOG = """example:
  python -m llava_jax.datagen captions --captions captions_train2017.json --output chat.json
"""
STYLES = {"brief": BRIEF, "detailed": DETAILED}


def expand(caption: Caption, style: str, seed: int) -> dict[str, object]:
    """The sample of a caption."""
    question = with_image(pick(STYLES[style], "instruction", seed, caption.id), seed, caption.id)
    turns = conversation([("user", question), ("assistant", caption.text)])
    return {"id": caption.id, "image": caption.image, "conversations": turns}


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    count = 0
    captions = read_captions(args.captions, args.keys, args.skip_bad, show="expanding captions")
    with atomic_list(args.output, lines=args.output.endswith(".jsonl")) as add:
        for caption in captions:
            add(json.dumps(expand(caption, args.style, args.seed), ensure_ascii=False).encode())
            count += 1
        if not count:
            raise UserError(f"{args.captions}: not one of its records holds a caption")
    say(f"{args.output}: {count} samples", file=sys.stderr)


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all commands that read a file of captions. `args.keys` is an argument of `read_captions`."""
    add = parser.add_argument
    add("--captions", required=True, metavar="F", help="the file of captions")
    add("--output", required=True, metavar="OUT", help="JSON, or JSONL where its name ends in .jsonl")
    add("--key", dest="keys", type=lambda key: (key,), default=CAPTION_KEYS, metavar="KEY",
        help=f"the field of a record that holds its caption (default: {' or '.join(CAPTION_KEYS)})")  # fmt: skip
    add("--skip-bad", action="store_true", help="leave out records without a caption, which are listed")
    add("--seed", type=int, default=0, help="random seed (0)")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.datagen captions", description=__doc__, epilog=EPILOG)
    add_caption_arguments(parser)
    parser.add_argument("--style", choices=STYLES, default="brief", help="instructions for captions of a phrase or a "
                        "sentence, or for detailed descriptions (default: brief)")  # fmt: skip
    return parser.parse_args(argv)
