"""Finds models of transformers: a vision tower and a language model, or a LLaVA."""

import dataclasses
import functools
import sys
from pathlib import Path

from llava_jax.cli import UserError, say, shown
from llava_jax.convert import hf_config
from llava_jax.convert.adapter import base_name, open_adapter, require_base, with_adapter
from llava_jax.convert.found import Found, Options, check_tensors, has_identity, projector_type, refuse_contradiction
from llava_jax.convert.fused import split
from llava_jax.convert.hf_processor import ImageSettings, read_image_settings
from llava_jax.convert.hf_text import read_text
from llava_jax.convert.language_model import copy_tokenizer, has_tokenizer, open_language_model, read_generation
from llava_jax.convert.layouts import CLIP, CLIP_REST, CONSTANTS, LLAMA, LLAVA, PROJECTOR, Source, finder
from llava_jax.convert.projector_file import open_projector, with_new_tokens
from llava_jax.convert.tensors import open_directory
from llava_jax.files.reading import read_object
from llava_jax.models.config import VisionConfig
from llava_jax.models.hf_fields import Json
from llava_jax.models.registry import TOWERS


def find_backbones(llm: Path, vision: Path, projector: Path | None, options: Options) -> Found:
    """A language model, a vision tower and perhaps a projector of stage 1, which may have embeddings of new tokens."""
    model = open_language_model(llm)
    file = open_projector(projector) if projector else None
    if file:
        model = with_new_tokens(model, file)
    text = read_text(model.config, model.where)
    tower, tower_json, images = read_tower(vision)
    sources = {"llm": Source(split(model.tensors, text), LLAMA), "vision": open_tower(vision, tower)}
    if file:
        sources["projector"] = Source(file.projector, PROJECTOR)
    config = hf_config.llava_config(
        vision,
        vision=tower,
        text=text,
        projector_type=projector_type(sources.get("projector"), projector, options.projector_type),
        select_layer=-2 if options.select_layer is None else options.select_layer,
        select_feature=options.select_feature or "patch",
        im_start_end=file is not None and file.embeddings is not None,
        image_aspect=options.aspect or "pad",
        **images.fields,
    )
    held = [(llm, sources["llm"], ("llm", "head")), (vision, sources["vision"], ("vision",))]
    check_tensors(config, *held, *([(projector, sources["projector"], ("projector",))] if file else []))
    if file and has_identity(sources["projector"], config):
        config = dataclasses.replace(config, projector_type="linear")
    hf = {"config": {"text_config": model.config, "vision_config": tower_json}, "generation_config": model.generation}
    return Found(config, sources | {"head": sources["llm"]}, hf, model.write_tokenizer, trained=False)


def read_tower(directory: Path) -> tuple[VisionConfig, Json, ImageSettings]:
    """The configuration of a vision tower, as ours and as in its file, and how its images are preprocessed."""
    where = str(directory / "config.json")
    json = read_object(directory / "config.json")
    tower = hf_config.read_vision(json, where)
    return tower, hf_config.tower_json(json, where), read_image_settings(directory, tower)


def open_tower(directory: Path, tower: VisionConfig) -> Source:
    return Source(open_directory(directory), CLIP, dropped=CONSTANTS + CLIP_REST + TOWERS[tower.kind].ignored)


def find_adapted_llava(adapter: Path, base: Path | None, options: Options) -> Found:
    """A LLaVA and an adapter of PEFT that was trained with it."""
    if base is None:
        raise UserError(
            f"{adapter}: is an adapter of a LLaVA of transformers: give --base DIR, the model that it was trained "
            f"from{base_name(adapter)}"
        )
    settings = read_object(base / "config.json")
    if settings.get("model_type") not in hf_config.MODEL_TYPES or "text_config" not in settings:
        raise UserError(
            f"{base}: not a LLaVA of transformers, but {adapter} is an adapter of one, or of an original LLaVA without "
            "its config.json"
        )
    return find_llava(base, options, adapter)


def find_llava(directory: Path, options: Options, adapter: Path | None = None) -> Found:
    """A LLaVA, with an `adapter` added if one is given, and the adapter's tokenizer if it has one."""
    where = str(directory / "config.json")
    source_json = read_object(directory / "config.json")
    config = hf_config.read_llava(source_json, where, widths_first=options.grid_order == "original")
    tensors = open_directory(directory)
    if adapter:
        require_base(adapter, config)
        tensors = with_adapter(tensors, open_adapter(adapter, options.unmerged), finder(tensors, LLAVA))
    tensors = split(tensors, config.text)
    source = Source(tensors, LLAVA, dropped=CONSTANTS + TOWERS[config.vision.kind].ignored)
    images = read_image_settings(directory, config.vision)
    aspect = options.aspect or images.aspect or _assume_padding(directory)
    if config.anyres:
        aspect = "anyres"
        refuse_contradiction(where, "--aspect", options.aspect, aspect)
        pinpoints = images.pinpoints or source_json.get("image_grid_pinpoints", images.pinpoints)
        if pinpoints != source_json.get("image_grid_pinpoints", pinpoints):
            raise UserError(f"{where}: image_grid_pinpoints are not those of the image processor, {shown(pinpoints)}")
    refuse_contradiction(where, "--select-layer", options.select_layer, config.select_layer)
    refuse_contradiction(where, "--select-feature", options.select_feature, config.select_feature)
    linear = config.projector_type == "linear"  # stored as two layers, of which the second is the identity
    config = dataclasses.replace(
        config, projector_type="mlp2x_gelu" if linear else config.projector_type, image_aspect=aspect, **images.fields
    )
    parts = ("llm", "head", "projector", "newline", "vision")
    check_tensors(config, (directory, source, parts))
    if linear:
        if not has_identity(source, config):
            raise UserError(
                f"{where}: projector_hidden_act is 'linear', but linear_2 is not the identity: not supported"
            )
        config = dataclasses.replace(config, projector_type="linear")
    refuse_contradiction(where, "--projector-type", options.projector_type, config.projector_type)
    hf = {
        "config": source_json | {"image_token_index": hf_config.image_token_index(source_json, where)},
        "generation_config": read_generation(directory),
    }
    tokenizer = adapter if adapter and has_tokenizer(adapter) else directory
    return Found(config, dict.fromkeys(parts, source), hf, functools.partial(copy_tokenizer, tokenizer), trained=True)


def _assume_padding(directory: Path) -> str:
    say(
        f"{directory}: does not say how images become squares (no do_pad in preprocessor_config.json): they are "
        "padded, as LLaVA-1.5 was trained; --aspect square crops them",
        file=sys.stderr,
    )
    return "pad"
