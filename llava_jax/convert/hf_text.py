"""Transformers' `config.json` of a decoder, and ours. What a family has besides LLaMA's is in models/families."""

import math

import jax
from flax import nnx

from llava_jax.cli import UserError, shown
from llava_jax.models.config import RopeScaling, TextConfig, require_multiple
from llava_jax.models.families import family_of
from llava_jax.models.hf_fields import Json, get, get_all, in_hf, in_words_of_hf, one_of, part, require
from llava_jax.models.llama import Llama
from llava_jax.models.registry import FAMILIES

# Fields of all decoders, with the defaults of transformers' LLaMA.
_FIELDS = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32}
_FIELDS |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
# Fields that change the computation, with the only value supported in any family: the first are written, too, the
# others are not, since no version of transformers has them in these models.
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
_UNKNOWN = {
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "original_max_position_embeddings": None,  # beside the rope's fields and not in them
    "quantization_config": None,
}
# rope_type -> what it needs besides theta.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_text(config: Json, where: str) -> TextConfig:
    """A decoder by itself. Raises UserError naming what is unsupported."""
    return text_part(config, where, tied=is_tied(config, where))


def is_tied(config: Json, where: str) -> bool:
    """Whether the `config.json` of a decoder says that its embeddings are tied."""
    family = FAMILIES[one_of(config, "model_type", FAMILIES, where)]
    return get(family.defaults | config, "tie_word_embeddings", False, where)


def text_part(config: Json, where: str, tied: bool) -> TextConfig:
    """The same for a part of a larger model, which says elsewhere whether embeddings are tied."""
    family = FAMILIES[one_of(config, "model_type", FAMILIES, where)]
    config = family.plain(family.defaults | config, where)
    require(config, _FIXED | _UNKNOWN | family.fixed, where)
    layer_types = get(config, "layer_types", [], where)
    if any(layer_type != "full_attention" for layer_type in layer_types):
        raise UserError(f"{where}: layer_types are {shown(layer_types)}; only 'full_attention' is supported")
    theta, scaling = _rope(config, where)
    with in_words_of_hf(where):
        fields = get_all(config, _FIELDS, where)
        width, heads = fields["hidden_size"], fields["num_heads"]
        if config.get("head_dim") is None:
            require_multiple("hidden_size", width, "num_heads", heads)
        fields |= get_all(config, {"num_kv_heads": heads, "head_dim": width // max(1, heads)}, where)
        fields |= {"rope_theta": theta, "rope_scaling": scaling, "tie_word_embeddings": tied}
        return family.config_class(**fields | family.read_fields(config, where))


def num_parameters(config: TextConfig) -> int:
    """How many numbers the matrices of a decoder have, counting the embeddings but not the vocabulary projection."""
    shapes = jax.tree.leaves(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)).layers))
    return config.hidden_size * config.vocab_size + sum(math.prod(leaf.shape) for leaf in shapes if len(leaf.shape) > 2)


def write_text(config: TextConfig, source: Json, dtype: str) -> Json:
    """The `text_config` of an export; `source` is the one that was imported."""
    family = family_of(config, source.get("model_type"))
    scaling = {}
    if config.rope_scaling is not None:
        kind = config.rope_scaling.kind
        scaling = {"rope_type": kind} | {field: getattr(config.rope_scaling, field) for field in _ROPE_FIELDS[kind]}
    return {
        "architectures": [family.hf_class],  # vLLM finds its decoder by it
        "model_type": family.name,
        **in_hf(config, (*_FIELDS, "num_kv_heads", "head_dim", "rope_theta", "tie_word_embeddings")),
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default"} | scaling | {"rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        **(_FIXED | family.fixed | family.write_fields(config)),
    }


def _rope(config: Json, where: str) -> tuple[float, RopeScaling | None]:
    """Theta of the rotary embedding and its scaling, from any of the places that versions of transformers use."""
    thetas = {"rope_theta": get(config, "rope_theta", 0.0, where)} if config.get("rope_theta") is not None else {}
    scalings = {}
    for field in ("rope_parameters", "rope_scaling"):
        if rope := part(config, field, where):
            scalings[field] = _scaling(rope, f"{where}: {field}")
        if rope.get("rope_theta") is not None:
            thetas[f"{field}.rope_theta"] = get(rope, "rope_theta", 0.0, f"{where}: {field}")
    for found in (thetas, scalings):
        if len(set(found.values())) > 1:
            contradiction = ", ".join(f"{key} is {value}" for key, value in found.items())
            raise UserError(f"{where}: contradicts itself: {contradiction}")
    return next(iter(thetas.values()), 10000.0), next(iter(scalings.values()), None)


def _scaling(rope: Json, where: str) -> RopeScaling | None:
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = one_of({"rope_type": rope.get("type", "default")} | rope, "rope_type", _ROPE_FIELDS, where)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_FIELDS[kind]}
    unknown = sorted(set(rope) - known)
    if unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
        named = ", ".join(unknown) or "partial_rotary_factor"
        raise UserError(f"{where} is {shown(rope)}; {named} is not supported with rope_type {kind!r}")
    missing = [field for field in _ROPE_FIELDS[kind] if rope.get(field) is None]
    if missing:
        raise UserError(f"{where} is {shown(rope)}; rope_type {kind!r} needs {', '.join(missing)}")
    if kind == "default":
        return None
    types = {"original_max_position_embeddings": 0}  # the others are floats
    with in_words_of_hf(where):
        return RopeScaling(kind, **{name: get(rope, name, types.get(name, 0.0), where) for name in _ROPE_FIELDS[kind]})
