"""Writes the small backbones the way Hugging Face has them, so that what follows starts where users start."""

import json
from pathlib import Path

import numpy as np
import transformers
from safetensors.numpy import save_file

from llava_jax.convert.names import to_hf
from llava_jax.models.config import CLIP_MEAN, CLIP_STD, TextConfig, VisionConfig
from llava_jax.models.families import family_of
from llava_jax.models.hf_names import Entry
from llava_jax.models.llava import Params
from llava_jax.models.registry import TOWERS


def save_clip(directory: Path, config: VisionConfig, params: Params) -> None:
    """A directory as `CLIPVisionModel` and `CLIPImageProcessor` read it."""
    _save_tensors(directory, "", TOWERS[config.kind].entries(config), params)
    transformers.CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        architectures=["CLIPVisionModel"],
        dtype="float32",
    ).save_pretrained(directory)
    size = config.image_size
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def save_llama(
    directory: Path, config: TextConfig, params: Params, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """A directory as `LlamaForCausalLM` and `AutoTokenizer` read it."""
    _save_tensors(directory, "model.", family_of(config).entries(config), params)
    tokenizer.save_pretrained(directory)
    transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(directory)


def _save_tensors(directory: Path, prefix: str, entries: list[Entry], params: Params) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        prefix + leaf: tensor for entry in entries for leaf, tensor in to_hf(entry, np.asarray(params[entry.name]))
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
