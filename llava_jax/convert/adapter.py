"""Adapters of PEFT (LoRA): low-rank matrices to add to the weights of a base, and modules that replace its own.

An adapter is merged into the weights of its base (`with_adapter`), or becomes parameters beside them (`unmerged`), as
`models.lora` has them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax.cli import UserError, shown
from llava_jax.convert.layouts import ADAPTED, Place, Source, place_of
from llava_jax.convert.names import LORA, entries_of, to_ours
from llava_jax.convert.stored_tensor import NUMBERS, WEIGHTS, StoredTensor, Tensors
from llava_jax.convert.tensors import open_directory, open_files
from llava_jax.data.conversation import IMAGE_POSITIONS
from llava_jax.data.templates import TEMPLATES
from llava_jax.files.reading import read_object
from llava_jax.models.config import ASPECTS, LlavaConfig, LoraConfig, TextConfig
from llava_jax.models.families import family_of
from llava_jax.models.hf_fields import Json, get, one_of, part
from llava_jax.models.hf_names import TRANSPOSE, Entry
from llava_jax.models.llava import abstract_params
from llava_jax.models.lora import NOT_ADAPTED, is_target

SETTINGS = "adapter_config.json"
_FILES = (
    ("adapter_model.safetensors", "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
# A file of this project, which PEFT does not read: how prompts and images were made in training.
TRAINED_WITH = "llava_jax.json"
PADDING = 1024  # rows of a vocabulary by which imports and exports of one model may differ: tokens and padding
BESIDES = "non_lora_trainables.bin"  # in which the original LLaVA has the projector, trained whole
# Fields of adapter_config.json that are read here, or that do not change the sum (origin, training). Any other one has
# to be empty or have the value in _PLAIN.
_FREE = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"}
_FREE |= {"init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_FREE |= {"lora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"}
_FREE |= {"peft_version"}
_FREE |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # options of init_lora_weights
_FREE |= {"megatron_config", "megatron_core", "qalora_group_size"}
_PLAIN = {"peft_type": "LORA", "bias": "none"}
# Values of init_lora_weights with which the base stays unchanged. Others (PiSSA, OLoRA, CorDA, LoftQ) subtract the
# initial A and B from it, so that the adapter belongs to a base that was not saved.
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal")
_REPEATED = re.compile(r"\)[*+?{]")  # a repeated group in a pattern
_MATRIX = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")


class TrainedWith(NamedTuple):
    """How prompts and images were made in training: names of a template and of settings of `LlavaConfig`."""

    template: str
    image_position: str
    image_aspect: str


def base_fields(config: TextConfig) -> Json:
    """The fields of a decoder in which the base of an adapter has to agree, as JSON has them."""
    values = dataclasses.asdict(config) | {"family": family_of(config).name}
    return {name: value for name, value in values.items() if name != "max_position_embeddings"}


class Adapter(NamedTuple):
    """An adapter on disk, whose settings are supported and whose tensors have not been read yet."""

    directory: Path
    settings: Json
    layers: dict[str, Tensors]  # name of a linear layer in the adapted model -> tensors by PEFT's name, as `lora_A`
    others: Tensors  # that replace those of the base
    besides: Tensors  # the same in another file

    @property
    def where(self) -> str:
        return str(self.directory / SETTINGS)


def is_adapter(directory: Path) -> bool:
    """Raises UserError for an adapter's weights without its settings."""
    found, (weights, *_) = (directory / SETTINGS).exists(), _FILES[0]
    if not found and (directory / weights).exists():
        raise UserError(f"{directory}: has {weights}, but no {SETTINGS}: copy the adapter again")
    return found


def trained_with(directory: Path) -> TrainedWith | None:
    """What an adapter that was exported here was trained with; None for those of others, which do not say it."""
    file = directory / TRAINED_WITH
    if not (is_adapter(directory) and file.exists()):
        return None
    known = {"template": TEMPLATES, "image_position": IMAGE_POSITIONS, "image_aspect": ASPECTS}
    found = read_object(file)
    if unknown := found.keys() - known - {"base"}:
        raise UserError(f"{file}: {shown(min(unknown))} is no field that is known: {', '.join(known)}, base")
    return TrainedWith(*(one_of(found, field, values, str(file)) for field, values in known.items()))


