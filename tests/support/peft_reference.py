"""PEFT's adapters on the small models of `torch_reference`, and the same adapters as our parameters."""

import dataclasses

import numpy as np
import peft
import torch
import torch_reference as reference

from llava_jax.convert.names import entries_of, to_ours
from llava_jax.models.config import LlavaConfig, LoraConfig
from llava_jax.models.hf_names import Entry
from llava_jax.models.llava import abstract_params

PREFIXES = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "")
SUFFIXES = {
    "a": "lora_A.default.weight",
    "b": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def adapted(config: LlavaConfig, lora: LoraConfig, **options) -> tuple[peft.PeftModel, LlavaConfig]:
    """A model with PEFT's fresh adapters at the layers that our `targets` choose, and the same model of ours."""
    ours = dataclasses.replace(config, lora=lora)
    modules = [leaf.removesuffix(".weight") for entry in _adapted_kernels(ours) for leaf in entry.leaves()]
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        **options,
    )
    return peft.get_peft_model(reference.llava(config), settings).eval(), ours


@torch.no_grad()
def randomize(module: peft.PeftModel, seed: int = 1) -> None:
    """Adapters that change the weights by about a third: B is not 0, and magnitudes are not the lengths of W's rows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * noise)
        elif "lora_A" in name:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        elif "lora_B" in name:
            parameter.copy_(0.1 * noise / parameter.shape[1] ** 0.5)


def params(module: peft.PeftModel, config: LlavaConfig, gradients: bool = False) -> dict[str, np.ndarray]:
    """All parameters as ours, or the gradients of those that are trained; 0 where torch computes none."""
    tensors = {}
    for name, parameter in module.named_parameters():
        if not gradients or parameter.requires_grad:
            value = parameter.grad if gradients else parameter
            value = np.zeros(parameter.shape, np.float32) if value is None else value.detach().numpy()
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            tensors[name.replace(".modules_to_save.default.", ".")] = value
    entries = [entry for entry in _entries(config) + _adapter_entries(config) if entry.leaves()[0] in tensors]
    return {entry.name: to_ours(entry, tensors.__getitem__) for entry in entries}


def _entries(config: LlavaConfig) -> list[Entry]:
    """The entries of all parts with their names in the whole model."""
    parts = zip(PREFIXES, entries_of(config).values(), strict=True)
    return [entry._replace(hf=prefix + entry.hf) for prefix, part in parts for entry in part]


def _adapted_kernels(config: LlavaConfig) -> list[Entry]:
    names = {name.removesuffix(".lora.a") for name in abstract_params(config) if name.endswith(".lora.a")}
    return [entry for entry in _entries(config) if entry.name.removesuffix(".kernel") in names]


def _adapter_entries(config: LlavaConfig) -> list[Entry]:
    return [
        kernel._replace(
            name=f"{kernel.name.removesuffix('.kernel')}.lora.{part}",
            hf=f"{kernel.hf.removesuffix('.weight')}.{suffix}",
            transform=kernel.transform if part in "ab" else (0,),
        )
        for kernel in _adapted_kernels(config)
        for part, suffix in SUFFIXES.items()
    ]
