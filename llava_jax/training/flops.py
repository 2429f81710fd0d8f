"""FLOPs of a training step by formula: 2 a multiply-add of matrix products, nothing else counted.

The vision tower is frozen and runs forward only. Frozen parts of what follows the projector have no weight gradients,
but the gradients of activations pass through them (4 N T FLOPs instead of 6 N T).

Attention has two conventions in the literature: "full" counts every query with every key (what dense attention
computes), "causal" half of that (what a decoder needs).

Axes: B rows, T positions, P patches, D embed, F mlp, N heads, K key/value heads, H head width, V vocabulary.
"""

import dataclasses
from collections.abc import Collection, Iterable

from llava_jax.data.plan import Layout
from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.models.projector import num_projector_layers
from llava_jax.training.loss import CHUNK as LABEL_CHUNK

CONVENTIONS = ("full", "causal")
# Policy -> the products of a decoder layer that the backward pass computes again. The last one of a layer never is:
# nothing needs its result.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("qkv", "attention", "output", "gate_up"),
    "save_qkv": ("attention", "output", "gate_up"),
    "offload": ("qkv", "attention", "output", "gate_up"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """FLOPs of one part of the model in one step: forward, gradients of activations and of weights, and what
    rematerialisation computes once more."""

    forward: float = 0.0
    activations: float = 0.0
    weights: float = 0.0
    recomputed: float = 0.0

    @property
    def needed(self) -> float:
        return self.forward + self.activations + self.weights

    def __mul__(self, factor: float) -> "Part":
        return Part(*(factor * value for value in dataclasses.astuple(self)))


def trainable_parts(names: Iterable[str]) -> frozenset[str]:
    """Names of parameters -> the parts they belong to."""
    return frozenset(name.split(".")[0] for name in names)


def step_flops(model: LlavaConfig, layout: Layout, trainable: Collection[str], remat: str) -> dict[str, Part]:
    """FLOPs of a step over all devices, by part, attention "full".

    Args:
      trainable: the parts that have weight gradients ("projector", "llm").
      remat: the policy of the decoder's layers, a key of `RECOMPUTED`.
    """
    images, rows = layout.groups * layout.image_slots, layout.batch_rows
    text = model.text
    parts = {
        "vision": _vision(model.vision, model.vision_layers_used) * images,
        "vision attention": _vision_attention(model.vision, model.vision_layers_used) * images,
        "projector": _projector(model, "projector" in trainable) * (images * layout.image_tokens),
        "llm": _decoder(text, "llm" in trainable, remat) * (rows * layout.max_length),
        "llm attention": _decoder_attention(text, layout.max_length, remat) * rows,
    }
    slots = layout.label_slots
    slots += -slots % min(slots, LABEL_CHUNK)  # whole chunks
    logits = 2.0 * text.hidden_size * text.vocab_size
    parts["logits"] = Part(logits, logits, logits * ("llm" in trainable)) * (layout.groups * slots)
    return parts


def model_flops(parts: dict[str, Part], convention: str) -> float:
    """What a step has to compute, by one of the `CONVENTIONS`: without what is computed again."""
    causal = convention == "causal"
    return sum(part.needed * (0.5 if causal and name == "llm attention" else 1) for name, part in parts.items())


def executed_flops(parts: dict[str, Part], without: Collection[str] = ()) -> float:
    """What a step computes with dense attention, what is computed again included, some parts left out."""
    return sum(part.needed + part.recomputed for name, part in parts.items() if name not in without)


def mfu(parts: dict[str, Part], seconds: float, devices: int, peak: float) -> dict[str, float]:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) by convention; `peak` FLOP/s is of one device."""
    return {convention: model_flops(parts, convention) / (seconds * devices * peak) for convention in CONVENTIONS}


# ----------------------------------------------------------------------------------------- one picture, token, row


def _vision(vision: VisionConfig, layers: int) -> Part:
    """One picture: the patches, then projections and MLP of each layer."""
    D, P, S = vision.hidden_size, vision.num_patches, vision.num_tokens
    patches = 2.0 * P * 3 * vision.patch_size**2 * D
    layer = 2.0 * S * (4 * D * D + 2 * D * vision.intermediate_size)
    return Part(forward=patches + layers * layer)


def _vision_attention(vision: VisionConfig, layers: int) -> Part:
    """One picture: scores and weighted values, 2 S S D each."""
    return Part(forward=layers * 4.0 * vision.num_tokens**2 * vision.hidden_size)


def _projector(model: LlavaConfig, trainable: bool) -> Part:
    """One patch. What comes from the frozen tower needs no gradient, so that the first layer has but its weights'."""
    first = 2.0 * model.vision.hidden_size * model.text.hidden_size
    later = (num_projector_layers(model.projector_type) - 1) * 2.0 * model.text.hidden_size**2
    return Part(first + later, later, (first + later) * trainable)


def _decoder(text: TextConfig, trainable: bool, remat: str) -> Part:
    """One token through all layers, attention left out."""
    D, H = text.hidden_size, text.head_dim
    products = {
        "qkv": 2.0 * D * (text.num_heads + 2 * text.num_kv_heads) * H,
        "output": 2.0 * text.num_heads * H * D,
        "gate_up": 2.0 * D * 2 * text.intermediate_size,
        "down": 2.0 * text.intermediate_size * D,
    }
    layer = sum(products.values())
    again = sum(products.get(name, 0) for name in RECOMPUTED[remat])
    return Part(layer, layer, layer * trainable, again) * text.num_layers


def _decoder_attention(text: TextConfig, length: int, remat: str) -> Part:
    """One row: scores and weighted values, 2 T T N H each; each has two gradients."""
    layer = 4.0 * length**2 * text.num_heads * text.head_dim
    return Part(layer, 2 * layer, 0.0, layer * ("attention" in RECOMPUTED[remat])) * text.num_layers
