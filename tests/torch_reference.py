"""Small random models of transformers (torch, CPU, float32) and the same parameters as our flat dict."""

import numpy as np
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from llava_jax.convert.names import Entry, head_entries, llm_entries, projector_entries, to_ours, vision_entries
from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig

# Few of everything, and no two widths alike where the architecture lets them differ.
VISION = VisionConfig(32, 56, num_layers=4, num_heads=4, image_size=24, patch_size=8)
TEXT = TextConfig(97, 48, 80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, rope_theta=50000.0)
LLAVA = LlavaConfig(VISION, TEXT)


def torch_vision_config(config: VisionConfig) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=config.layer_norm_eps,
        hidden_act=config.hidden_act,
        projection_dim=config.projection_dim,
    )


def torch_text_config(config: TextConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=config.max_position_embeddings,
    )


def torch_llava_config(config: LlavaConfig) -> transformers.LlavaConfig:
    """The last id of the vocabulary is `<image>`."""
    return transformers.LlavaConfig(
        vision_config=torch_vision_config(config.vision),
        text_config=torch_text_config(config.text),
        image_token_id=config.text.vocab_size - 1,
        vision_feature_layer=config.select_layer,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[config.select_feature],
        image_seq_length=config.image_tokens,
        tie_word_embeddings=config.text.tie_word_embeddings,
    )


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter so that each one matters: signals keep their size, biases are not 0, norms not 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif parameter.ndim > 1:
            noise /= np.sqrt(np.prod(parameter.shape[1:]))
        parameter.copy_(noise)
    return module.eval()


def clip(config: VisionConfig, seed: int = 0) -> transformers.CLIPVisionModel:
    return randomize(transformers.CLIPVisionModel(torch_vision_config(config)), seed)


def llama(config: TextConfig, seed: int = 0) -> transformers.LlamaForCausalLM:
    return randomize(transformers.LlamaForCausalLM(torch_text_config(config)), seed)


def llava(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    return randomize(LlavaForConditionalGeneration(torch_llava_config(config)), seed)


def params_of(module: torch.nn.Module, entries: list[Entry], prefix: str = "") -> dict[str, np.ndarray]:
    """Our parameters `entries`, from a module that holds their leaves under `prefix`."""
    tensors = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    return {entry.name: to_ours(entry, lambda leaf: tensors[prefix + leaf]) for entry in entries}


def clip_params(module: torch.nn.Module, config: VisionConfig, prefix: str = "") -> dict[str, np.ndarray]:
    return params_of(module, vision_entries(config), prefix)


def llama_params(module: torch.nn.Module, config: TextConfig, prefix: str = "model.") -> dict[str, np.ndarray]:
    return params_of(module, llm_entries(config), prefix) | params_of(module, head_entries(config))


def llava_params(module: torch.nn.Module, config: LlavaConfig) -> dict[str, np.ndarray]:
    return (
        clip_params(module, config.vision, "model.vision_tower.")
        | params_of(module, projector_entries(config.projector_type), "model.multi_modal_projector.")
        | llama_params(module, config.text, "model.language_model.")
    )


def part(params: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The parameters under `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def num_parameters(make) -> int:
    """Parameters of the torch module that `make()` returns; none is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())
