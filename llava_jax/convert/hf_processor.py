"""Transformers' files for image processor, processor and generation, and our settings."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError, shown
from llava_jax.convert.hf_config import CLASS, pinpoints, select_strategy
from llava_jax.files.reading import read_object
from llava_jax.models.config import LlavaConfig, VisionConfig, check_channels
from llava_jax.models.hf_fields import Json, get, in_words_of_hf, part, require
from llava_jax.models.registry import TOWERS

_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True}
RESAMPLE = {3: "bicubic", 2: "bilinear"}  # Pillow's numbers; files without one are bicubic
# Fields of generation_config.json that matter for sampling only: save_pretrained refuses them with greedy decoding,
# although Vicuna's file has both.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


class ImageSettings(NamedTuple):
    """How images are preprocessed."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    aspect: str | None  # None if the source does not say
    resample: str = "bicubic"
    pinpoints: Any = None  # of AnyRes: image_grid_pinpoints

    @property
    def fields(self) -> Json:
        """Those of `LlavaConfig` that a source always says."""
        return {"image_mean": self.mean, "image_std": self.std, "image_resample": self.resample}


def read_image_settings(directory: Path, vision: VisionConfig) -> ImageSettings:
    """From `preprocessor_config.json`, or `processor_config.json` (transformers 5), or the defaults of the tower.

    Raises UserError for preprocessing that is not supported, or not for the image size of the tower.
    """
    config, where = _find(directory)
    tower = TOWERS[vision.kind]
    if config is None:
        return ImageSettings(tower.image_mean, tower.image_std, tower.image_aspect)
    require(config, _FIXED, where)
    if (number := get(config, "resample", 3, where)) not in RESAMPLE:
        raise UserError(f"{where}: resample is {number}; only 2 (bilinear) and 3 (bicubic) are supported")
    if not math.isclose(get(config, "rescale_factor", 1 / 255, where), 1 / 255, rel_tol=1e-6):
        raise UserError(f"{where}: rescale_factor is {config['rescale_factor']}; only 1/255 is supported")
    _check_size(config, vision.image_size, where)
    stretches = isinstance(config.get("size"), dict) and "shortest_edge" not in config["size"]
    pads = get(config, "do_pad", False, where)
    if pads and re.match("Llava(?!Next|Onevision)", str(config.get("image_processor_type"))):
        aspect = "pad"  # to a square first, whichever way that is resized
    elif stretches:
        aspect = "resize"
    elif not get(config, "do_center_crop", True, where):
        raise UserError(
            f"{where}: do_center_crop is false, but images have to become squares of {vision.image_size} pixels"
        )
    else:
        aspect = None if config.get("do_pad") is None else "pad" if pads else "square"
    mean = _channels(config, "image_mean", tower.image_mean, where)
    std = _channels(config, "image_std", tower.image_std, where)
    return ImageSettings(mean, std, aspect, RESAMPLE[number], config.get("image_grid_pinpoints"))


def _channels(config: Json, field: str, default: tuple[float, ...], where: str) -> tuple[float, ...]:
    if config.get(field) is None:
        return default
    with in_words_of_hf(where):
        check_channels(field, config[field])
    return tuple(config[field])


def write_image_processor(config: LlavaConfig) -> Json:
    """The `preprocessor_config.json` with which transformers preprocesses as `data.images.preprocess` does."""
    size = config.vision.image_size
    square = {"height": size, "width": size}
    anyres = {}
    if config.anyres:  # `do_pad` then means that images of a batch get as many tiles
        anyres = {"image_grid_pinpoints": pinpoints(config), "do_pad": True}
    return _FIXED | {
        "image_processor_type": f"{CLASS[config.anyres is not None]}ImageProcessor",
        "processor_class": f"{CLASS[config.anyres is not None]}Processor",
        "do_convert_rgb": True,
        "resample": next(number for number, name in RESAMPLE.items() if name == config.image_resample),
        "do_pad": config.image_aspect == "pad",
        "size": square if config.image_aspect == "resize" else {"shortest_edge": size},
        "do_center_crop": config.image_aspect != "resize",
        "crop_size": square,
        "rescale_factor": 1 / 255,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        **anyres,
    }


def write_processor(config: LlavaConfig, image_token: str) -> Json:
    """The `processor_config.json` that gives each image as many positions as it has features."""
    return {
        "processor_class": f"{CLASS[config.anyres is not None]}Processor",
        "image_token": image_token,
        "num_additional_image_tokens": int(config.vision.class_token),  # "default" subtracts it
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": select_strategy(config),
    }


def write_generation(
    source: Json,  # that of the import; may be empty
    # Of the export. The source overrides its `bos_token_id` and `eos_token_id`, not its `pad_token_id`.
    tokenizer: PreTrainedTokenizerBase,
    end_id: int | None,  # the token that ends an answer; it is added to `eos_token_id`
    # Texts that end an answer if there is no such token: `stop_strings`, for which `generate` needs the tokenizer.
    end_texts: list[str],
) -> Json:
    """The `generation_config.json`: that of the source, without the fields that save_pretrained refuses."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = {name: id for name in names if (id := getattr(tokenizer, name)) is not None}
    values |= {field: value for field, value in source.items() if value is not None and not field.startswith("_")}
    values.pop("transformers_version", None)
    values["pad_token_id"] = tokenizer.pad_token_id
    if not values.get("do_sample"):
        values = {field: value for field, value in values.items() if field not in _SAMPLING}
    known = values.get("eos_token_id", [])
    known = known if isinstance(known, list) else [known]
    ids = known + [id for id in (end_id,) if id is not None and id not in known]
    if ids:
        values["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    if end_id is None and end_texts:
        values["stop_strings"] = end_texts
    return values


def _find(directory: Path) -> tuple[Json | None, str]:
    nested = directory / "processor_config.json"
    if nested.exists() and "image_processor" in (config := read_object(nested)):
        return part(config, "image_processor", str(nested)), f"{nested}: image_processor"
    plain = directory / "preprocessor_config.json"
    return (read_object(plain) if plain.exists() else None), str(plain)


def _check_size(config: Json, image_size: int, where: str) -> None:
    for field in ("size", "crop_size"):
        size = config.get(field)
        lengths = list(size.values()) if isinstance(size, dict) else [size]
        if any(length is not None and (type(length) is not int or length != image_size) for length in lengths):
            raise UserError(f"{where}: {field} is {shown(size)}, but the vision tower takes {image_size} pixels")
