"""Finds models of the original LLaVA (haotian-liu/LLaVA).

Its `config.json` is that of a decoder with additional fields (`mm_...`). Beside it is one of these:

* a complete model, or one without the vision tower that `mm_vision_tower` names;
* the same as the difference from the decoder that it was trained from (v0: LLaMA's licence did not allow more);
* an adapter of PEFT, with the other trained parameters in `non_lora_trainables.bin`;
* the projector of stage 1 in `mm_projector.bin`, at the end or in the middle of training.

All but the first also need the decoder.
"""

import dataclasses
import functools
from pathlib import Path

from llava_jax.cli import UserError, warn
from llava_jax.convert import adapter, hf_config
from llava_jax.convert.adapter import base_name, is_adapter, open_adapter, with_adapter
from llava_jax.convert.found import Found, Options, check_tensors, projector_type, refuse_contradiction
from llava_jax.convert.hf_processor import ImageSettings
from llava_jax.convert.hf_text import read_text
from llava_jax.convert.import_hf import open_tower, read_tower
from llava_jax.convert.language_model import (
    LanguageModel,
    copy_tokenizer,
    has_tokenizer,
    open_language_model,
    read_generation,
)
from llava_jax.convert.layouts import CONSTANTS, ORIGINAL, Source
from llava_jax.convert.projector_file import open_projector, with_new_tokens
from llava_jax.convert.stored_tensor import is_difference, with_base
from llava_jax.convert.tensors import has_weights, open_directory
from llava_jax.data.anyres import MERGES, AnyRes
from llava_jax.files.reading import read_object
from llava_jax.models.config import VisionConfig
from llava_jax.models.families import family_of
from llava_jax.models.hf_fields import IMAGE_POSITION, Json, get, in_words_of_hf, one_of, require
from llava_jax.models.registry import FAMILIES, TOWERS

_OWN_FIELDS = ("mm_vision_tower", "mm_hidden_size", "use_mm_proj")
# Fields that change the computation, with the only value supported.
_FIXED = {"mm_resampler_type": None, "s2": False, "s2_scales": None}
# Fields about training, which no decoder has; like all whose name contains mm_.
_TRAINING = ("image_aspect_ratio", "image_grid_pinpoints", "tokenizer_padding_side", "tokenizer_model_max_length")
_TRAINING += (IMAGE_POSITION,)

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")  # transformers 4 and 5 say it in different ones
_OF_THE_BASE = ("vocab_size", "quantization_config")  # its rows, and its numbers: not those of QLoRA's
_PROJECTOR = "mm_projector.bin"
# Patterns of names of tensors that no decoder has, or that are computed.
_NOT_OF_DECODERS = (r".*\b(mm_projector|vision_tower)\..+", r".*\bimage_newline", *CONSTANTS)


def is_original(config: Json) -> bool:
    return any(field in config for field in _OWN_FIELDS)


