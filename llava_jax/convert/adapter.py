"""Adapters of PEFT (LoRA): low-rank matrices to add to the weights of a base, and modules that replace its own."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.cli import UserError, shown
from llava_jax.convert.stored_tensor import StoredTensor, Tensors
from llava_jax.convert.tensors import open_directory
from llava_jax.files.reading import read_object
from llava_jax.models.hf_fields import Json, get, part

SETTINGS = "adapter_config.json"
_FILES = (
    ("adapter_model.safetensors", "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
# Fields of adapter_config.json that are read here, or that do not change the sum (origin, training). Any other one has
# to be empty or have the value in _PLAIN.
_FREE = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights"}
_FREE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"}
_FREE |= {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"}
_FREE |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # options of init_lora_weights
_FREE |= {"megatron_config", "megatron_core", "qalora_group_size"}
_PLAIN = {"peft_type": "LORA", "bias": "none"}
# Values of init_lora_weights with which the base stays unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ) subtract the
# initial A and B from it, so that the adapter belongs to a base that was not saved.
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")
_REPEATED = re.compile(r"\)[*+?{]")  # a repeated group in a pattern
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def is_adapter(directory: Path) -> bool:
    return (directory / SETTINGS).exists()


def base_name(directory: Path) -> str:
    """The name of the base in the settings, in brackets after a space; empty if there is none."""
    name = read_object(directory / SETTINGS).get("base_model_name_or_path")
    return f" ({name})" if name else ""


def without_peft(tensors: Tensors) -> Tensors:
    """The tensors by the names that they had before PEFT wrapped the model."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def with_adapter(base: Tensors, directory: Path, find: Callable[[str], str] = lambda name: name) -> Tensors:
    """The base with W + scale B A (Hu et al. 2021, section 4.1) for each W with an A and a B in the directory, and with
    the modules that the adapter replaces (`modules_to_save`).

    `find` maps a name in the adapted model to that in the base. Raises UserError for adapters of another kind or for
    another base.
    """
    where = str(directory / SETTINGS)
    settings = read_object(directory / SETTINGS)
    _require_supported(settings, where)
    tensors = without_peft(open_directory(directory, _FILES))
    pairs: dict[str, dict[str, StoredTensor]] = {}
    over: Tensors = {}
    for name in tensors:
        if match := _LORA.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = tensors[name]
        elif (found := find(name)) not in base:
            raise UserError(
                f"{where}: {name} is neither a LoRA matrix of a linear layer, nor in the base; only these are supported"
            )
        elif base[found].shape != tensors[name].shape:
            raise UserError(f"{where}: {name} is {base[found].shape} in the base, here {tensors[name].shape}")
        else:
            over[found] = tensors[name]
    _require_saved(settings, [name for name in tensors if not _LORA.fullmatch(name)], where)
    for module, sides in pairs.items():
        name = find(f"{module}.weight")
        if name not in base:
            raise UserError(f"{where}: adapts {name}, which the base does not have: it is for another model")
        if set(sides) != {"A", "B"}:
            raise UserError(f"{where}: of {name} it has lora_{next(iter(sides))} alone; copy the adapter again")
        rank, scale = _rank_and_scale(settings, module, where)
        down, up, shape = sides["A"], sides["B"], base[name].shape
        if len(shape) != 2 or (down.shape, up.shape) != ((rank, shape[1]), (shape[0], rank)):
            raise UserError(f"{where}: {name} is {shape} in the base, A is {down.shape}, B is {up.shape}")
        weight = over.get(name, base[name])
        over[name] = weight._replace(read=functools.partial(_adapted, weight, down, up, scale))
    return base | over


def _require_supported(settings: Json, where: str) -> None:
    for field, value in settings.items():
        if field not in _FREE and value not in (None, False, {}, [], _PLAIN.get(field)):
            raise UserError(f"{where}: {field} is {shown(value)}, which is not supported")
    if settings.get("init_lora_weights") not in _BASE_UNCHANGED:
        raise UserError(
            f"{where}: init_lora_weights is {shown(settings['init_lora_weights'])}, which changes the base: save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )


def _require_saved(settings: Json, names: list[str], where: str) -> None:
    """Raises UserError if a module of `modules_to_save` has no tensor."""
    modules = settings.get("modules_to_save") or []
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{where}: modules_to_save is {shown(modules)}, not names of modules")
    for module in modules:
        if not any(f".{module}." in f".{name}" for name in names):
            raise UserError(f"{where}: modules_to_save has {module}, of which it has no tensor: copy it again")


def _rank_and_scale(settings: Json, module: str, where: str) -> tuple[int, float]:
    rank = _by_pattern(settings, "rank_pattern", module, settings.get("r"), where)
    alpha = _by_pattern(settings, "alpha_pattern", module, settings.get("lora_alpha"), where)
    numbers = type(rank) is int and type(alpha) in (int, float)
    if not numbers or not 1 <= rank < 2**20 or not 0 <= abs(alpha) < 1e9:
        raise UserError(
            f"{where}: r is {shown(rank)} and lora_alpha is {shown(alpha)} for {module}; both have to be numbers"
        )
    return rank, alpha / (rank**0.5 if get(settings, "use_rslora", False, where) else rank)


def _by_pattern(settings: Json, field: str, module: str, default: Any, where: str) -> Any:
    """The value of the first pattern that matches the end of the module's name, as in PEFT."""
    for key, value in part(settings, field, where).items():
        if _REPEATED.search(key) or sum(map(key.count, "*+{")) > 2:  # matching some others would take forever
            raise UserError(f"{where}: {field} has {shown(key)}, a pattern with more repetitions than are supported")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise UserError(f"{where}: {field} has {shown(key)}, which is not a pattern: {error}") from None
    return default


def _adapted(weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float) -> np.ndarray:
    values = weight.read()
    update = up.read().astype(np.float32) @ down.read().astype(np.float32)
    return (values.astype(np.float32) + scale * update).astype(values.dtype)
