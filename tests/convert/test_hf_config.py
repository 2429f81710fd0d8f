"""config.json of Hugging Face: read from what any version writes, written for all of them, refused by name."""

import copy
import dataclasses
import json

import pytest
import torch_reference as reference
import transformers

from llava_jax.cli import UserError
from llava_jax.convert.hf_config import read_llava, read_vision, write_llava
from llava_jax.convert.hf_tokenizer import ImageToken, SpecialTokens
from llava_jax.models.config import PRESETS, LlavaConfig

# https://huggingface.co/llava-hf/llava-interleave-qwen-0.5b-hf
LLAVA_QWEN_05B = {
    "image_token_index": 151646,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 152000,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
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
VISION = {"model_type": "clip_vision_model"}


def test_published_llava():
    found = read_llava(LLAVA_1_5_7B, "config.json")
    expected = PRESETS["llava-v1.5-7b"]
    assert found.vision == expected.vision
    assert found.text == dataclasses.replace(expected.text, vocab_size=32064)
    assert (found.select_layer, found.select_feature, found.projector_type) == (-2, "patch", "mlp2x_gelu")


def test_published_llava_of_other_families():
    found = read_llava(LLAVA_QWEN_05B, "config.json")
    hf = transformers.LlavaConfig(**copy.deepcopy(LLAVA_QWEN_05B))
    assert found.vision == reference.vision_config_of(hf.vision_config)
    assert found.text == reference.text_config_of(hf.text_config)
    config = LlavaConfig(found.vision, found.text, select_layer=found.select_layer, select_feature=found.select_feature)
    assert config.image_tokens == 27 * 27 and config.vision_layers_used == 26


def test_absent_fields_have_the_defaults_of_transformers():
    assert read_vision(VISION, "") == reference.vision_config_of(transformers.CLIPVisionConfig())
    siglip = {"model_type": "siglip_vision_model"}
    assert read_vision(siglip, "") == reference.vision_config_of(transformers.SiglipVisionConfig())
    found, expected = read_llava({"model_type": "llava"}, ""), transformers.LlavaConfig()
    assert found.text == reference.text_config_of(expected.text_config)
    assert found.vision == reference.vision_config_of(expected.vision_config)


def test_vision_tower_of_a_whole_siglip():
    whole = {"model_type": "siglip", "vision_config": {"hidden_size": 64, "num_attention_heads": 4}}
    vision = read_vision(whole, "")
    assert (vision.kind, vision.hidden_size, vision.patch_size) == ("siglip", 64, 16)


def test_vision_tower_of_a_whole_clip():
    whole = {"model_type": "clip", "vision_config": {"hidden_size": 64, "num_attention_heads": 4}}
    assert read_vision(whole, "").hidden_size == 64
    whole["vision_config_dict"] = {"hidden_size": 128}  # as old files say it again
    assert read_vision(whole, "").hidden_size == 128


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu_new"},
        {"patch_size": 225},
        {"image_size": [224, 448]},
        {"num_channels": 1},
        {"attention_dropout": 0.1},
        {"num_attention_heads": 5},
        {"model_type": "siglip2_vision_model"},
    ],
    ids=str,
)
def test_unsupported_towers_are_refused_by_name(fields):
    with pytest.raises(UserError, match=f"^here: .*{next(iter(fields))}"):
        read_vision(VISION | fields, "here")


@pytest.mark.parametrize("model_type", ["siglip2", "siglip2_vision_model"])
def test_siglip2_without_a_fixed_size_is_refused_with_the_way_out(model_type):
    with pytest.raises(
        UserError, match=f"^here: model_type is '{model_type}'.* NaFlex.* google/siglip2-base-patch16-256"
    ):
        read_vision({"model_type": model_type}, "here")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vision_feature_layer": [-2, -26]}, "vision_feature_layer is -26"),
        ({"vision_feature_layer": []}, r"vision_feature_layer is \[\], not one layer or a list"),
        ({"vision_feature_layer": [-2, None]}, r"vision_feature_layer is \[-2, None\], not one"),
        ({"vision_feature_layer": [-2, "3"]}, "vision_feature_layer is '3'"),
        ({"vision_feature_select_strategy": "middle"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"text_config": {"model_type": "gemma"}}, "text_config.*gemma"),
        ({"text_config": {"model_type": "llama", "mlp_bias": True}}, "text_config: mlp_bias"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, "vision_config.*siglip2"),
        ({"model_type": "llava_onevision"}, "llava_onevision"),
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


def special(config: LlavaConfig) -> SpecialTokens:
    return SpecialTokens(ImageToken(7, "<image>"), "<pad>", {}, config.text.vocab_size)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projector_type": "linear", "select_layer": 3, "select_feature": "cls_patch"},
        {"text": dataclasses.replace(reference.TEXT, tie_word_embeddings=True, head_dim=12, rms_norm_eps=1e-6)},
        {"vision": dataclasses.replace(reference.VISION, hidden_act="gelu", layer_norm_eps=1e-6)},
        {"vision": reference.SIGLIP, "select_layer": -1},
        {"vision": reference.SIGLIP, "select_layer": (-1, 1), "select_feature": "after_first"},
        *({"text": text} for text in reference.TEXTS.values()),
    ],
    ids=["mlp", "linear", "other tied", "gelu", "siglip", "siglip layers", *reference.TEXTS],
)
def test_what_is_written_is_read_back_by_us_and_by_transformers(changes, tmp_path):
    config = dataclasses.replace(reference.LLAVA, **changes)
    written = write_llava(config, {}, special(config), 8, dtype="bfloat16")
    found = read_llava(written, "")
    assert (found.vision, found.text) == (config.vision, config.text)
    assert (found.select_layer, found.select_feature) == (config.select_layer, config.select_feature)
    assert found.projector_type == config.projector_type

    (tmp_path / "config.json").write_text(json.dumps(written))
    hf = transformers.LlavaConfig.from_pretrained(tmp_path)
    assert (reference.text_config_of(hf.text_config), reference.vision_config_of(hf.vision_config)) == (
        config.text,
        config.vision,
    )
    assert (hf.image_token_id, hf.image_seq_length) == (7, config.image_tokens)
    assert hf.vision_feature_select_strategy == reference.torch_llava_config(config).vision_feature_select_strategy
    assert hf.vision_feature_layer == reference.torch_llava_config(config).vision_feature_layer
    assert hf.tie_word_embeddings == config.text.tie_word_embeddings
    assert str(hf.dtype) == "torch.bfloat16"


def test_written_so_that_every_version_finds_theta_types_and_tying():
    written = write_llava(reference.LLAVA, {}, special(reference.LLAVA), 8, dtype="float16")
    text = written["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 50000.0
    assert text["rope_scaling"] is None
    for part in (written, text, written["vision_config"]):
        assert part["torch_dtype"] == part["dtype"] == "float16"
    assert written["tie_word_embeddings"] is text["tie_word_embeddings"] is False


def test_other_fields_of_the_source_are_kept():
    source = LLAVA_1_5_7B | {"text_config": LLAVA_1_5_7B["text_config"] | {"pretraining_tp": 2, "eos_token_id": 5}}
    written = write_llava(reference.LLAVA, source, special(reference.LLAVA), 32001, dtype="float32")
    assert (written["pad_token_id"], written["ignore_index"]) == (32001, -100)
    assert (written["text_config"]["pretraining_tp"], written["text_config"]["eos_token_id"]) == (2, 5)
    assert written["vision_config"]["vocab_size"] == 32000
    assert "_name_or_path" not in written["text_config"]
