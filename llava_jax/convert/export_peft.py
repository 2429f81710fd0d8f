"""Exports the adapters of a checkpoint as PEFT writes them: `adapter_model.safetensors` and `adapter_config.json`.

A projector that was trained whole is either in the adapter (`modules_to_save`), which PEFT loads, or in a base that is
written with it, since servers take low-rank matrices alone.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from llava_jax.checkpoint.merged import trained_whole, without_adapters
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.checkpoint.writing import check_free, refuse_existing
from llava_jax.cli import UserError, warn
from llava_jax.convert.adapter import SETTINGS, TRAINED_WITH, TrainedWith, base_fields
from llava_jax.convert.export import export_model, identity
from llava_jax.convert.layouts import EXPORT_PREFIXES
from llava_jax.convert.names import entries_of
from llava_jax.convert.outgoing import PARTS, Tensor, new_export, tensors_of, write_file
from llava_jax.convert.tensors import write_json
from llava_jax.models.config import LoraConfig
from llava_jax.models.families import family_of
from llava_jax.models.hf_fields import Json
from llava_jax.models.lora import PARAMETER

# Prefixes of names, by the oldest transformers whose models have them; see `convert.layouts`. Models of 5.6 and later
# have no `vision_model`, but PEFT renames it.
NAMES = {
    "4.52": {
        "llm": "model.language_model.",
        "projector": "model.multi_modal_projector.",
        "newline": "model.",
        "vision": "model.vision_tower.vision_model.",
        "head": "",
    },
    "4.51": EXPORT_PREFIXES,
}
WITHOUT_LLM = r".*(vision_tower|multi_modal_projector).*"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank, by default 16


def export_peft(checkpoint_path: str, output: str, base: str | None = None, transformers: str = "4.52") -> None:
    """Writes an adapter, float32.

    Args:
      base: where to write the model that the adapter is for, with all that was trained whole; by default the adapter
        has the projector, if it was trained.
      transformers: a key of `NAMES`.

    Raises UserError if there are no adapters, or if an adapter of PEFT cannot hold what was trained.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    checkpoint.check()
    lora = checkpoint.config.lora
    if lora is None:
        raise UserError(f"{checkpoint_path}: has no adapters (config.lora.rank): export it with --layout hf")
    if fused := family_of(checkpoint.config.text).fused(checkpoint.config.text):
        raise UserError(
            f"{checkpoint_path}: transformers has one {' and one '.join(fused)} for several of our layers, which an "
            "adapter of PEFT cannot hold: merge it (--layout hf)"
        )
    adapted = {PARAMETER.fullmatch(name)["layer"] for name in checkpoint.abstract() if PARAMETER.fullmatch(name)}
    saved = [] if base else _modules_to_save(checkpoint, adapted)
    refuse_existing(output)
    if base and Path(os.path.realpath(base)).is_relative_to(os.path.realpath(output)):
        raise UserError(f"{output}: --base and --output are one directory, or the base is in it: they need two")
    if base:
        export_model(without_adapters(checkpoint), base)
    settings = _settings(checkpoint, lora, adapted, saved) | {"base_model_name_or_path": base or _base_name(checkpoint)}
    with new_export(output) as directory:
        tensors = list(_tensors(checkpoint, NAMES[transformers], bool(saved)))
        check_free(directory, sum(tensor.nbytes for tensor in tensors))
        write_file(directory / "adapter_model.safetensors", tensors)
        write_json(directory / SETTINGS, settings)
        trained = TrainedWith(checkpoint.template, checkpoint.config.image_position, checkpoint.config.image_aspect)
        write_json(directory / TRAINED_WITH, trained._asdict() | {"base": base_fields(checkpoint.config.text)})
    _warn_of_servers(output, lora, adapted, saved)


