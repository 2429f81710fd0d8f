"""config.json of Hugging Face: read from what any version writes, written for all of them, refused by name."""

import dataclasses
import json

import pytest
import torch_reference as reference
import transformers

from llava_jax.cli import UserError
from llava_jax.convert.hf_config import read_llava, read_text, read_vision, write_llava
from llava_jax.models.config import PRESETS

# https://huggingface.co/llava-hf/llava-1.5-7b-hf
LLAVA_1_5_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
TEXT = {"model_type": "llama"}
VISION = {"model_type": "clip_vision_model"}


def test_published_llava():
    found = read_llava(LLAVA_1_5_7B, "config.json")
    expected = PRESETS["llava-v1.5-7b"]
    assert found.vision == expected.vision
    assert found.text == dataclasses.replace(expected.text, vocab_size=32064)
    assert (found.select_layer, found.select_feature, found.linear_projector) == (-2, "patch", False)


def test_absent_fields_have_the_defaults_of_transformers():
    assert read_text(TEXT, "") == text_config(transformers.LlamaConfig())
    assert read_vision(VISION, "") == vision_config(transformers.CLIPVisionConfig())
    found, expected = read_llava({"model_type": "llava"}, ""), transformers.LlavaConfig()
    assert found.text == text_config(expected.text_config)
    assert found.vision == vision_config(expected.vision_config)


def test_head_width_need_not_follow_from_the_hidden_size():
    text = read_text(TEXT | {"hidden_size": 48, "num_attention_heads": 5, "head_dim": 16, "num_key_value_heads": 5}, "")
    assert text.head_dim == 16
    with pytest.raises(UserError, match="hidden_size 48 is not a multiple of num_attention_heads 5"):
        read_text(TEXT | {"hidden_size": 48, "num_attention_heads": 5}, "")


def test_vision_tower_of_a_whole_clip():
    whole = {"model_type": "clip", "vision_config": {"hidden_size": 64, "num_attention_heads": 4}}
    assert read_vision(whole, "").hidden_size == 64
    whole["vision_config_dict"] = {"hidden_size": 128}  # as old files say it again
    assert read_vision(whole, "").hidden_size == 128


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500000, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
    ],
)
def test_rope_theta_from_wherever_it_is(fields):
    assert read_text(TEXT | fields, "").rope_theta == 5e5


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
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
        {"model_type": "mistral"},
    ],
    ids=str,
)
def test_unsupported_decoders_are_refused_by_name(fields):
    with pytest.raises(UserError, match=f"^here: .*{next(iter(fields))}"):
        read_text(TEXT | fields, "here")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu_new"},
        {"image_size": 225},
        {"image_size": [224, 448]},
        {"num_channels": 1},
        {"attention_dropout": 0.1},
        {"num_attention_heads": 5},
        {"model_type": "siglip_vision_model"},
    ],
    ids=str,
)
def test_unsupported_towers_are_refused_by_name(fields):
    with pytest.raises(UserError, match=f"^here: .*{next(iter(fields))}"):
        read_vision(VISION | fields, "here")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "middle"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"text_config": {"model_type": "qwen2"}}, "text_config.*qwen2"),
        ({"text_config": {"model_type": "llama", "mlp_bias": True}}, "text_config: mlp_bias"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_config.*siglip"),
        ({"model_type": "llava_next"}, "llava_next"),
    ],
    ids=str,
)
def test_unsupported_llavas_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        read_llava({"model_type": "llava"} | fields, "here")


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_tied_if_either_place_says_so(place):
    config = {"model_type": "llava", "text_config": {}}
    (config if place == "top" else config["text_config"])["tie_word_embeddings"] = True
    assert read_llava(config, "").text.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projector_type": "linear", "select_layer": 3, "select_feature": "cls_patch"},
        {"text": dataclasses.replace(reference.TEXT, tie_word_embeddings=True, head_dim=12, rms_norm_eps=1e-6)},
        {"vision": dataclasses.replace(reference.VISION, hidden_act="gelu", layer_norm_eps=1e-6)},
    ],
    ids=["mlp", "linear", "tied", "gelu"],
)
def test_what_is_written_is_read_back_by_us_and_by_transformers(changes, tmp_path):
    config = dataclasses.replace(reference.LLAVA, **changes)
    written = write_llava(config, {}, image_token_index=7, dtype="bfloat16")
    found = read_llava(written, "")
    assert (found.vision, found.text) == (config.vision, config.text)
    assert (found.select_layer, found.select_feature) == (config.select_layer, config.select_feature)
    assert found.linear_projector == (config.projector_type == "linear")

    (tmp_path / "config.json").write_text(json.dumps(written))
    hf = transformers.LlavaConfig.from_pretrained(tmp_path)
    assert (text_config(hf.text_config), vision_config(hf.vision_config)) == (config.text, config.vision)
    assert (hf.image_token_id, hf.image_seq_length) == (7, config.image_tokens)
    assert hf.tie_word_embeddings == config.text.tie_word_embeddings
    assert str(hf.dtype) == "torch.bfloat16"


def test_written_so_that_every_version_finds_theta_types_and_tying():
    written = write_llava(reference.LLAVA, {}, image_token_index=7, dtype="float16")
    text = written["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 50000.0
    assert text["rope_scaling"] is None
    for part in (written, text, written["vision_config"]):
        assert part["torch_dtype"] == part["dtype"] == "float16"
    assert written["tie_word_embeddings"] is text["tie_word_embeddings"] is False


def test_other_fields_of_the_source_are_kept():
    source = LLAVA_1_5_7B | {"text_config": LLAVA_1_5_7B["text_config"] | {"pretraining_tp": 2, "eos_token_id": 5}}
    written = write_llava(reference.LLAVA, source, image_token_index=32000, dtype="float32")
    assert (written["pad_token_id"], written["ignore_index"]) == (32001, -100)
    assert (written["text_config"]["pretraining_tp"], written["text_config"]["eos_token_id"]) == (2, 5)
    assert written["vision_config"]["vocab_size"] == 32000
    assert "_name_or_path" not in written["text_config"]


def text_config(hf: transformers.LlamaConfig):
    """What transformers read, as ours."""
    return dataclasses.replace(
        reference.TEXT,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        rope_theta=hf.rope_parameters["rope_theta"],
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
    )


def vision_config(hf: transformers.CLIPVisionConfig):
    return dataclasses.replace(
        reference.VISION,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        image_size=hf.image_size,
        patch_size=hf.patch_size,
        layer_norm_eps=hf.layer_norm_eps,
        hidden_act=hf.hidden_act,
        projection_dim=hf.projection_dim,
    )
