"""Command-line options that several commands read data with, and what they open."""

import argparse
from typing import Any

from etils import epath

from llava_jax.cli import UserError, positive
from llava_jax.data.conversation import IMAGE_POSITIONS
from llava_jax.data.encoded import TextEncoder
from llava_jax.data.image_folder import ImageFolder, add_allow_absolute, folder_of
from llava_jax.data.template_fit import chosen_template
from llava_jax.data.tokenization import load_tokenizer

_OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"required": True, "metavar": "F", "help": "LLaVA JSON or JSONL"},
    "images": {"required": True, "metavar": "DIR", "help": "the folder of its images"},
    "tokenizer": {"metavar": "DIR", "help": "a Hugging Face tokenizer directory"},
    "template": {"help": "conversation template, such as v1 (default: the tokenizer's own)"},
    "max-length": {"type": positive, "default": 2048, "metavar": "N", "help": "longer samples are cut (2048 tokens)"},
    "image-tokens": {"type": positive, "default": 576, "metavar": "P", "help": "tokens of an image (576)"},
    "image-size": {"type": positive, "default": 336, "metavar": "S", "help": "pixels of a tile's side (336)"},
    "anyres": {"action": "store_true", "help": "images are tiles, as LLaVA-1.6 makes them; needs --images"},
    "image-position": {"default": "first", "choices": IMAGE_POSITIONS, "help": "default: first"},
    "seed": {"type": int, "default": 0, "help": "seed of image position random"},
}


def add_options(parser: argparse.ArgumentParser, **options: dict[str, Any]) -> None:
    """Adds options of the table above, each with what differs for the command; `images` with its companion."""
    for name, changes in options.items():
        name = name.replace("_", "-")
        parser.add_argument(f"--{name}", **_OPTIONS[name] | changes)
        if name == "images":
            add_allow_absolute(parser)


def open_image_folder(args: argparse.Namespace) -> ImageFolder:
    """The folder of `--images`; false where that is not given. Raises UserError where it is no folder."""
    folder = folder_of(args)
    if folder and not epath.Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of images")
    return folder


def text_encoder(args: argparse.Namespace, **settings: Any) -> TextEncoder:
    """Encodes texts with the tokenizer and template of the options. Raises UserError where they do not fit."""
    tokenizer = load_tokenizer(args.tokenizer)
    return TextEncoder(chosen_template(args.template, tokenizer, args.tokenizer), tokenizer, **settings)
