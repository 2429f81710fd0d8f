"""FLOPs of a training step by formula: 2 a multiply-add of matrix products, nothing else counted.

The vision tower is frozen and runs forward only. Frozen parts of what follows the projector have no weight gradients,
but the gradients of activations pass through them (4 N T FLOPs instead of 6 N T).

Attention has two conventions in the literature: "full" counts every query with every key (what dense attention
computes), "causal" half of that (what a decoder needs).

Axes: B rows, T positions, D embed, N heads, H head width, V vocabulary.
"""

import dataclasses
from collections.abc import Collection, Iterable

from llava_jax.data.plan import Layout
from llava_jax.models.config import LlavaConfig, TextConfig
from llava_jax.models.families import family_of
from llava_jax.models.projectors import projector_kind
from llava_jax.models.registry import TOWERS
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
    products, attention = TOWERS[model.vision.kind].flops(model.vision, model.vision_layers_used)
    parts = {
        "vision": Part(products) * images,
        "vision attention": Part(attention) * images,
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


# ----------------------------------------------------------------------------------------- one token, row


def _projector(model: LlavaConfig, trainable: bool) -> Part:
    """One patch. What comes from the frozen tower needs no gradient, so that the first layer has but its weights'."""
    kind = projector_kind(model.projector_type)
    matrices = kind.matrices(model.projector_type, model.vision.hidden_size, model.text.hidden_size)
    first, *later = [2.0 * rows * columns for rows, columns in matrices]
    return Part(first + sum(later), sum(later), (first + sum(later)) * trainable)


def _decoder(text: TextConfig, trainable: bool, remat: str) -> Part:
    """One token through all layers, attention left out."""
    products = family_of(text).products(text)
    layer = sum(products.values())
    again = sum(products.get(name, 0) for name in RECOMPUTED[remat])
    return Part(layer, layer, layer * trainable, again) * text.num_layers


def _decoder_attention(text: TextConfig, length: int, remat: str) -> Part:
    """One row: scores and weighted values, 2 T T N H each; each has two gradients."""
    layer = 4.0 * length**2 * text.num_heads * text.head_dim
    return Part(layer, 2 * layer, 0.0, layer * ("attention" in RECOMPUTED[remat])) * text.num_layers