def _modules_to_save(checkpoint: Checkpoint, adapted: set[str]) -> list[str]:
    """The projector, if it was trained. Raises UserError if other weights were."""
    instead = (
        "give --base DIR, where the model that the adapter is for is written with it, or merge everything (--layout hf)"
    )
    whole = trained_whole(checkpoint)
    if whole is None:
        raise UserError(f"{checkpoint.root}: does not say what was trained whole, as it is from before that: {instead}")
    inside = [name for name in whole if name.rpartition(".")[0] in adapted]
    if other := inside or [name for name in whole if not name.startswith("projector.")]:
        raise UserError(f"{checkpoint.root}: {min(other)} was trained whole, which an adapter does not hold: {instead}")
    return ["multi_modal_projector"] if whole else []


def _settings(checkpoint: Checkpoint, lora: LoraConfig, adapted: set[str], saved: list[str]) -> Json:
    """The `adapter_config.json`, without the name of the base."""
    decoder = all(name.startswith("llm.") for name in adapted)
    return {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        # PEFT takes each for the end of a name, and the tower has layers of the same names.
        "target_modules": sorted(_target_modules(checkpoint, adapted, short=decoder)),
        "exclude_modules": WITHOUT_LLM if decoder else None,
        "modules_to_save": saved or None,
    }


def _target_modules(checkpoint: Checkpoint, adapted: set[str], short: bool) -> set[str]:
    """Ends of the names of adapted layers that no other layers have, in any version of transformers; with `short` of
    none in the language model."""
    prefixes = {"llm": "language_model.", "projector": "multi_modal_projector."}
    layers = {
        prefixes.get(part, "") + leaf.removesuffix(".weight")
        for part, entries in entries_of(checkpoint.config).items()
        for entry in entries
        if entry.name.removesuffix(".kernel") in adapted and entry.name.endswith(".kernel")
        for leaf in entry.leaves()
    }
    return {layer.rpartition(".")[2] for layer in layers} if short else layers


def _base_name(checkpoint: Checkpoint) -> str:
    """The model that was imported, by its name on the Hub or the path of the checkpoint of it."""
    for holder, _ in checkpoint.holders:
        origins = holder.description.origins
        if origin := origins.get("base") or origins.get("llava"):  # with a base, the latter is another adapter
            return origin.partition("@")[0]
    return checkpoint.description.sources[0].path if checkpoint.description.sources else str(checkpoint.root)


def _tensors(checkpoint: Checkpoint, prefixes: dict[str, str], projector: bool) -> Iterator[Tensor]:
    def name_of(part: str, leaf: str) -> str:
        return f"base_model.model.{prefixes[part]}{leaf}"

    for tensor in tensors_of(checkpoint, "float32", name_of, PARTS):
        if ".lora_" in tensor.name or projector and ".multi_modal_projector." in tensor.name:
            yield tensor
    if projector and checkpoint.config.projector_type == "linear":
        yield from identity("float32", checkpoint.config, f"base_model.model.{prefixes['projector']}")


def _warn_of_servers(output: str, lora: LoraConfig, adapted: set[str], saved: list[str]) -> None:
    """Warns of what servers refuse or, worse, ignore."""
    if saved:
        warn(f"{output}: vLLM refuses modules_to_save: for servers, give --base DIR, which has the projector, too")
    if lora.dora:
        warn(f"{output}: vLLM and SGLang have no DoRA: for servers, merge it (--layout hf)")
    if lora.rank > 16:
        needed = next((rank for rank in VLLM_RANKS if rank >= lora.rank), None)
        how = f"needs --max-lora-rank {needed}" if needed else f"takes ranks up to {VLLM_RANKS[-1]}: merge it"
        warn(f"{output}: rank {lora.rank}: vLLM {how}")
    if lora.rslora:
        warn(f"{output}: SGLang ignores use_rslora and would scale by alpha / r: for SGLang, merge it (--layout hf)")
    if any(not name.startswith("llm.") for name in adapted):
        warn(f"{output}: servers ignore adapters of the tower and the projector: for servers, merge it (--layout hf)")