def require_base(directory: Path, config: LlavaConfig) -> None:
    """Raises UserError for an adapter that was exported here and trained on a model that computes something else, even
    if all shapes are equal."""
    if (file := directory / TRAINED_WITH).exists():
        trained, here = read_object(file), json.loads(json.dumps(base_fields(config.text)))
        stated, aspect = part(trained, "base", str(file)), trained.get("image_aspect")
        if "anyres" in (aspect, config.image_aspect):  # how others become squares is not the base's
            stated, here = stated | {"image_aspect": aspect}, here | {"image_aspect": config.image_aspect}
        for name, value in stated.items():
            if name == "vocab_size" and isinstance(value, int) and abs(value - here[name]) < PADDING:
                continue
            if value != here.get(name, value):
                raise UserError(f"{file}: is for another base: its {name} is {value}, that of the model {here[name]}")


def base_name(directory: Path) -> str:
    """The name of the base in the settings, in brackets after a space; empty if there is none."""
    name = read_object(directory / SETTINGS).get("base_model_name_or_path")
    return f" ({name})" if name else ""


def without_peft(tensors: Tensors) -> Tensors:
    """The tensors by the names that they had before PEFT wrapped the model and, with `base_layer`, adapted layers."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor for name, tensor in tensors.items()
    }


def open_adapter(directory: Path, without_layers: bool = False) -> Adapter:
    """Raises UserError for an adapter of another kind, and for one that is damaged.

    With `without_layers` it has only what replaces tensors of the base.
    """
    where, settings = str(directory / SETTINGS), read_object(directory / SETTINGS)
    _require_supported(settings, where)
    layers: dict[str, Tensors] = {}
    others: Tensors = {}
    for name, tensor in without_peft(open_directory(directory, _FILES)).items():
        if tensor.dtype not in WEIGHTS:
            raise UserError(f"{where}: {name} is {tensor.dtype}, not {', '.join(WEIGHTS)}")
        if match := _MATRIX.fullmatch(name):
            held = layers.setdefault(match["module"], {})
            if match["kind"] in held:
                raise UserError(f"{where}: has {match['kind']} of {match['module']} twice")
            held[match["kind"]] = tensor
        else:
            others[name] = tensor
    _require_saved(settings, others, where)
    kinds = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.get("use_dora") else set())
    for module, tensors in layers.items():
        if set(tensors) != kinds:
            raise UserError(
                f"{where}: of {module} it has {' and '.join(sorted(tensors))}, not {' and '.join(sorted(kinds))}; "
                "copy the adapter again"
            )
    besides = without_peft(open_files([directory / BESIDES])) if (directory / BESIDES).exists() else {}
    return Adapter(directory, settings, {} if without_layers else layers, others, besides)


# ------------------------------------------------------------------------------------------------ merged into the base


def with_adapter(base: Tensors, adapter: Adapter, find: Callable[[str], str] = lambda name: name) -> Tensors:
    """The base with W + scale B A (Hu et al. 2021, section 4.1) for each W with an A and a B in the adapter, and with
    the modules that the adapter replaces.

    `find` maps a name in the adapted model to that in the base. Raises UserError for an adapter of another base.
    """
    over: Tensors = {}
    for name, tensor in adapter.others.items():
        if (found := find(name)) not in base:
            raise UserError(
                f"{adapter.where}: {name} is neither a LoRA matrix of a linear layer, nor in the base; only these are "
                "supported"
            )
        _require_shape(adapter, name, base[found].shape)
        over[found] = tensor
    for module, tensors in adapter.layers.items():
        name = find(f"{module}.weight")
        if name not in base:
            raise UserError(f"{adapter.where}: adapts {name}, which the base does not have: it is for another model")
        _require_fit(adapter, module, base[name].shape)
        weight = over.get(name, base[name])
        over[name] = weight._replace(read=functools.partial(_adapted, weight, tensors, _lora(adapter, module).scale))
    return base | over | adapter.besides


def _adapted(weight: StoredTensor, adapter: Tensors, scale: float) -> np.ndarray:
    matrices = {name: tensor.read().astype(np.float32) for name, tensor in adapter.items()}
    values = weight.read()
    total = values.astype(np.float32) + scale * (matrices["lora_B"] @ matrices["lora_A"])
    if "lora_magnitude_vector" in matrices:  # DoRA
        total *= (matrices["lora_magnitude_vector"] / np.sqrt(np.square(total).sum(1)))[:, None]
    return total.astype(values.dtype)


# --------------------------------------------------------------------------------------------------- beside the weights


def read_adapter(directory: Path, config: LlavaConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter for a model without one: its configuration, and the parameters that it adds (`models.lora`) or has
    instead of the model's, in their stored types. Raises UserError as `unmerged` does."""
    adapter = open_adapter(directory)
    lora, tensors = unmerged(adapter, config)
    source = Source({}, ADAPTED).replaced(tensors)
    params = {}
    for part_name, entries in entries_of(dataclasses.replace(config, lora=lora)).items():
        for entry in entries:
            absent = [leaf for leaf in entry.leaves() if (part_name, leaf) not in source]
            if not absent:
                params[entry.name] = to_ours(entry, functools.partial(source.get, part_name))
            elif len(absent) < len(entry.leaves()):
                raise UserError(f"{adapter.where}: replaces {entry.name} in some layers only; {_merge_it(adapter)}")
    return lora, params


