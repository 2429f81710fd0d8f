"""A small LLaVA of every family as transformers' `save_pretrained` writes it."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch_reference as reference
from conversion import byte_level
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.models.towers.siglip import SIGLIP_MEAN, SIGLIP_STD


class Family(NamedTuple):
    text: TextConfig
    template: str
    eos: str
    bos: str | None = None
    others: tuple[str, ...] = ()  # special tokens
    system: str = ""  # that of the tokenizer's chat template
    vision: VisionConfig = reference.VISION
    resample: str = "bicubic"
    selected: dict = {"select_layer": -1}


FAMILIES = {
    "vicuna": Family(dataclasses.replace(reference.TEXT, rope_theta=1e4, num_kv_heads=6), "v1", "</s>", "<s>"),
    "llama 3.1": Family(
        reference.TEXTS["llama3"],
        "llama_3",
        "<|eot_id|>",
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "mistral": Family(reference.TEXTS["mistral"], "mistral_instruct", "</s>", "<s>"),
    "smollm2": Family(reference.TEXTS["tied"], "chatml", "<|im_end|>", None, ("<|im_start|>",), "You help."),
    "tinyllama": Family(dataclasses.replace(reference.TEXT, num_kv_heads=1), "zephyr", "</s>", "<s>"),
    "qwen2 and siglip": Family(
        reference.TEXTS["qwen2"], "chatml", "<|im_end|>", None, ("<|im_start|>",), "Help.", reference.SIGLIP
    ),
    "qwen3 and siglip2": Family(
        dataclasses.replace(reference.TEXTS["qwen3"], tie_word_embeddings=True),
        "qwen3",
        "<|im_end|>",
        None,
        ("<|im_start|>", "<think>", "</think>"),
        "",
        dataclasses.replace(reference.SIGLIP, image_size=48, patch_size=16),
        "bilinear",
    ),
    "gemma 3 and siglip2": Family(
        dataclasses.replace(reference.TEXTS["gemma3_text"], num_kv_heads=1),
        "gemma",
        "<end_of_turn>",
        "<bos>",
        ("<start_of_turn>",),
        "",
        dataclasses.replace(reference.SIGLIP, image_size=48, patch_size=16),
        "bilinear",
    ),
    "phi3 with several layers of siglip": Family(
        reference.TEXTS["phi3"],
        "phi_3",
        "<|end|>",
        "<s>",
        ("<|user|>", "<|assistant|>", "<|system|>"),
        vision=reference.SIGLIP,
        selected={"select_layer": (-1, 1), "select_feature": "after_first"},
    ),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Byte-level, with the family's special tokens, and `<image>` as the last."""
    specials = ("<pad>", "<s>", "</s>", family.eos, *family.others, *([family.bos] if family.bos else []))
    tokenizer = byte_level(specials=tuple(dict.fromkeys(specials)))
    tokenizer.eos_token, tokenizer.bos_token = family.eos, family.bos
    if family.bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = "{{ '<|im_start|>system\n" + family.system + "<|im_end|>' }}" if family.system else None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def save(family: Family, directory: Path):
    """A LLaVA as `save_pretrained` writes it -> the model and what we should make of it."""
    tokenizer = tokenizer_of(family)
    config = LlavaConfig(family.vision, dataclasses.replace(family.text, vocab_size=len(tokenizer)))
    if family.vision.kind == "siglip":
        config = dataclasses.replace(
            config,
            **family.selected,
            image_aspect="resize",
            image_mean=SIGLIP_MEAN,
            image_std=SIGLIP_STD,
            image_resample=family.resample,
        )
        size = {"height": family.vision.image_size, "width": family.vision.image_size}
        processor = {
            "size": size,
            "image_mean": SIGLIP_MEAN,
            "image_std": SIGLIP_STD,
            "resample": Image.Resampling[family.resample.upper()],
        }
        directory.mkdir()
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    model = reference.llava(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, config
