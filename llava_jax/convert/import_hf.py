"""Hugging Face weights to a checkpoint: a vision tower and a language model, or a LLaVA.

What a directory holds is decided by its `config.json` and its tensors alone, never by its name. Tensors keep their
types and bits, and every key has to be accounted for.
"""

import dataclasses
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llava_jax.array_store import is_layered
from llava_jax.checkpoint import Description, Piece, refuse_existing, write_model
from llava_jax.cli import UserError, track
from llava_jax.convert import hf_config
from llava_jax.convert.export import special_tokens
from llava_jax.convert.hf_processor import read_image_settings
from llava_jax.convert.hf_text import read_text
from llava_jax.convert.hf_tokenizer import TOKENIZER_FILES
from llava_jax.convert.layouts import (
    CLIP,
    CLIP_REST,
    CONSTANTS,
    LLAMA,
    LLAVA,
    POOLING,
    PROJECTOR,
    TIED_HEAD,
    Source,
    entries_of,
)
from llava_jax.convert.names import pieces
from llava_jax.convert.tensors import open_directory, open_files, read_json
from llava_jax.data.conversation import IM_END_TOKEN, IM_START_TOKEN, get_template, with_im_start_end
from llava_jax.data.tokenization import load_tokenizer, require_tokens
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, abstract_params, module_params
from llava_jax.models.projector import Projector, num_projector_layers


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for; None leaves it to the source, or to the default where that doesn't say."""

    template: str = "v1"
    projector_type: str | None = None  # default mlp2x_gelu
    aspect: str | None = None  # default pad, as LLaVA-1.5 was trained
    select_layer: int | None = None  # default -2
    select_feature: str | None = None  # default patch
    seed: int = 0  # of a fresh projector


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on disk: all its keys and shapes are right, its weights are not yet read."""

    config: LlavaConfig
    sources: dict[str, Source]  # part -> where its tensors are; no projector means a fresh one
    hf: dict[str, Any]  # JSON of the source, kept for an export
    tokenizer_dir: Path


def import_backbones(llm: str, vision: str, projector: str | None, output: str, options: Options) -> LlavaConfig:
    """Joins a language model and a vision tower by a projector from a safetensors file, or by a fresh one.

    Raises UserError that lists all missing, unexpected and misshapen keys.
    """
    refuse_existing(output)
    return _save(
        _find_backbones(_local(llm), _local(vision), projector and _local(projector), options), output, options
    )


def import_llava(directory: str, output: str, options: Options) -> LlavaConfig:
    """Imports a LLaVA of transformers. Raises UserError as `import_backbones` does."""
    refuse_existing(output)
    return _save(_find_llava(_local(directory), options), output, options)


def _find_backbones(llm: Path, vision: Path, projector: Path | None, options: Options) -> Found:
    text_json = read_json(llm / "config.json")
    vision_json = read_json(vision / "config.json")
    text = read_text(text_json, str(llm / "config.json"))
    tower = hf_config.read_vision(vision_json, str(vision / "config.json"))
    sources = {
        "llm": Source(open_directory(llm), LLAMA),
        "vision": Source(open_directory(vision), CLIP, dropped=CONSTANTS + CLIP_REST + POOLING[tower.kind]),
    }
    if projector:
        sources["projector"] = Source(open_files([projector]), PROJECTOR)
    images = read_image_settings(vision, tower)
    config = _config(
        vision=tower,
        text=text,
        projector_type=_projector_type(sources.get("projector"), projector, options.projector_type),
        select_layer=-2 if options.select_layer is None else options.select_layer,
        select_feature=options.select_feature or "patch",
        image_aspect=options.aspect or "pad",
        image_mean=images.mean,
        image_std=images.std,
    )
    problems = _problems(llm, sources["llm"], config, "llm", "head") + _problems(
        vision, sources["vision"], config, "vision"
    )
    if projector:
        problems += _problems(projector, sources["projector"], config, "projector")
    _refuse(problems)
    _check_tied_head(llm, sources["llm"], config)
    if projector and _ends_in_identity(sources["projector"], config):
        config = dataclasses.replace(config, projector_type="linear")
    hf = {
        "config": {"text_config": text_json, "vision_config": hf_config.tower_json(vision_json, str(vision))},
        "generation_config": _read_if_there(llm / "generation_config.json"),
    }
    return Found(config, sources | {"head": sources["llm"]}, hf, tokenizer_dir=llm)


def _find_llava(directory: Path, options: Options) -> Found:
    where = str(directory / "config.json")
    source_json = read_json(directory / "config.json")
    found = hf_config.read_llava(source_json, where)
    source = Source(open_directory(directory), LLAVA, dropped=CONSTANTS + POOLING[found.vision.kind])
    images = read_image_settings(directory, found.vision)
    _refuse_contradiction(where, "--select-layer", options.select_layer, found.select_layer)
    _refuse_contradiction(where, "--select-feature", options.select_feature, found.select_feature)
    config = _config(
        vision=found.vision,
        text=found.text,
        projector_type="mlp2x_gelu",  # Hugging Face has no other
        select_layer=found.select_layer,
        select_feature=found.select_feature,
        im_start_end=found.im_start_end,
        image_aspect=options.aspect or images.aspect or _assume_padding(directory),
        image_mean=images.mean,
        image_std=images.std,
    )
    _refuse(_problems(directory, source, config, "llm", "head", "projector", "vision"))
    _check_tied_head(directory, source, config)
    if found.linear_projector:
        if not _ends_in_identity(source, config):
            raise UserError(
                f"{where}: projector_hidden_act is 'linear', but linear_2 is not the identity: not supported"
            )
        config = dataclasses.replace(config, projector_type="linear")
    _refuse_contradiction(where, "--projector-type", options.projector_type, config.projector_type)
    hf = {
        "config": source_json | {"image_token_index": found.image_token_index},
        "generation_config": _read_if_there(directory / "generation_config.json"),
    }
    parts = dict.fromkeys(("llm", "head", "projector", "vision"), source)
    return Found(config, parts, hf, tokenizer_dir=directory)


def _save(found: Found, output: str, options: Options) -> LlavaConfig:
    template = with_im_start_end(get_template(options.template), found.config.im_start_end)
    with tempfile.TemporaryDirectory() as scratch:
        _copy_tokenizer_files(found.tokenizer_dir, Path(scratch))
        _check_tokenizer(found, Path(scratch))
        # A projector that comes with the rest has been trained with it: the model knows a template.
        stage = "finetune" if found.sources.get("projector") is found.sources["llm"] else None
        description = Description(found.config, template.name, found.hf, stage=stage)
        write_model(output, *_parameters(found, options.seed), description, scratch)
    return found.config


def _parameters(found: Found, seed: int) -> tuple[dict[str, jax.ShapeDtypeStruct], Iterator[Piece]]:
    """Shapes and types of all parameters, and their values, read piece by piece."""
    parts = entries_of(found.config)
    entries = [(part, entry) for part in found.sources for entry in parts[part]]
    fresh = {} if "projector" in found.sources else fresh_projector(found.config, seed)
    wanted = abstract_params(found.config)
    shapes = {
        entry.name: found.sources[part].abstract(part, entry, wanted[entry.name].shape) for part, entry in entries
    } | {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in fresh.items()}

    def read() -> Iterator[Piece]:
        for part, entry in entries:
            for layer, values in pieces(entry, functools.partial(found.sources[part].get, part)):
                yield entry.name, layer, values
        for name, value in fresh.items():
            yield name, None, np.asarray(value)

    total = sum(array.shape[0] if is_layered(name, len(array.shape)) else 1 for name, array in shapes.items())
    return shapes, track(read(), "converting weights", total)


def fresh_projector(config: LlavaConfig, seed: int) -> Params:
    """A projector to begin stage 1 with, float32."""
    rngs = nnx.Rngs(params=jax.random.key(seed))
    projector = Projector(config.projector_type, config.vision.hidden_size, config.text.hidden_size, rngs=rngs)
    return {f"projector.{name}": value for name, value in module_params(projector).items()}


def _config(**fields: Any) -> LlavaConfig:
    try:
        num_projector_layers(fields["projector_type"])
        return LlavaConfig(**fields)
    except ValueError as error:
        raise UserError(str(error)) from None


def _projector_type(source: Source | None, file: Path | None, requested: str | None) -> str:
    """The type of the projector in `file`, by the number of its layers, or of a fresh one."""
    if source is None:
        return requested or "mlp2x_gelu"
    linears = {leaf.split(".")[0] for leaf in source.leaves("projector") if re.fullmatch(r"linear_\d+\..+", leaf)}
    if not linears:
        raise UserError(f"{file}: no projector (multi_modal_projector.linear_1.weight or model.mm_projector.0.weight)")
    found = "linear" if len(linears) == 1 else f"mlp{len(linears)}x_gelu"
    _refuse_contradiction(str(file), "--projector-type", requested, found)
    return found


def _ends_in_identity(source: Source, config: LlavaConfig) -> bool:
    """Whether linear_2 of two changes nothing, which is how a linear projector is stored as a Hugging Face one."""
    if config.projector_type != "mlp2x_gelu":
        return False
    weight, bias = source.get("projector", "linear_2.weight"), source.get("projector", "linear_2.bias")
    return np.array_equal(weight, np.eye(len(weight), dtype=weight.dtype)) and not bias.any()


def _check_tied_head(directory: Path, source: Source, config: LlavaConfig) -> None:
    if config.text.tie_word_embeddings and TIED_HEAD in source:
        head, embeddings = source.get(*TIED_HEAD), source.get("llm", "embed_tokens.weight")
        if head.dtype != embeddings.dtype or not np.array_equal(head, embeddings):
            raise UserError(f"{directory}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight")


def _problems(path: Path, source: Source, config: LlavaConfig, *parts: str) -> list[str]:
    problems = source.problems(config, parts)
    return [f"{path}: {'; '.join(problems)}"] if problems else []


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError("; ".join(problems))


def _refuse_contradiction(where: str, flag: str, requested: Any, found: Any) -> None:
    if requested not in (None, found):
        raise UserError(f"{where}: has {found}, not {requested}: leave {flag} out")


def _assume_padding(directory: Path) -> str:
    print(
        f"{directory}: does not say how pictures become squares (no do_pad in preprocessor_config.json): they are "
        "padded, as LLaVA-1.5 was trained; --aspect square crops them",
        file=sys.stderr,
    )
    return "pad"


def _copy_tokenizer_files(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    if not any(target.glob("tokenizer*")) and not (target / "vocab.json").exists():
        raise UserError(f"{source}: no tokenizer (tokenizer.json or tokenizer.model); copy the model's there")


def _check_tokenizer(found: Found, directory: Path) -> None:
    """Says now what would otherwise be found out after training."""
    rows = found.config.text.vocab_size
    tokenizer = load_tokenizer(directory)
    if found.config.im_start_end:
        require_tokens(tokenizer, IM_START_TOKEN, IM_END_TOKEN)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        print(f"warning: the tokenizer has ids up to {largest}, the model only {rows} rows", file=sys.stderr)
    try:
        special_tokens(tokenizer, found.config, found.hf["config"])
    except UserError as error:
        print(f"warning: this model cannot be exported: {error}", file=sys.stderr)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _local(path: str | os.PathLike) -> Path:
    if "://" in os.fspath(path):
        raise UserError(f"{path}: weights are read from a local disk only; copy it there")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or directory")
    return Path(path)
