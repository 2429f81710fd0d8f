"""Adapters as PEFT writes them, on small models of transformers."""

from pathlib import Path

import torch
import torch_reference as reference
from conversion import rename
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

# What PEFT calls the modules, by the version of transformers that the model was trained with.
NAMES = {
    "before 4.52": {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head",
                    "model.vision_tower.": "vision_tower.vision_model.",
                    "model.multi_modal_projector.": "multi_modal_projector."},
    "4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "5.6": {},
    "the original": {"model.language_model.": "model.", "model.multi_modal_projector.linear_1": "model.mm_projector.0",
                     "model.multi_modal_projector.linear_2": "model.mm_projector.2",
                     "model.vision_tower.": "model.vision_tower.vision_tower.vision_model."},
}  # fmt: skip
ATTENTION = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def adapted(config, seed: int = 0, **settings) -> PeftModel:
    """A model with a random adapter, whose parts that PEFT saves whole are trained, too."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(reference.llava(config), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter *= 1 + 0.3 * noise
            elif "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * noise
    return model


def save(model: PeftModel, directory: Path, names: str = "5.6") -> Path:
    """Writes the adapter with the names of a version of transformers."""
    model.save_pretrained(directory)
    file, prefix = directory / "adapter_model.safetensors", "base_model.model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file({prefix + name: tensor for name, tensor in rename(tensors, NAMES[names]).items()}, file)
    return directory
