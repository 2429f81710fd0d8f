"""What vLLM's and SGLang's loaders look for in an export, as their code says; neither is run.

vLLM: vllm/model_executor/models/llava.py at commit 0004c54 (March 2025), which takes names as they are, and as its
documentation shows it in May 2026, with `hf_to_vllm_mapper`. SGLang: python/sglang/srt/models/llava.py at commit
00adcbe (2024), and of 2025 with its `LlavaForConditionalGeneration`.
"""

import dataclasses
import json
import re

import pytest
import tiny
import torch_reference as reference
from conversion import convert

from llava_jax.convert.tensors import open_directory
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.models.towers.siglip import SIGLIP_MEAN

TEXT = dataclasses.replace(reference.TEXT, vocab_size=tiny.VOCAB)
MODELS = {
    "llama": tiny.config(),
    "tied": tiny.config(text=dataclasses.replace(TEXT, tie_word_embeddings=True)),
    "mistral": tiny.config(text=dataclasses.replace(TEXT, sliding_window=16)),
    "qwen2 and siglip": tiny.config(
        text=dataclasses.replace(TEXT, qkv_bias=True),
        vision=reference.SIGLIP,
        select_layer=-1,
        image_mean=SIGLIP_MEAN,
        image_std=SIGLIP_MEAN,
    ),
    "linear": tiny.config(projector_type="linear"),
}

# Names of parameters inside the modules `language_model`, `vision_tower` and `multi_modal_projector` of both; q, k and
# v, and gate and up, are stored apart and packed when loaded.
LINEAR, NORM = r"\.(weight|bias)", r"\.weight"
DECODER = re.compile(
    rf"model\.(embed_tokens|norm){NORM}|lm_head{NORM}"
    rf"|model\.layers\.\d+\.(self_attn\.[qkvo]_proj{LINEAR}|mlp\.(gate|up|down)_proj{NORM}"
    rf"|(input|post_attention)_layernorm{NORM})"
)
TOWER = re.compile(
    rf"vision_model\.(embeddings\.(class_embedding|patch_embedding{LINEAR}|position_embedding{NORM})"
    rf"|(pre_layrnorm|post_layernorm){LINEAR}"
    rf"|encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12]){LINEAR})"
)
PROJECTOR = re.compile(rf"linear_[12]{LINEAR}")
MODULES = {"language_model": DECODER, "vision_tower": TOWER, "multi_modal_projector": PROJECTOR}
VLLM_MAPPER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
VLLM_ACTIVATIONS = {"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "quick_gelu"}
VLLM_DECODERS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    checkpoint = tiny.checkpoint(directory, MODELS[request.param])
    convert("export", "--checkpoint", checkpoint, "--output", directory / "hf")
    config = json.loads((directory / "hf/config.json").read_text())
    return MODELS[request.param], directory / "hf", config


def test_every_tensor_has_a_place_in_both(exported):
    model, directory, _ = exported
    names = list(open_directory(directory))
    for name in names:
        for old, new in VLLM_MAPPER.items():
            assert not name.startswith(old), "renamed by the newer vLLM only"
            assert not new.startswith("model.")
        module, _, inside = name.partition(".")
        assert MODULES[module].fullmatch(inside), name
    linears = {name for name in names if name.startswith("multi_modal_projector.")}
    assert len(linears) == 4  # linear_1 and linear_2, with biases
    assert ("language_model.lm_head.weight" in names) != model.text.tie_word_embeddings


def test_vllm_finds_its_settings(exported):
    model, directory, config = exported
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert set(text["architectures"]) <= VLLM_DECODERS  # without, "No model architectures are specified"
    assert vision["model_type"] in ("clip_vision_model", "siglip_vision_model")
    assert type(config["vision_feature_layer"]) is int
    assert config["multimodal_projector_bias"] is True
    # A linear projector, whose activation is none, is the one thing that vLLM has not got.
    assert (config["projector_hidden_act"] in VLLM_ACTIVATIONS) == (model.projector_type != "linear")
    class_token = vision["model_type"] == "clip_vision_model"
    encoder_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + class_token
    assert encoder_tokens - {"default": 1, "full": 0}[config["vision_feature_select_strategy"]] == model.image_tokens
    processor = json.loads((directory / "processor_config.json").read_text())
    vocabulary = load_tokenizer(directory).get_vocab()
    assert vocabulary[processor["image_token"]] == config["image_token_index"] < text["vocab_size"]
    assert text["tie_word_embeddings"] == config["tie_word_embeddings"] == model.text.tie_word_embeddings


def test_sglang_finds_its_settings(exported):
    """Its class for this layout refuses CLIP's strategy; then `test_sglang_takes_the_original_layout` is the way."""
    model, _, config = exported
    assert config["torch_dtype"] and config["text_config"]["torch_dtype"] and config["vision_config"]["torch_dtype"]
    loadable = config["vision_feature_select_strategy"] in ("patch", "full", "cls_patch")
    assert loadable == (model.vision.kind == "siglip")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sglang_takes_the_original_layout(name, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path, MODELS[name])
    flags = ["--layout", "original", "--tower", "openai/clip-vit-large-patch14-336", "--output", tmp_path / "o"]
    convert("export", "--checkpoint", checkpoint, *flags)
    config = json.loads((tmp_path / "o/config.json").read_text())
    renamed = {
        "model.mm_projector.0": "multi_modal_projector.linear_1",
        "model.mm_projector.2": "multi_modal_projector.linear_2",
        "model.vision_tower.vision_tower": "vision_tower",
    }
    for tensor in open_directory(tmp_path / "o"):
        for old, new in renamed.items():
            tensor = tensor.replace(old, new)
        module, _, inside = tensor.partition(".")
        assert MODULES[module].fullmatch(inside) if module in MODULES else DECODER.fullmatch(tensor), tensor
    assert config["architectures"][0] in ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")
    assert "clip" in config["mm_vision_tower"] and config["mm_vision_select_feature"] in ("patch", "cls_patch")
    assert config["mm_hidden_size"] == MODELS[name].vision.hidden_size
    assert type(config["mm_vision_select_layer"]) is int and config["mm_patch_merge_type"] == "flat"
