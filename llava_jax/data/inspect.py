"""Shows the tokens of samples as the model sees them, and which of them are targets.

With --images it also reads the images of these samples and shows their sizes.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from llava_jax.cli import Parser, one_line, printable, run, short, track, warn
from llava_jax.data.features import Size
from llava_jax.data.images import decode_image
from llava_jax.data.options import add_options, open_image_folder, read_model, text_encoder
from llava_jax.data.parquet import ParquetImages
from llava_jax.data.selection import files_of, open_json
from llava_jax.data.sources import Sample, Source, read_images
from llava_jax.data.template_fit import missing_marks
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Encoded
from llava_jax.data.tokenizer_files import Tokenizer
from llava_jax.files.writing import atomic_file

EPILOG = """example:
  python -m llava_jax.data.inspect --json data.json --tokenizer vicuna-7b-v1.5 --template v1 --limit 3
"""
TARGET, IMAGE, MASKED = "bold green", "magenta", "dim"


class ImageSize(NamedTuple):
    """An image of a sample, upright, in pixels, and what it takes in the sequence."""

    name: str
    width: int
    height: int
    tiles: int = 1
    positions: int = 0  # 0 without AnyRes


Shown = tuple[Sample, Encoded, list[ImageSize] | None]  # a sample, and its images, None without --images


def token_strings(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """The name of every token in the vocabulary; `<image>` for an image."""
    is_text = encoded.input_ids != IMAGE_TOKEN_INDEX
    names = iter(tokenizer.convert_ids_to_tokens(encoded.input_ids[is_text].tolist()))
    return [next(names) if text else IMAGE_TOKEN for text in is_text]


def view(encoded: Encoded, tokenizer: Tokenizer) -> Text:
    """The text of a sample in colours; the targets are also between ⟦ and ⟧, for output without colours."""
    text = Text()
    for (is_image, is_target), run_of_ids in itertools.groupby(
        zip(encoded.input_ids.tolist(), encoded.labels.tolist(), strict=True),
        key=lambda pair: (pair[0] == IMAGE_TOKEN_INDEX, pair[1] != IGNORE_INDEX),
    ):
        ids = [token for token, _ in run_of_ids]
        if is_image:
            text.append(IMAGE_TOKEN * len(ids), IMAGE)
        elif is_target:
            text.append(f"⟦{printable(tokenizer.decode(ids))}⟧", TARGET)
        else:
            text.append(printable(tokenizer.decode(ids)), MASKED)
    return text


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    # No sample is expanded or cut, so any `max_length` will do.
    encode = text_encoder(args, max_length=1, image_position=args.image_position, seed=args.seed)
    if misfit := missing_marks(encode.template, encode.tokenizer):
        warn(misfit)
    samples = open_json(args.json, open_image_folder(args))
    count = len(samples) if args.limit is None else min(args.limit, len(samples))
    inside = any(isinstance(file.images, ParquetImages) for file, _ in files_of(samples))

    def shown(index: int) -> Shown:
        sample = samples[index]
        sizes = image_sizes(samples, index, sample) if args.images is not None or inside else None
        if sizes and encode.tiling:
            features = encode.features(sample, [Size(size.width, size.height) for size in sizes])
            pairs = zip(sizes, features, strict=True)
            sizes = [size._replace(tiles=taken.tiles, positions=len(taken.index)) for size, taken in pairs]
        return sample, encode.ids(sample), sizes

    if args.jsonl:
        _write_jsonl(args.jsonl, map(shown, track(range(count), "encoding samples")), encode.tokenizer)
    else:
        _show(map(shown, range(count)), encode.tokenizer)


def image_sizes(samples: Source, index: int, sample: Sample) -> list[ImageSize]:
    """The sizes of the images of a sample, read as in training. Raises UserError naming image and sample."""
    return read_images(samples, index, sample, lambda data, name: ImageSize(name, *decode_image(data, name).size))


def _write_jsonl(out: str, samples: Iterator[Shown], tokenizer: Tokenizer) -> None:
    with contextlib.nullcontext(sys.stdout.buffer) if out == "-" else atomic_file(out) as file:
        for sample, encoded, images in samples:
            line = {
                "id": sample.id,
                "input_ids": encoded.input_ids.tolist(),
                "labels": encoded.labels.tolist(),
                "tokens": token_strings(encoded, tokenizer),
            }
            if images is not None:
                fields = ImageSize._fields[: None if images and images[0].positions else 3]
                line["images"] = [{field: getattr(image, field) for field in fields} for image in images]
            file.write(json.dumps(line).encode() + b"\n")


def _show(samples: Iterator[Shown], tokenizer: Tokenizer) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for sample, encoded, sizes in samples:
        targets = int((encoded.labels != IGNORE_INDEX).sum())
        images = int((encoded.input_ids == IMAGE_TOKEN_INDEX).sum())
        text = len(encoded.input_ids) - images
        ident = one_line(short(sample.id))
        console.rule(Text(f"{ident}: text tokens {text}, targets {targets}; images {images}"), align="left")
        for name, width, height, tiles, positions in sizes or ():
            taken = f", {tiles} tiles, {positions} positions" if positions else ""
            console.print(Text(f"{one_line(name)}: {width} x {height} pixels{taken}", IMAGE))
        console.print(view(encoded, tokenizer))


def _limit(text: str) -> int:
    limit = int(text)
    if limit < 0:
        raise argparse.ArgumentTypeError(f"{limit} is negative")
    return limit


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.data.inspect", description=__doc__, epilog=EPILOG)
    images = {"required": False, "help": "the folder of its images: read them and show their sizes"}
    add_options(parser, json={}, images=images, checkpoint={}, tokenizer={}, template={}, image_position={}, seed={})
    add_options(parser, image_tokens={}, image_size={}, anyres={})
    parser.add_argument("--limit", type=_limit, metavar="N", help="show the first N samples only")
    parser.add_argument("--jsonl", metavar="OUT", help="write one JSON object a sample to OUT (- for standard output)")
    args = parser.parse_args(argv)
    read_model(args)
    if not args.tokenizer:
        parser.error("the following arguments are required: --tokenizer (or --checkpoint)")
    return args


if __name__ == "__main__":
    run(main)
