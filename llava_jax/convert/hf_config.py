"""Hugging Face's `config.json` of a vision tower and of a LLaVA, and ours; that of a decoder is in hf_text.py.

Absent fields have transformers' defaults. A field that changes the computation in a way that is not supported is
refused by name; all others (initialization, token ids, ...) are not read and kept for an export.

Versions 4.51 ... 5.23 of transformers write some values in different places, which are all read and all written: RoPE's
theta (`rope_theta`, `rope_parameters`), types (`torch_dtype`, `dtype`) and tying (at the top and in `text_config`).
Transformers 4 would read a file with theta in `rope_parameters` only as theta 10000.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava_jax.cli import UserError, shown
from llava_jax.convert.hf_text import is_tied, text_part, write_text
from llava_jax.convert.hf_tokenizer import SpecialTokens
from llava_jax.data.anyres import GRIDS, AnyRes, Grid
from llava_jax.models.config import CLIP_L_14_336, LlavaConfig, VisionConfig
from llava_jax.models.hf_fields import IMAGE_POSITION, Json, get, in_words_of_hf, kept, one_of, part, require
from llava_jax.models.registry import PROJECTORS, TOWERS
from llava_jax.models.towers import Tower

# Fields that change the computation, with the only value supported.
_LLAVA_FIXED = {"multimodal_projector_bias": True, "quantization_config": None}


MODEL_TYPES = ("llava", "llava_next")
CLASS = {False: "Llava", True: "LlavaNext"}  # with AnyRes


def read_vision(config: Json, where: str) -> VisionConfig:
    """A vision tower by itself, or that of a whole CLIP or SigLIP. Raises UserError naming what is unsupported."""
    return _read_tower(tower_json(config, where), where)


def tower_json(config: Json, where: str) -> Json:
    """The part of a `config.json` that describes the vision tower: all of it, or that of a whole CLIP or SigLIP."""
    wholes = {tower.whole_model_type: tower for tower in TOWERS.values() if tower.whole_model_type}
    model_type = _tower_type(config, (*_towers(), *wholes), where)
    if model_type not in wholes:
        return config
    # Files of before 2023 say it twice; transformers lets the second have the last word.
    json = part(config, "vision_config", where) | part(config, "vision_config_dict", where)
    return json | {"model_type": wholes[model_type].model_type}


def _towers() -> dict[str, Tower]:
    return {tower.model_type: tower for tower in TOWERS.values()}


def _read_tower(config: Json, where: str) -> VisionConfig:
    return _towers()[_tower_type(config, _towers(), where)].read(config, where)


def _tower_type(config: Json, supported: Collection[str], where: str) -> str:
    if config.get("model_type") in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"{where}: model_type is {config['model_type']!r}, SigLIP2 with NaFlex, which has no fixed image size: "
            "take a SigLIP2 of one size, such as google/siglip2-base-patch16-256, whose model_type is 'siglip'"
        )
    return one_of(config, "model_type", supported, where)


def read_llava(config: Json, where: str, widths_first: bool = False) -> LlavaConfig:
    """The `config.json` of a `llava` or `llava_next`. That of a `llava` does not say how images are preprocessed: see
    hf_processor.py. `widths_first`: see `read_grids`.

    Raises UserError naming what is unsupported.
    """
    model_type = one_of(config, "model_type", MODEL_TYPES, where)
    require(config, _LLAVA_FIXED, where)
    vision = {"model_type": "clip_vision_model"} | get(
        config, "vision_config", TOWERS["clip"].write(CLIP_L_14_336), where
    )
    text = {"model_type": "llama"} | part(config, "text_config", where)
    tied = get(config, "tie_word_embeddings", False, where) or is_tied(text, f"{where}, text_config")
    tower = _read_tower(vision, f"{where}, vision_config")
    activation = one_of({"projector_hidden_act": "gelu"} | config, "projector_hidden_act", hf_projectors(), where)
    anyres = None
    if model_type == "llava_next" or config.get("image_grid_pinpoints"):  # the first ones were called llava
        found, side = config.get("image_grid_pinpoints"), tower.image_size
        found = [[grid.rows * side, grid.columns * side] for grid in GRIDS] if found is None else found
        with in_words_of_hf(where):
            anyres = AnyRes(read_grids(found, side, where, widths_first))
    return llava_config(
        where,
        image_aspect="anyres" if anyres else "pad",
        anyres=anyres,
        vision=tower,
        text=text_part(text, f"{where}, text_config", tied=tied),
        select_layer=_select_layers(config, tower, where),
        select_feature=_select_feature(config, tower, where),
        projector_type=hf_projectors()[activation],
        im_start_end=get(config, "mm_use_im_start_end", False, where),
        image_position=get(config, IMAGE_POSITION, "first", where),
    )


def read_grids(pinpoints: Any, side: int, where: str, widths_first: bool) -> tuple[Grid, ...]:
    """The grids of `image_grid_pinpoints`, which transformers reads as height and width in pixels, the original as
    width and height."""
    pairs = pinpoints if isinstance(pinpoints, list) else [pinpoints]
    for pair in pairs:
        numbers = isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not numbers or any(number < 1 or number % side for number in pair):
            raise UserError(f"{where}: image_grid_pinpoints has {shown(pair)}, not two multiples of {side} pixels")
    return tuple(Grid(*(number // side for number in (reversed(pair) if widths_first else pair))) for pair in pairs)


def pinpoints(config: LlavaConfig) -> list[list[int]]:
    """The `image_grid_pinpoints` of a model with AnyRes, heights first. Raises UserError where transformers differs."""
    anyres, side = config.anyres, config.vision.image_size
    if anyres.merge != "spatial_unpad" or anyres.several != "tiles":
        raise UserError(
            f"transformers has no AnyRes with merge {anyres.merge} and several {anyres.several}, only with "
            "spatial_unpad and tiles: it cannot be exported"
        )
    return [[grid.rows * side, grid.columns * side] for grid in anyres.grids]


def image_token_index(config: Json, where: str) -> int:
    """The id that marks the positions of images in the tokens of a `llava`."""
    image_id = get(config, "image_token_index", get(config, "image_token_id", 32000, where), where)
    if image_id < 0:
        raise UserError(f"{where}: image_token_index is {image_id}, not an id")
    return image_id


def llava_config(where: Path | str, **fields: Any) -> LlavaConfig:
    with in_words_of_hf(str(where)):
        return LlavaConfig(**fields)


def write_llava(config: LlavaConfig, source: Json, special: SpecialTokens, pad_id: int, dtype: str) -> Json:
    """The `config.json` of an export, which has the same meaning for transformers 4.51 ... 5.23.

    Args:
      config: the model.
      source: the `config.json` that was imported, in the form of a LLaVA's; its other fields are kept.
      special: the special tokens of the tokenizer.
      pad_id: the id of its padding token.
      dtype: the type to load the weights in, as 'float16'.
    """
    text = source.get("text_config") or {}
    tower = TOWERS[config.vision.kind].write(config.vision)
    vocabulary = {"vocab_size": special.rows, "pad_token_id": pad_id}
    return kept(source) | {
        "architectures": [f"{CLASS[config.anyres is not None]}ForConditionalGeneration"],
        "model_type": MODEL_TYPES[config.anyres is not None],
        **({"image_grid_pinpoints": pinpoints(config)} if config.anyres else {}),
        "text_config": kept(text) | write_text(config.text, text, dtype) | vocabulary,
        "vision_config": kept(source.get("vision_config") or {}) | tower | {"torch_dtype": dtype, "dtype": dtype},
        "image_token_index": special.image.id,
        "pad_token_id": pad_id,
        "image_seq_length": config.image_tokens,
        IMAGE_POSITION: config.image_position,
        "vision_feature_layer": list(layers) if isinstance(layers := config.select_layer, tuple) else layers,
        "vision_feature_select_strategy": select_strategy(config),
        "projector_hidden_act": next(
            activation for activation, name in hf_projectors().items() if name == config.projector_type
        ),
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def hf_projectors() -> dict[str, str]:
    """The `projector_hidden_act`s that are supported -> our `projector_type`."""
    return {activation: name for kind in PROJECTORS.values() for activation, name in kind.hf_types.items()}


def select_strategy(config: LlavaConfig) -> str:
    """Hugging Face's `vision_feature_select_strategy`: "default" drops the first feature, even of a tower without a
    class token."""
    return "default" if config.drops_first else "full"


def _select_feature(config: Json, tower: VisionConfig, where: str) -> str:
    field = "vision_feature_select_strategy"
    strategy = one_of({field: "default"} | config, field, ("default", "full"), where)
    if tower.class_token:
        return "patch" if strategy == "default" else "cls_patch"
    return "after_first" if strategy == "default" else "patch"


def _select_layers(config: Json, tower: VisionConfig, where: str) -> int | tuple[int, ...]:
    """One layer, or several as a list."""
    field = "vision_feature_layer"
    if not isinstance(layers := config.get(field), list):
        return select_layer(config, field, tower, where)
    if not layers or None in layers:
        raise UserError(f"{where}: {field} is {shown(layers)}, not one layer or a list of them")
    return tuple(select_layer({field: layer}, field, tower, where) for layer in layers)


def select_layer(config: Json, field: str, tower: VisionConfig, where: str) -> int:
    """The layer whose features are used, an index as `LlavaConfig.select_layer`."""
    layer = get(config, field, -2, where)
    if not -tower.num_layers - 1 <= layer <= tower.num_layers:
        raise UserError(f"{where}: {field} is {shown(layer)}, but the vision tower has {tower.num_layers} layers")
    return layer