def unmerged(adapter: Adapter, config: LlavaConfig) -> tuple[LoraConfig, dict[Place, StoredTensor]]:
    """An adapter for a model without one: its configuration, and all its tensors.

    Layers of a stack that it does not adapt get matrices of zeros. Raises UserError for an adapter of another model,
    or with layers that are adapted differently.
    """
    require_base(adapter.directory, config)
    config = dataclasses.replace(config, base_dtype="")  # quantized or not, its linear layers have the same shapes
    shapes, places = abstract_params(config), {}
    for part_name, entries in entries_of(config).items():
        places |= {(part_name, leaf): entry for entry in entries for leaf in entry.leaves()}
    held: dict[Place, StoredTensor] = {}
    for name, tensor in (adapter.others | adapter.besides).items():
        place = place_of(name, ADAPTED)
        if config.projector_type == "linear" and _is_identity(place, tensor):
            continue
        if place not in places:
            raise UserError(f"{adapter.where}: {name} is neither a LoRA matrix of a linear layer, nor in the model")
        if place in held:
            raise UserError(f"{adapter.where}: has {name} twice, under two names")
        _require_shape(adapter, name, places[place].hf_shape(shapes[places[place].name].shape))
        held[place] = tensor

    modules: dict[tuple[str, Entry], dict[str, Tensors]] = {}  # of each stack, by leaf name
    for module in adapter.layers:
        place = place_of(f"{module}.weight", ADAPTED)
        if module.rpartition(".")[2] in family_of(config.text).fused(config.text):
            raise UserError(f"{adapter.where}: adapts {module}, which is several layers here; {_merge_it(adapter)}")
        if place not in places:
            raise UserError(f"{adapter.where}: adapts {module}, which the model does not have: it is for another model")
        entry = places[place]
        if not _is_linear(entry):
            raise UserError(f"{adapter.where}: adapts {module}, which works in the weights only; {_merge_it(adapter)}")
        _require_fit(adapter, module, entry.hf_shape(shapes[entry.name].shape))
        modules.setdefault((place[0], entry), {})[place[1]] = adapter.layers[module]
    lora = _common_lora(adapter, config, {entry.name for _, entry in modules})
    for (part_name, entry), by_leaf in modules.items():
        like = next(iter(by_leaf.values()))
        for leaf in entry.leaves():
            if leaf not in by_leaf and lora.dora:
                raise UserError(f"{adapter.where}: use_dora, but only some layers are adapted; {_merge_it(adapter)}")
            tensors = by_leaf.get(leaf) or {name: _zeros(tensor) for name, tensor in like.items()}
            for name, _ in LORA.values():
                if (kind := name.removesuffix(".weight")) in tensors:
                    held[part_name, f"{leaf.removesuffix('.weight')}.{name}"] = tensors[kind]
    return lora, held


def _zeros(like: StoredTensor) -> StoredTensor:
    return like._replace(read=lambda: np.zeros(like.shape, NUMBERS[like.dtype]))


def _is_identity(place: Place | None, tensor: StoredTensor) -> bool:
    """Whether this is of the second layer that transformers has in a linear projector."""
    if place not in (("projector", "linear_2.weight"), ("projector", "linear_2.bias")):
        return False
    values = tensor.read()
    return np.array_equal(values, np.eye(len(values)) if values.ndim == 2 else np.zeros(len(values)))


