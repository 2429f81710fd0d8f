"""Command-line options that several commands read data with, and what they open."""

import argparse
import dataclasses
import math
from typing import Any

from etils import epath

from llava_jax.cli import UserError, positive, shown
from llava_jax.data.anyres import AnyRes, Grid, Tiling
from llava_jax.data.conversation import IMAGE_POSITIONS
from llava_jax.data.encoded import TextEncoder
from llava_jax.data.image_folder import ImageFolder, add_allow_absolute, folder_of
from llava_jax.data.parquet import parquet_files
from llava_jax.data.template_fit import chosen_template
from llava_jax.data.templates import Template, with_im_start_end
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.data.tokenizer_files import Tokenizer
from llava_jax.files.reading import read_object

# What `select_feature` of a checkpoint adds to the patches of an image, in the towers that are here.
_TOWERS = ("clip", "siglip")
_BESIDE_PATCHES = {"patch": 0, "cls_patch": 1, "after_first": -1}

_OPTIONS: dict[str, dict[str, Any]] = {
    "json": {
        "required": True,
        "metavar": "F",
        "help": "LLaVA JSON or JSONL, a YAML file that names several, or Parquet",
    },
    "images": {"required": True, "metavar": "DIR", "help": "the folder of its images; Parquet may have them inside"},
    "tokenizer": {"metavar": "DIR", "help": "a Hugging Face tokenizer directory"},
    "template": {"help": "conversation template, such as v1 (default: the tokenizer's own)"},
    "max-length": {"type": positive, "default": 2048, "metavar": "N", "help": "longer samples are cut (2048 tokens)"},
    "checkpoint": {
        "metavar": "DIR",
        "help": "an import or a workdir: its tokenizer and template, and the positions that its images take",
    },
    "image-tokens": {"type": positive, "metavar": "P", "help": "positions of an image or a tile (576)"},
    "image-size": {"type": positive, "metavar": "S", "help": "pixels of a tile's side (336)"},
    "anyres": {
        "nargs": "*",
        "metavar": "KEY=VALUE",
        "help": "images are tiles, as LLaVA-1.6 makes them, or as options of config.anyres say: several=base "
        "merge=flat grids=1x2,2x1 (rows x columns); needs the images, whose sizes count",
    },
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


def require_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a usage error without `--images`, unless `--json` names Parquet, which mostly has its images inside."""
    if args.images is None and not parquet_files(args.json):
        parser.error("the following arguments are required: --images")


def open_image_folder(args: argparse.Namespace) -> ImageFolder:
    """The folder of `--images`; false where that is not given. Raises UserError where it is no folder."""
    folder = folder_of(args)
    if folder and not epath.Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of images")
    return folder


def read_model(args: argparse.Namespace) -> None:
    """Fills in what `--checkpoint` says of the model, and the defaults, unless options do: `tokenizer`, `template`,
    `image_tokens`, `tiling` and `im_start_end`. Raises UserError for a checkpoint that does not say it.
    """
    args.im_start_end, stored, side, tokens = False, None, 336, 576
    if args.checkpoint:
        file = epath.Path(args.checkpoint) / "llava.json"
        if not file.exists():
            raise UserError(f"{args.checkpoint}: no llava.json, so no import and no training workdir")
        description = read_object(file)
        try:
            model = description["model"]
            args.tokenizer = args.tokenizer or str(file.parent / "tokenizer")
            args.template = args.template or description["template"]
            args.im_start_end = model.get("im_start_end", False)
            stored = AnyRes.from_dict(model["anyres"]) if model.get("anyres") else None
            side, patch = model["vision"]["image_size"], model["vision"]["patch_size"]
            tokens = (side // patch) ** 2 + _BESIDE_PATCHES[model["select_feature"]]
            kind = model["vision"].get("kind", "clip")
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{file}: damaged description ({error!r}); import it again") from None
        if kind not in _TOWERS and args.image_tokens is None:
            raise UserError(
                f"{file}: the vision tower is {shown(kind)}: give the positions of an image, --image-tokens"
            )
    args.image_tokens, args.image_size = args.image_tokens or tokens, args.image_size or side
    args.tiling = _tiling(args, stored)


def _tiling(args: argparse.Namespace, stored: AnyRes | None) -> Tiling | None:
    """How images become tiles. The mean colour does not matter for sizes."""
    if stored is None and args.anyres is None:
        return None
    values: dict[str, Any] = {}
    try:
        for pair in args.anyres or ():
            key, _, value = pair.partition("=")
            grids = key == "grids"
            values[key] = tuple(Grid(*map(int, grid.split("x"))) for grid in value.split(",")) if grids else value
        anyres = dataclasses.replace(stored or AnyRes(), **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"--anyres {' '.join(args.anyres)}: {error}; see config.anyres of a run") from None
    patches = math.isqrt(args.image_tokens)
    if patches**2 != args.image_tokens or patches > args.image_size:
        raise UserError(f"--image-tokens {args.image_tokens}: the features of a tile are no square of --image-size")
    return Tiling(anyres, args.image_size, patches, (0.5, 0.5, 0.5))


def text_encoder(args: argparse.Namespace, **settings: Any) -> TextEncoder:
    """Encodes texts with the tokenizer and template of the options, after `read_model`.

    Raises UserError where these do not fit.
    """
    tokenizer = load_tokenizer(args.tokenizer)
    return encoder_of(args, chosen_template(args.template, tokenizer, args.tokenizer), tokenizer, **settings)


def encoder_of(args: argparse.Namespace, template: Template, tokenizer: Tokenizer, **settings: Any) -> TextEncoder:
    """The same with a template and a tokenizer that are open."""
    template = with_im_start_end(template, args.im_start_end)
    return TextEncoder(template, tokenizer, args.image_tokens, tiling=args.tiling, **settings)
