"""Exports a checkpoint as the original LLaVA (haotian-liu/LLaVA) writes it: a model, or the projector of stage 1.

Weights are in safetensors files, which its transformers (4.37) loads as well as `pytorch_model.bin`;
`mm_projector.bin`, which it opens by that name, is a file of torch. Its models need no token for images: rows and
tokenizer stay the same.
"""

import dataclasses
import re
from collections.abc import Callable

from llava_jax.checkpoint.merged import merged
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.checkpoint.writing import copy_tokenizer
from llava_jax.cli import UserError
from llava_jax.convert.hf_processor import write_generation
from llava_jax.convert.hf_text import write_text
from llava_jax.convert.outgoing import PARTS, common_dtype, new_export, tensors_of, write_shards
from llava_jax.convert.tensors import write_json
from llava_jax.convert.torch_save import save_torch
from llava_jax.data.template_fit import end_of_answer
from llava_jax.data.templates import get_template, with_im_start_end
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.models.config import LlavaConfig
from llava_jax.models.hf_fields import IMAGE_POSITION, Json, kept
from llava_jax.models.registry import FAMILIES, TOWERS

PROJECTOR = "mm_projector.bin"
_PREFIXES = {
    "llm": "model.",
    "head": "",
    "projector": "model.mm_projector.",
    "newline": "model.",
    "vision": "model.vision_tower.vision_tower.vision_model.",
}
_NOT_IN_4_37 = ("rope_parameters", "dtype", "head_dim")  # fields of a decoder that transformers 4.37 does not have


def export_original(
    checkpoint_path: str, output: str, dtype: str | None = None, tower: str | None = None, with_tower: bool = True
) -> None:
    """Writes a model: weights, config.json, generation_config.json and the tokenizer.

    Args:
      dtype: of all weights; by default as stored.
      tower: name or directory of the vision tower that the original loads; by default OpenAI's with these shapes.
      with_tower: whether to write the tower's weights, as v1.5 has them, or only its name, as v0 and v1.

    Raises UserError if the original has no such model.
    """
    checkpoint = merged(open_checkpoint(checkpoint_path))
    checkpoint.check()
    settings = _settings(checkpoint, tower, dtype) | {"unfreeze_mm_vision_tower": with_tower}
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    template = with_im_start_end(get_template(checkpoint.template), checkpoint.config.im_start_end)
    source = checkpoint.description.hf.get("generation_config", {})
    generation = write_generation(source, tokenizer, end_of_answer(template, tokenizer), [])
    parts = tuple(part for part in PARTS if with_tower or part != "vision")
    with new_export(output) as directory:
        copy_tokenizer(checkpoint.tokenizer_dir, directory)
        write_json(directory / "config.json", settings)
        write_json(directory / "generation_config.json", generation)
        write_shards(directory, list(tensors_of(checkpoint, dtype, _names(checkpoint), parts)))


def export_projector(checkpoint_path: str, output: str, dtype: str | None = None, tower: str | None = None) -> None:
    """Writes `mm_projector.bin` and its config.json. Raises UserError as `export_original` does."""
    checkpoint = merged(open_checkpoint(checkpoint_path))
    checkpoint.check()
    settings = _settings(checkpoint, tower, dtype) | {"tune_mm_mlp_adapter": True}
    with new_export(output) as directory:
        write_json(directory / "config.json", settings)
        save_torch(directory / PROJECTOR, list(tensors_of(checkpoint, dtype, _names(checkpoint), ("projector",))))


def _names(checkpoint: Checkpoint) -> Callable[[str, str], str]:
    """Names of the original, whose projector numbers its modules, GELUs included, unless there is only one."""

    def name(part: str, leaf: str) -> str:
        if part == "projector":
            linear, kind = leaf.split(".")
            module = 2 * (int(linear.removeprefix("linear_")) - 1)
            leaf = kind if checkpoint.config.projector_type == "linear" else f"{module}.{kind}"
        return _PREFIXES[part] + leaf

    return name


def _settings(checkpoint: Checkpoint, tower: str | None, dtype: str | None) -> Json:
    """The `config.json`: that of a decoder with the fields of the original."""
    config, text = checkpoint.config, checkpoint.description.hf.get("config", {}).get("text_config") or {}
    decoder = write_text(config.text, text, dtype or common_dtype(checkpoint))
    where = str(checkpoint.root)
    _refuse_unknown(config, decoder, where)
    family = FAMILIES[decoder["model_type"]]
    scaling = config.text.rope_scaling
    own = {
        "architectures": [f"Llava{family.hf_class}"],
        "model_type": family.original,
        "rope_scaling": scaling and {"type": scaling.kind, "factor": scaling.factor},
        "use_cache": True,
        "use_mm_proj": True,
        "mm_vision_tower": tower or _tower(config, where),
        "mm_hidden_size": config.feature_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": config.select_feature,
        "mm_patch_merge_type": config.anyres.merge if config.anyres else "flat",
        "mm_use_im_start_end": config.im_start_end,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": config.image_aspect,
        IMAGE_POSITION: config.image_position,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": config.text.max_position_embeddings,
    }
    if config.anyres:
        side = config.vision.image_size  # widths come first here
        own["image_grid_pinpoints"] = [[grid.columns * side, grid.rows * side] for grid in config.anyres.grids]
    return {field: value for field, value in (kept(text) | decoder | own).items() if field not in _NOT_IN_4_37}


def _refuse_unknown(config: LlavaConfig, decoder: Json, where: str) -> None:
    """Raises UserError for models that the original, with transformers 4.37, cannot compute."""
    text, problems = config.text, []
    known = [name for name, family in FAMILIES.items() if family.original]
    if decoder["model_type"] not in known:
        problems.append(f"language model {decoder['model_type']}, only {' and '.join(known)}")
    known = [name for name, tower in TOWERS.items() if tower.original]
    if config.vision.kind not in known:
        problems.append(f"vision tower {config.vision.kind}, only {' and '.join(known)}")
    if not re.fullmatch(r"linear|mlp\d+x_gelu", config.projector_type):
        problems.append(f"projector {config.projector_type}, only linear and mlpNx_gelu")
    if config.image_aspect == "resize":
        problems.append("image aspect resize, only pad and square")
    if isinstance(config.select_layer, tuple):
        problems.append("features of several layers")
    if config.image_resample != "bicubic":
        problems.append(f"{config.image_resample} resizing, only bicubic")
    if text.rope_scaling and text.rope_scaling.kind != "linear":
        problems.append(f"rope_type {text.rope_scaling.kind}, only linear")
    if text.head_dim * text.num_heads != text.hidden_size:
        problems.append(f"head_dim {text.head_dim}, only hidden_size / num_attention_heads")
    if problems:
        raise UserError(
            f"{where}: the original LLaVA has no {'; no '.join(problems)}: export it in Hugging Face's layout"
        )


def _tower(config: LlavaConfig, where: str) -> str:
    kind = TOWERS[config.vision.kind]
    for name, tower in kind.original.items():
        same = dataclasses.replace(config.vision, projection_dim=tower.projection_dim) == tower
        if same and (config.image_mean, config.image_std) == (kind.image_mean, kind.image_std):
            return name
    raise UserError(
        f"{where}: its vision tower is neither {' nor '.join(kind.original)}: give --tower NAME, the directory or name "
        "of the CLIP that the original LLaVA is to load"
    )