def _is_linear(entry: Entry) -> bool:
    layer = entry.name.removesuffix(".kernel")
    return entry.transform == TRANSPOSE and layer != entry.name and layer not in NOT_ADAPTED


def _common_lora(adapter: Adapter, config: LlavaConfig, kernels: set[str]) -> LoraConfig:
    """The configuration that all adapted layers have, and patterns of just these."""
    found = {_lora(adapter, module): module for module in reversed(adapter.layers)}  # the first module of each
    if not found:
        raise UserError(f"{adapter.where}: adapts no layer")
    if len(found) > 1:
        values = "; ".join(f"{lora.rank} and {lora.alpha:g} of {module}" for lora, module in [*found.items()][:2])
        raise UserError(f"{adapter.where}: r and lora_alpha differ ({values}); {_merge_it(adapter)}")
    linear = [entry.name for entries in entries_of(config).values() for entry in entries if _is_linear(entry)]
    layers, adapted = ([name.removesuffix(".kernel") for name in linear if name in of] for of in (linear, kernels))
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in adapted))
    if [name for name in layers if is_target(name, targets)] != adapted:
        targets = tuple(adapted)
    return dataclasses.replace(next(iter(found)), targets=targets)


def _merge_it(adapter: Adapter) -> str:
    return f"import it merged: python -m llava_jax.convert import --llava {adapter.directory} --base DIR"


# ------------------------------------------------------------------------------------------------------------- settings


def _lora(adapter: Adapter, module: str) -> LoraConfig:
    """How a layer is adapted, without targets."""
    settings, where = adapter.settings, adapter.where
    rank = _by_pattern(settings, "rank_pattern", module, settings.get("r"), where)
    alpha = _by_pattern(settings, "alpha_pattern", module, settings.get("lora_alpha"), where)
    try:
        return LoraConfig(
            rank,
            alpha,
            targets=(),
            rslora=get(settings, "use_rslora", False, where),
            dora=get(settings, "use_dora", False, where),
            dropout=get(settings, "lora_dropout", 0.0, where),
        )
    except ValueError as error:
        words = str(error).replace("rank is", "r is").replace("alpha is", "lora_alpha is")
        raise UserError(f"{where}: {words}, for {module}") from None


def _require_fit(adapter: Adapter, module: str, shape: tuple[int, ...]) -> None:
    """Raises UserError unless the matrices of a layer fit its weight of this shape."""
    rank, matrices = _lora(adapter, module).rank, adapter.layers[module]
    outputs, inputs = shape if len(shape) == 2 else (None, None)  # a linear layer's
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_magnitude_vector": (outputs,)}
    if any(tensor.shape != wanted[kind] for kind, tensor in matrices.items()):
        found = ", ".join(f"{kind} is {tensor.shape}" for kind, tensor in matrices.items())
        raise UserError(f"{adapter.where}: {module}.weight is {shape} in the base, r is {rank}, {found}")


def _require_shape(adapter: Adapter, name: str, shape: tuple[int, ...]) -> None:
    found = (adapter.others | adapter.besides)[name].shape
    if found != shape:
        raise UserError(f"{adapter.where}: {name} is {shape} in the base, here {found}")


def _require_supported(settings: Json, where: str) -> None:
    for field, value in settings.items():
        if field not in _FREE and value not in (None, False, {}, [], _PLAIN.get(field)):
            raise UserError(f"{where}: {field} is {shown(value)}, which is not supported")
    if settings.get("init_lora_weights") not in _BASE_UNCHANGED:
        raise UserError(
            f"{where}: init_lora_weights is {shown(settings['init_lora_weights'])}, which changes the base: save the "
            "adapter again with PEFT's path_initial_model_for_weight_conversion"
        )


def _require_saved(settings: Json, names: Iterable[str], where: str) -> None:
    """Raises UserError if a module of `modules_to_save` has no tensor."""
    modules = settings.get("modules_to_save") or []
    modules = [modules] if isinstance(modules, str) else modules
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise UserError(f"{where}: modules_to_save is {shown(modules)}, not names of modules")
    for module in modules:
        if not any(f".{module}." in f".{name}" for name in names):
            raise UserError(f"{where}: modules_to_save has {module}, of which it has no tensor: copy it again")


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
