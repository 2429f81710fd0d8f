"""Adapters of PEFT: low-rank matrices to add to the weights of a base, and what was trained whole beside them."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.cli import UserError, shown
from llava_jax.convert.stored_tensor import StoredTensor
from llava_jax.convert.sums import overlaid
from llava_jax.convert.tensors import Tensors, open_directory
from llava_jax.files.reading import read_object
from llava_jax.models.hf_fields import Json, get, part

SETTINGS = "adapter_config.json"
_FILES = (
    ("adapter_model.safetensors", "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
# Fields of adapter_config.json that are read here or change nothing of what is added: where it came from, how it was
# trained. Any other has to be empty, or to have the value below.
_FREE = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights"}
_FREE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"}
_FREE |= {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"}
_FREE |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # of what init_lora_weights names
_FREE |= {"megatron_config", "megatron_core", "qalora_group_size"}
_PLAIN = {"peft_type": "LORA", "bias": "none"}
# Values of init_lora_weights with which the base stays as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) take from it what
# A and B begin with, so that these belong to a base that nobody stored.
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")
_REPEATED = re.compile(r"\)[*+?{]")  # of a pattern: a group that comes more than once
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def is_adapter(directory: Path) -> bool:
    return (directory / SETTINGS).exists()


def base_name(directory: Path) -> str:
    """What its settings call the base, in brackets after a space; empty where they do not."""
    name = read_object(directory / SETTINGS).get("base_model_name_or_path")
    return f" ({name})" if name else ""


def without_peft(tensors: Tensors) -> Tensors:
    """Names as they were before PEFT wrapped the model."""
    return Tensors({name.removeprefix("base_model.model."): tensors[name] for name in tensors.names})


def with_adapter(base: Tensors, directory: Path, find: Callable[[str], str] = lambda name: name) -> Tensors:
    """W + scale B A (Hu et al. 2021, section 4.1) in the place of each W that has an A and a B in the directory, and
    what it holds whole (`modules_to_save`) in the place of what the base has.

    `find` gives the base's name of what the model that was adapted called by a name. Raises UserError for adapters of
    another kind or for another base.
    """
    where = str(directory / SETTINGS)
    settings = read_object(directory / SETTINGS)
    _require_supported(settings, where)
    tensors = without_peft(open_directory(directory, _FILES))
    pairs: dict[str, dict[str, StoredTensor]] = {}
    over: dict[str, StoredTensor] = {}
    for name in tensors.names:
        if match := _LORA.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = tensors[name]
        elif (found := find(name)) not in base:
            raise UserError(
                f"{where}: {name} is neither a LoRA matrix of a linear layer, nor in the base; only these are supported"
            )
        elif base.shape(found) != tensors.shape(name):
            raise UserError(f"{where}: {name} is {base.shape(found)} in the base, here {tensors.shape(name)}")
        else:
            over[found] = tensors[name]
    _require_saved(settings, [name for name in tensors.names if not _LORA.fullmatch(name)], where)
    for module, sides in pairs.items():
        name = find(f"{module}.weight")
        if name not in base:
            raise UserError(f"{where}: adapts {name}, which the base does not have: it is for another model")
        if set(sides) != {"A", "B"}:
            raise UserError(f"{where}: of {name} it has lora_{next(iter(sides))} alone; copy the adapter again")
        rank, scale = _rank_and_scale(settings, module, where)
        down, up = sides["A"], sides["B"]
        if len(base.shape(name)) != 2 or (down.shape, up.shape) != (
            (rank, base.shape(name)[1]),
            (base.shape(name)[0], rank),
        ):
            raise UserError(f"{where}: {name} is {base.shape(name)} in the base, A is {down.shape}, B is {up.shape}")
        weight = over.get(name, base[name])
        over[name] = weight._replace(read=functools.partial(_adapted, weight, down, up, scale))
    return overlaid(base, Tensors(over))


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
    """Raises UserError where a module that was trained whole is not there."""
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
    """The value of the first pattern that is the end of the module's name, as PEFT has it."""
    for key, value in part(settings, field, where).items():
        if _REPEATED.search(key) or sum(map(key.count, "*+{")) > 2:  # some others take for ever
            raise UserError(f"{where}: {field} has {shown(key)}, a pattern with more repetitions than are supported")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise UserError(f"{where}: {field} has {shown(key)}, which is no pattern: {error}") from None
    return default


def _adapted(weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float) -> np.ndarray:
    values = weight.read()
    update = up.read().astype(np.float32) @ down.read().astype(np.float32)
    return (values.astype(np.float32) + scale * update).astype(values.dtype)
