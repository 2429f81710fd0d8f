"""Models that are stored as what is to be added to another: adapters of PEFT, differences from a base, rows of tokens.

Sums are taken when a tensor is read, so that there is one at a time.
"""

import functools
import re

import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.hf_fields import Json
from llava_jax.convert.stored_tensor import StoredTensor
from llava_jax.convert.tensors import Tensors

# Fields of adapter_config.json that are read here or change nothing of what is added: where it came from, how it was
# trained. Any other has to be empty, or to have the value below.
_ADAPTER_FREE = {"r", "lora_alpha", "use_rslora", "init_lora_weights"}
_ADAPTER_FREE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"}
_ADAPTER_FREE |= {"base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"}
_ADAPTER_FREE |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # of what init_lora_weights names
_ADAPTER_FREE |= {"megatron_config", "megatron_core", "qalora_group_size"}
_ADAPTER_PLAIN = {"peft_type": "LORA", "bias": "none"}
# Values of init_lora_weights with which the base stays as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) take from it what
# A and B begin with, so that these belong to a base that nobody stored.
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
FINAL_NORM = "model.norm.weight"
_NO_NORM = 0.1  # the final norm of a decoder multiplies by about one, a difference of two by about zero


def with_adapter(base: Tensors, adapter: Tensors, settings: Json, where: str) -> Tensors:
    """W + scale B A (Hu et al. 2021, section 4.1) in the place of each W that has an A and a B.

    Args:
      base: with the names of transformers.
      adapter: the same names without `.weight`, and `.lora_A.weight` or `.lora_B.weight` after them.
      settings: its adapter_config.json, which is found at `where`.

    Raises UserError for adapters of another kind or for another base.
    """
    for field, value in settings.items():
        if field not in _ADAPTER_FREE and value not in (None, False, {}, [], _ADAPTER_PLAIN.get(field)):
            raise UserError(f"{where}: {field} is {value!r}, which is not supported")
    if settings.get("init_lora_weights") not in _BASE_UNCHANGED:
        raise UserError(
            f"{where}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the base: save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{where}: r is {rank!r} and lora_alpha is {alpha!r}; both have to be numbers")
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)

    sides: dict[str, dict[str, StoredTensor]] = {}
    for name in adapter.names:
        match = _LORA.fullmatch(name)
        if not match:
            raise UserError(f"{where}: {name} is no LoRA matrix of a linear layer; only these are supported")
        sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = adapter[name]
    adapted = {}
    for name, pair in sides.items():
        if name not in base:
            raise UserError(f"{where}: adapts {name}, which the base does not have: it is for another model")
        if set(pair) != {"A", "B"}:
            raise UserError(f"{where}: of {name} it has lora_{next(iter(pair))} alone; copy the adapter again")
        down, up = pair["A"], pair["B"]
        expected = {(rank, base.shape(name)[-1]): down, (base.shape(name)[0], rank): up}
        if any(tensor.shape != shape for shape, tensor in expected.items()):
            raise UserError(f"{where}: {name} is {base.shape(name)} in the base, A is {down.shape}, B is {up.shape}")
        adapted[name] = base[name]._replace(read=functools.partial(_adapted, base[name], down, up, scale))
    return overlaid(base, Tensors(adapted))


def is_difference(tensors: Tensors) -> bool:
    """Whether a decoder is stored as its difference from another."""
    return FINAL_NORM in tensors and bool(np.abs(tensors.get(FINAL_NORM).astype(np.float32)).max() < _NO_NORM)


def with_base(difference: Tensors, base: Tensors, where: str) -> Tensors:
    """Adds the base to each tensor that it has too, in the difference's type: of more rows to the first ones.

    Raises UserError where they do not fit.
    """
    held = {name: difference[name] for name in difference.names}
    for name in base.names:
        if name not in difference:
            continue
        ours, theirs = difference.shape(name), base.shape(name)
        if ours[1:] != theirs[1:] or ours[0] < theirs[0]:
            raise UserError(f"{where}: {name} is {ours}, of the base {theirs}: it is for another model")
        held[name] = held[name]._replace(read=functools.partial(_summed, difference[name], base[name]))
    return Tensors(held)


def overlaid(base: Tensors, over: Tensors) -> Tensors:
    """All tensors of both; where both have one, that of `over`."""
    return Tensors({name: base[name] for name in base.names} | {name: over[name] for name in over.names})


def with_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """Its first rows, or all of them and further ones: the mean of those that it has, since a row of zeros can win."""
    return tensor._replace(shape=(rows, *tensor.shape[1:]), read=functools.partial(_resized, tensor, rows))


def concatenated(first: StoredTensor, second: StoredTensor) -> StoredTensor:
    """The rows of both, in the type of the first."""
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])

    def read() -> np.ndarray:
        values = first.read()
        return np.concatenate([values, second.read().astype(values.dtype)])

    return first._replace(shape=shape, read=read)


def _adapted(weight: StoredTensor, down: StoredTensor, up: StoredTensor, scale: float) -> np.ndarray:
    values = weight.read()
    update = up.read().astype(np.float32) @ down.read().astype(np.float32)
    return (values.astype(np.float32) + scale * update).astype(values.dtype)


def _summed(difference: StoredTensor, base: StoredTensor) -> np.ndarray:
    values = np.array(difference.read())
    added = base.read().astype(values.dtype)
    values[: len(added)] += added
    return values


def _resized(tensor: StoredTensor, rows: int) -> np.ndarray:
    values = tensor.read()
    if rows <= len(values):
        return values[:rows]
    mean = values.mean(axis=0, keepdims=True, dtype=np.float32).astype(values.dtype)
    return np.concatenate([values, np.repeat(mean, rows - len(values), axis=0)])
