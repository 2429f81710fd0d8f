"""config.json of decoders: read from what any version writes, refused by name."""

import copy

import pytest
import torch_reference as reference
import transformers

from llava_jax.cli import UserError
from llava_jax.convert.hf_text import read_text, write_text
from llava_jax.models.config import RopeScaling
from llava_jax.models.registry import FAMILIES

TEXT = {"model_type": "llama"}
LINEAR = {"type": "linear", "factor": 4}
# https://huggingface.co/meta-llama/Llama-3.1-8B
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Of published models, but for what is the same in all.
PUBLISHED = {
    # Llama-3.1-8B
    "llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "num_key_value_heads": 8, "vocab_size": 128256},
    # Mistral-7B-v0.1
    "mistral": {"sliding_window": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 8},
    # Qwen2-7B
    "qwen2": {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "rope_theta": 1000000.0},
    # Phi-3-mini-4k-instruct
    "phi3": {
        "sliding_window": 2047,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "resid_pdrop": 0.0,
        "attention_bias": False,
    },
    # gemma-3-270m
    "gemma3_text": {
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "_sliding_window_pattern": 6,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "query_pre_attn_scalar": 256,
    },
    # Qwen3-0.6B
    "qwen3": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_position_embeddings": 40960,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(family):
    expected = reference.text_config_of(transformers.AutoConfig.for_model(family))
    assert read_text({"model_type": family}, "") == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_published_fields_mean_what_they_do_to_transformers(family):
    fields = PUBLISHED[family]
    expected = reference.text_config_of(transformers.AutoConfig.for_model(family, **copy.deepcopy(fields)))
    assert read_text({"model_type": family} | fields, "") == expected


def test_what_tells_families_apart():
    found = {family: read_text({"model_type": family} | PUBLISHED[family], "") for family in PUBLISHED}
    llama, mistral, qwen2, qwen3, phi3 = (found[family] for family in ("llama", "mistral", "qwen2", "qwen3", "phi3"))
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    assert mistral.sliding_window == 4096
    assert qwen2.qkv_bias and qwen2.sliding_window is None
    assert (qwen3.family, qwen3.qkv_bias, qwen3.sliding_window, qwen3.head_dim) == ("qwen3", False, None, 128)
    assert (phi3.family, phi3.sliding_window) == ("phi3", 2047)
    gemma3 = found["gemma3_text"]
    assert (gemma3.global_every, gemma3.local_rope_theta, gemma3.tie_word_embeddings) == (6, 1e4, True)
    assert read_text({"model_type": "mistral", "sliding_window": None}, "").sliding_window is None  # v0.2


def test_head_width_need_not_follow_from_the_hidden_size():
    text = read_text(TEXT | {"hidden_size": 48, "num_attention_heads": 5, "head_dim": 16, "num_key_value_heads": 5}, "")
    assert text.head_dim == 16
    with pytest.raises(UserError, match="hidden_size 48 is not a multiple of num_attention_heads 5"):
        read_text(TEXT | {"hidden_size": 48, "num_attention_heads": 5}, "")


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": None}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
    ],
)
def test_rope_theta_from_wherever_it_is(fields):
    assert read_text(TEXT | fields, "").rope_theta == 5e5


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ],
    ids=["4", "5", "both"],
)
def test_rope_scaling_from_wherever_it_is(fields):
    text = read_text(TEXT | fields, "")
    assert (text.rope_theta, text.rope_scaling) == (5e5, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
    assert read_text(TEXT | {"rope_scaling": LINEAR}, "").rope_scaling == RopeScaling("linear", 4.0)  # Vicuna 16k


@pytest.mark.parametrize("name", reference.TEXTS)
def test_what_is_written_is_read_back(name):
    config = reference.TEXTS[name]
    written = write_text(config, {}, "float32")
    assert read_text(written, "") == config
    assert written["model_type"] == reference.torch_text_config(config).model_type
    assert (written["rope_scaling"] or {}).items() <= written["rope_parameters"].items()


def test_a_family_that_has_nothing_of_its_own_in_use_is_kept():
    source = {"model_type": "mistral", "sliding_window": None}
    assert write_text(read_text(source, ""), source, "float32")["model_type"] == "mistral"


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "linear", "factor": 0.0}},
        {"rope_scaling": LINEAR | {"mscale": 1.0}},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"original_max_position_embeddings": 4096},
        {"rope_interleaved": True},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"sliding_window": 4096},
        {"quantization_config": {"load_in_4bit": True}},
        {"num_key_value_heads": 5},
        {"vocab_size": "32000"},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"head_dim": 63},
        {"model_type": "gemma"},
        {"sliding_window": 0, "model_type": "mistral"},
        {"attention_bias": True, "model_type": "mistral"},
        {"use_sliding_window": True, "model_type": "qwen2"},
        {"use_sliding_window": True, "model_type": "qwen3"},
        {"attention_bias": True, "model_type": "qwen3"},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "model_type": "phi3"},
        {"partial_rotary_factor": 0.75, "model_type": "phi3"},
        {"resid_pdrop": 0.1, "model_type": "phi3"},
    ],
    ids=str,
)
def test_unsupported_decoders_are_refused_by_name(fields):
    with pytest.raises(UserError, match=f"^here: .*{next(iter(fields))}"):
        read_text(TEXT | fields, "here")
