"""Hugging Face's `config.json` of CLIP, LLaMA and LLaVA, and ours.

Absent fields have transformers' defaults. A field that changes the mathematics and that the models here do not have
is refused by name; all others (dropout of initialisation, token ids, ...) pass through to an export unread.

What transformers 4.51 ... 5.23 writes in different places is read from any of them and written to all: RoPE's theta
(`rope_theta`, `rope_parameters`), types (`torch_dtype`, `dtype`) and tying (at the top and in `text_config`; some
versions read one, some the other). A file by transformers 5 alone, with theta in `rope_parameters` only, would be
read as 10000 by transformers 4.
"""

from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.models.clip import ACTIVATIONS
from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig

Json = dict[str, Any]

# The vision_config of a LLaVA that has none.
_LLAVA_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SELECT_FEATURE = {"default": "patch", "full": "cls_patch"}  # vision_feature_select_strategy

# Fields that say how the model computes, with the only value supported.
_VISION_FIXED = {"num_channels": 3, "attention_dropout": 0.0}
_TEXT_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "quantization_config": None,
}
_LLAVA_FIXED = {"multimodal_projector_bias": True, "quantization_config": None}
# Fields about the file and not about the model.
_NOT_KEPT = ("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


class LlavaSource(NamedTuple):
    """What a LLaVA's `config.json` says."""

    vision: VisionConfig
    text: TextConfig
    select_layer: int
    select_feature: str
    image_token_index: int  # marks positions of images
    linear_projector: bool  # no activation between the two layers of the projector
    im_start_end: bool


def read_vision(config: Json, where: str) -> VisionConfig:
    """The vision tower of a `clip_vision_model` or of a whole `clip`. Raises UserError naming what is unsupported."""
    return _vision(clip_vision_json(config, where), where)


def clip_vision_json(config: Json, where: str) -> Json:
    """The part of a CLIP's `config.json` that describes its vision tower."""
    model_type = config.get("model_type")
    if model_type == "clip":
        # Files of before 2023 say it twice; transformers lets the second have the last word.
        return {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    if model_type != "clip_vision_model":
        raise UserError(f"{where}: model_type is {model_type!r}; a vision tower is 'clip' or 'clip_vision_model'")
    return config


def read_text(config: Json, where: str) -> TextConfig:
    """The decoder of a `llama`. Raises UserError naming what is unsupported."""
    if config.get("model_type") != "llama":
        raise UserError(
            f"{where}: model_type is {config.get('model_type')!r}; of language models only 'llama' is known"
        )
    return _text(config, where, tied=bool(config.get("tie_word_embeddings", False)))


def read_llava(config: Json, where: str) -> LlavaSource:
    """A whole `llava`, however sparse. Raises UserError naming what is unsupported."""
    if config.get("model_type") != "llava":
        raise UserError(f"{where}: model_type is {config.get('model_type')!r}, not 'llava'")
    _require(config, _LLAVA_FIXED, where)
    vision, text = config.get("vision_config"), config.get("text_config") or {}
    vision = _LLAVA_VISION if vision is None else vision
    for name, part, known in (("vision", vision, "clip_vision_model"), ("text", text, "llama")):
        if part.get("model_type", known) != known:
            raise UserError(f"{where}: model_type of {name}_config is {part['model_type']!r}; only {known!r} is known")
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in _SELECT_FEATURE:
        raise UserError(f"{where}: vision_feature_select_strategy is {strategy!r}, not 'default' or 'full'")
    activation = config.get("projector_hidden_act", "gelu")
    if activation not in ("gelu", "linear"):
        raise UserError(f"{where}: projector_hidden_act is {activation!r}, not 'gelu' or 'linear'")
    return LlavaSource(
        vision=_vision(vision, f"{where}, vision_config"),
        text=_text(text, f"{where}, text_config", tied=_is_tied(config, text)),
        select_layer=_get(config, "vision_feature_layer", -2, where),
        select_feature=_SELECT_FEATURE[strategy],
        image_token_index=_get(config, "image_token_index", _get(config, "image_token_id", 32000, where), where),
        linear_projector=activation == "linear",
        im_start_end=_get(config, "mm_use_im_start_end", False, where),
    )


def write_llava(config: LlavaConfig, source: Json, image_token_index: int, dtype: str) -> Json:
    """The `config.json` of an export, which transformers 4.51 ... 5.23 all read alike.

    Args:
      config: the model.
      source: the `config.json` that was imported, in the form of a LLaVA's: its other fields are kept.
      image_token_index: the id under which the processor marks image positions.
      dtype: the type to load the weights in, as 'float16'.
    """
    linear = config.projector_type == "linear"
    return _kept(source) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": _kept(source.get("text_config") or {}) | _text_json(config.text, dtype),
        "vision_config": _kept(source.get("vision_config") or {}) | _vision_json(config.vision, dtype),
        "image_token_index": image_token_index,
        "image_seq_length": config.image_tokens,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default" if config.select_feature == "patch" else "full",
        "projector_hidden_act": "linear" if linear else "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _vision(config: Json, where: str) -> VisionConfig:
    _require(config, _VISION_FIXED, where)
    vision = VisionConfig(
        hidden_size=_get(config, "hidden_size", 768, where),
        intermediate_size=_get(config, "intermediate_size", 3072, where),
        num_layers=_get(config, "num_hidden_layers", 12, where),
        num_heads=_get(config, "num_attention_heads", 12, where),
        image_size=_get(config, "image_size", 224, where),
        patch_size=_get(config, "patch_size", 32, where),
        layer_norm_eps=_get(config, "layer_norm_eps", 1e-5, where),
        hidden_act=_get(config, "hidden_act", "quick_gelu", where),
        projection_dim=_get(config, "projection_dim", 512, where),
    )
    if vision.hidden_act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {vision.hidden_act!r}; supported are {', '.join(ACTIVATIONS)}")
    _require_multiple(where, "image_size", vision.image_size, "patch_size", vision.patch_size)
    _require_multiple(where, "hidden_size", vision.hidden_size, "num_attention_heads", vision.num_heads)
    return vision


def _vision_json(config: VisionConfig, dtype: str) -> Json:
    return _VISION_FIXED | {
        "model_type": "clip_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.hidden_act,
        "projection_dim": config.projection_dim,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _text(config: Json, where: str, tied: bool) -> TextConfig:
    _require(config, _TEXT_FIXED, where)
    hidden_size = _get(config, "hidden_size", 4096, where)
    num_heads = _get(config, "num_attention_heads", 32, where)
    if config.get("head_dim") is None:
        _require_multiple(where, "hidden_size", hidden_size, "num_attention_heads", num_heads)
    text = TextConfig(
        vocab_size=_get(config, "vocab_size", 32000, where),
        hidden_size=hidden_size,
        intermediate_size=_get(config, "intermediate_size", 11008, where),
        num_layers=_get(config, "num_hidden_layers", 32, where),
        num_heads=num_heads,
        num_kv_heads=_get(config, "num_key_value_heads", num_heads, where),
        head_dim=_get(config, "head_dim", hidden_size // num_heads, where),
        rope_theta=_rope_theta(config, where),
        rms_norm_eps=_get(config, "rms_norm_eps", 1e-6, where),
        tie_word_embeddings=tied,
        max_position_embeddings=_get(config, "max_position_embeddings", 2048, where),
    )
    _require_multiple(where, "num_attention_heads", num_heads, "num_key_value_heads", text.num_kv_heads)
    return text


def _text_json(config: TextConfig, dtype: str) -> Json:
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _rope_theta(config: Json, where: str) -> float:
    """The base of the rotary embedding, from wherever a version of transformers keeps it."""
    thetas = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0 or _is_nested(rope):
            raise UserError(f"{where}: {field} is {rope}; only rope_type 'default' is supported")
        if rope.get("rope_theta") is not None:
            thetas[f"{field}.rope_theta"] = rope["rope_theta"]
    if len(set(thetas.values())) > 1:
        raise UserError(
            f"{where}: contradicts itself: " + ", ".join(f"{key} is {value}" for key, value in thetas.items())
        )
    return float(next(iter(thetas.values()), 10000.0))


def _is_nested(rope: Json) -> bool:
    """Whether the parameters differ by kind of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def _is_tied(config: Json, text: Json) -> bool:
    return bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))


def _get(config: Json, field: str, default: Any, where: str) -> Any:
    """The field, which is of the default's type (an integer will do for a float), or the default if absent or null."""
    value = config.get(field)
    if value is None:
        return default
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{where}: {field} is {value!r}; only one {type(default).__name__} is supported")
    return value


def _require(config: Json, fixed: Json, where: str) -> None:
    for field, value in fixed.items():
        if config.get(field) not in (None, value):
            raise UserError(f"{where}: {field} is {config[field]!r}; only {value!r} is supported")


def _require_multiple(where: str, name: str, value: int, of_name: str, of: int) -> None:
    if of <= 0 or value % of:
        raise UserError(f"{where}: {name} {value} is not a multiple of {of_name} {of}")


def _kept(config: Json) -> Json:
    return {field: value for field, value in config.items() if field not in _NOT_KEPT}