def find_original(directory: Path, base: Path | None, vision: Path | None, options: Options) -> Found:
    """Raises UserError that names other needed inputs, or lists all missing, unexpected and misshapen tensors."""
    where = str(directory / "config.json")
    settings = read_object(directory / "config.json")
    one_of(settings, "model_type", _model_types(), where)
    require(settings, _FIXED, where)
    model, trained = _decoder(directory, settings, base, options.unmerged)
    text_json = _text_json(model.config)
    text = read_text(text_json, model.where)
    tower, tower_json, images, tower_source = _tower(directory, settings, vision, Source(model.tensors, ORIGINAL))
    source = Source(model.tensors, ORIGINAL, dropped=CONSTANTS + TOWERS[tower.kind].ignored)
    kind = projector_type(source, directory, options.projector_type)
    refuse_contradiction(where, "mm_projector_type", get(settings, "mm_projector_type", kind, where), kind)
    select_layer = hf_config.select_layer(settings, "mm_vision_select_layer", tower, where)
    select_feature = get(settings, "mm_vision_select_feature", "patch", where)
    refuse_contradiction(where, "--select-layer", options.select_layer, select_layer)
    refuse_contradiction(where, "--select-feature", options.select_feature, select_feature)
    anyres = _anyres(settings, tower, where, widths_first=options.grid_order != "transformers")
    refuse_contradiction(where, "--aspect", options.aspect if anyres else None, "anyres")
    im_start_end = get(settings, "mm_use_im_start_end", False, where)
    config = hf_config.llava_config(
        where,
        vision=tower,
        text=text,
        projector_type=kind,
        select_layer=select_layer,
        select_feature=select_feature,
        im_start_end=im_start_end,
        image_position=get(settings, IMAGE_POSITION, "first", where),
        image_aspect="anyres" if anyres else options.aspect or _aspect(settings, where),
        anyres=anyres,
        **images.fields,
    )
    parts = ("llm", "head", "projector", "newline") + (() if tower_source else ("vision",))
    held = [(vision, tower_source, ("vision",))] if tower_source else []
    check_tensors(config, (directory, source, parts), *held)
    hf = {
        "config": {"text_config": text_json, "vision_config": tower_json, "mm_use_im_start_end": im_start_end},
        "generation_config": read_generation(directory) or model.generation,
    }
    sources = dict.fromkeys(parts, source) | ({"vision": tower_source} if tower_source else {})
    return Found(config, sources, hf, model.write_tokenizer, trained)


def _decoder(directory: Path, settings: Json, base: Path | None, unmerged: bool) -> tuple[LanguageModel, bool]:
    """The decoder with the projector and, if its files have one, the tower; and whether it was trained as a LLaVA."""
    if is_adapter(directory):
        model = _as_trained(_base(base, directory, "an adapter", base_name(directory)), directory, settings)
        tensors = with_adapter(model.tensors, open_adapter(directory, unmerged))
        return model._replace(tensors=tensors, write_tokenizer=_tokenizer(directory, model)), True
    if has_weights(directory):
        return _complete(directory, settings, base), True
    if (directory / _PROJECTOR).exists():
        model = _as_trained(_base(base, directory, "a projector alone", _named(settings)), directory, settings)
        file = open_projector(directory / _PROJECTOR)
        model = with_new_tokens(model, file)
        return model._replace(tensors=model.tensors | file.projector), False
    raise UserError(
        f"{directory}: neither a model's weights (model.safetensors, pytorch_model.bin or an index of one) nor an "
        f"adapter ({adapter.SETTINGS}) nor {_PROJECTOR}; a projector in another file goes with --llm, --vision and "
        "--projector"
    )


def _complete(directory: Path, settings: Json, base: Path | None) -> LanguageModel:
    tensors = open_directory(directory)
    if is_difference(tensors):
        model = _base(base, directory, "the difference from a base", _named(settings))
        tensors = with_base(tensors, model.tensors, _NOT_OF_DECODERS, str(directory))
        write_tokenizer = _tokenizer(directory, model)
    elif base:
        raise UserError(f"{directory}: a complete model, no difference from another and no adapter: leave --base out")
    else:
        write_tokenizer = functools.partial(copy_tokenizer, directory)
    return LanguageModel(str(directory / "config.json"), settings, {}, tensors, write_tokenizer)


def _named(settings: Json) -> str:
    name = settings.get("_name_or_path")
    return f" ({name})" if name else ""


def _base(path: Path | None, directory: Path, what: str, named: str) -> LanguageModel:
    if path is None:
        raise UserError(f"{directory}: is {what}: give --base DIR, the model that it was trained from{named}")
    model = open_language_model(path)
    if is_difference(model.tensors):
        raise UserError(f"{path}: is a difference itself: add it to its own base first, and give the sum as --base")
    return model


