"""Small random LLaVA-1.6 models of transformers, and their image processor."""

import torch_reference as reference
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_jax.convert.hf_config import pinpoints
from llava_jax.models.config import LlavaConfig


def torch_model(config: LlavaConfig) -> LlavaNextForConditionalGeneration:
    return reference.randomize(untrained(config))


def untrained(config: LlavaConfig) -> LlavaNextForConditionalGeneration:
    """The last id of the vocabulary is `<image>`."""
    hf = reference.torch_llava_config(config).to_dict()
    for key in ("model_type", "transformers_version", "architectures"):
        hf.pop(key, None)
    hf["vision_config"] = reference.torch_vision_config(config.vision)
    hf["text_config"] = reference.torch_text_config(config.text)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**hf, image_grid_pinpoints=pinpoints(config)))


def processor_of(config: LlavaConfig) -> LlavaNextImageProcessorPil:
    side = config.vision.image_size
    return LlavaNextImageProcessorPil(
        image_grid_pinpoints=pinpoints(config),
        size={"height": side, "width": side},
        do_center_crop=False,
        crop_size={"height": side, "width": side},  # the tiles, although nothing is cropped
        image_mean=config.image_mean,
        image_std=config.image_std,
    )