def _as_trained(base: LanguageModel, directory: Path, settings: Json) -> LanguageModel:
    """The base, which computes what the `config.json` beside the trained part says, as in the original.

    Warns of fields that differ; raises UserError if it is of another family.
    """
    where = str(directory / "config.json")
    stated = {field: value for field, value in _text_json(settings).items() if field not in _OF_THE_BASE}
    replaced = _ROPE if any(stated.get(field) for field in _ROPE) else ()
    config = {field: value for field, value in base.config.items() if field not in replaced} | stated
    ours, theirs = read_text(config, where), read_text(_text_json(base.config), base.where)
    if type(ours) is not type(theirs) or family_of(ours) is not family_of(theirs):
        raise UserError(f"{where}: is for another base: its decoder is a {stated['model_type']}")
    for field in (field.name for field in dataclasses.fields(ours)):
        if (value := getattr(ours, field)) != (other := getattr(theirs, field)):
            warn(f"{where}: its {field} is {value}, that of the base {other}: used is {value}; is it the right base?")
    return base._replace(config=config)


def _tokenizer(directory: Path, model: LanguageModel) -> functools.partial:
    return functools.partial(copy_tokenizer, directory) if has_tokenizer(directory) else model.write_tokenizer


def _text_json(config: Json) -> Json:
    """The `config.json` of the decoder by itself."""
    own = {field: value for field, value in config.items() if field not in _TRAINING and "mm_" not in field}
    return own | {"model_type": _model_types().get(config.get("model_type"), config.get("model_type"))}


def _model_types() -> dict[str, str]:
    """The original's `model_type`s -> those of their decoders in transformers."""
    return {"llava": "llama"} | {family.original: name for name, family in FAMILIES.items() if family.original}


def _aspect(settings: Json, where: str) -> str:
    aspect = get(settings, "image_aspect_ratio", "square", where)
    if aspect not in ("square", "pad"):
        raise UserError(f"{where}: image_aspect_ratio is {aspect!r}; supported are square, pad and anyres")
    return aspect


def _anyres(settings: Json, tower: VisionConfig, where: str, widths_first: bool) -> AnyRes | None:
    """How images become tiles; None without AnyRes."""
    field = "mm_patch_merge_type"
    if settings.get("image_aspect_ratio") != "anyres":
        require(settings, {field: "flat"}, where)
        return None
    merge = one_of({field: "flat"} | settings, field, MERGES, where)
    grids = get(settings, "image_grid_pinpoints", [], where)
    with in_words_of_hf(where):
        return AnyRes(hf_config.read_grids(grids, tower.image_size, where, widths_first), merge)


def _tower(
    directory: Path, settings: Json, vision: Path | None, model: Source
) -> tuple[VisionConfig, Json, ImageSettings, Source | None]:
    """As `read_tower`, and the weights of the tower; None if the model's files have them."""
    inside = bool(model.leaves("vision"))
    if vision:
        config, *rest = read_tower(vision)
        return config, *rest, None if inside else open_tower(vision, config)
    if not inside:
        raise UserError(
            f"{directory}: has no vision tower: give --vision DIR, that of {settings.get('mm_vision_tower')}"
        )
    json, clip = _openai_clip(model, directory), TOWERS["clip"]
    images = ImageSettings(clip.image_mean, clip.image_std, aspect=None)
    return clip.read(json, str(directory)), json, images, None


def _openai_clip(model: Source, directory: Path) -> Json:
    """The configuration of a tower from its shapes; the rest is as in all towers of OpenAI."""
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", _FC1.format(layer=0))
    if any(("vision", leaf) not in model for leaf in needed):
        raise UserError(
            f"{directory}: its vision tower is not a CLIP, or not complete: give --vision DIR with its config.json"
        )
    shapes = [model.shape("vision", leaf) for leaf in needed]
    if [len(shape) for shape in shapes] != [4, 2, 2] or min(map(min, shapes)) < 1:
        raise UserError(f"{directory}: its vision tower has no shapes of CLIP: {', '.join(map(str, shapes))}")
    (width, _, patch, _), (positions, _), (hidden, _) = shapes
    layers = sum(("vision", _FC1.format(layer=layer)) in model for layer in range(len(model.leaves("vision"))))
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "hidden_act": "quick_gelu",
        "projection_dim": VisionConfig.projection_dim,
    }


_FC1 = "encoder.layers.{layer}.mlp.fc1.weight"
