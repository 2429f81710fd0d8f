"""FLOPs of a training step by formula: 2 for each multiply-add of a matrix product, 0 for everything else.

The vision tower is frozen and runs forward only. A frozen decoder has no weight gradients, but the gradients of
activations pass through it (4 N T FLOPs instead of 6 N T).

For attention the literature has two conventions: "full" counts every query with every key, as dense attention
computes it; "causal" counts half of that, which is what a decoder needs.

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
# Remat policy -> the products of a decoder layer that the backward pass computes again. The last product of a layer is
# not computed again, since the backward pass does not need its result.
RECOMPUTED: dict[str, tuple[str, ...]] = {
    "none": (),
    "full": ("qkv", "attention", "output", "gate_up"),
    "save_qkv": ("attention", "output", "gate_up"),
    "offload": ("qkv", "attention", "output", "gate_up"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """FLOPs of one part of the model in one step: the forward pass, gradients of activations, gradients of weights, and
    what rematerialization computes again."""

    forward: float = 0.0
    activations: float = 0.0
    weights: float = 0.0
    recomputed: float = 0.0

    @property
    def needed(self) -> float:
        return self.forward + self.activations + self.weights

    def __mul__(self, factor: float) -> "Part":
        return Part(*(factor * value for value in dataclasses.astuple(self)))


def step_flops(model: LlavaConfig, layout: Layout, trainable: Iterable[str], remat: str) -> dict[str, Part]:
    """FLOPs of a step over all devices, by part, attention "full".

    Args:
      trainable: names of the parameters, or of the parts ("projector", "llm"), that have weight gradients.
      remat: the policy of the decoder's layers, a key of `RECOMPUTED`.
    """
    images, rows = layout.groups * layout.image_slots, layout.batch_rows
    text, trained = model.text, {name.split(".")[0] for name in trainable}
    products, attention = TOWERS[model.vision.kind].flops(model.vision, model.vision_layers_used)
    parts = {
        "vision": Part(products) * images,
        "vision attention": Part(attention) * images,
        "projector": _projector(model, "projector" in trained) * (images * layout.image_tokens),
        "llm": _decoder(text, "llm" in trained, remat) * (rows * layout.max_length),
        "llm attention": _decoder_attention(text, layout.max_length, remat) * rows,
    }
    slots = layout.label_slots
    slots += -slots % min(slots, LABEL_CHUNK)  # a multiple of the chunk
    logits = 2.0 * text.hidden_size * text.vocab_size
    parts["logits"] = Part(logits, logits, logits * ("llm" in trained)) * (layout.groups * slots)
    return parts


def model_flops(parts: dict[str, Part], convention: str) -> float:
    """FLOPs that a step needs by one of the `CONVENTIONS`, without rematerialization."""
    causal = convention == "causal"
    return sum(part.needed * (0.5 if causal and name == "llm attention" else 1) for name, part in parts.items())


def executed_flops(parts: dict[str, Part], without: Collection[str] = ()) -> float:
    """FLOPs that a step executes with dense attention and rematerialization, except those of the parts `without`."""
    return sum(part.needed + part.recomputed for name, part in parts.items() if name not in without)


def mfu(parts: dict[str, Part], seconds: float, devices: int, peak: float) -> dict[str, float]:
    """Model FLOPs utilization (Chowdhery et al. 2022, appendix B) by convention; `peak` FLOP/s is of one device."""
    return {convention: model_flops(parts, convention) / (seconds * devices * peak) for convention in CONVENTIONS}


# ----------------------------------------------------------------------------------------- one token, row


def _projector(model: LlavaConfig, trainable: bool) -> Part:
    """One patch. The features of the frozen tower need no gradient, so the first layer has only that of its weights."""
    kind = projector_kind(model.projector_type)
    matrices = kind.matrices(model.projector_type, model.vision.hidden_size, model.text.hidden_size)
    first, *later = [2.0 * rows * columns for rows, columns in matrices]
    return Part(first + sum(later), sum(later), (first + sum(later)) * trainable)


def _decoder(text: TextConfig, trainable: bool, remat: str) -> Part:
    """One token through all layers, without attention."""
    products = family_of(text).products(text)
    layer = sum(products.values())
    again = sum(products.get(name, 0) for name in RECOMPUTED[remat])
    return Part(layer, layer, layer * trainable, again) * text.num_layers


def _decoder_attention(text: TextConfig, length: int, remat: str) -> Part:
    """One row: scores and weighted values, 2 T T N H each; each has two gradients."""
    layer = 4.0 * length**2 * text.num_heads * text.head_dim
    return Part(layer, 2 * layer, 0.0, layer * ("attention" in RECOMPUTED[remat])) * text.num_layers
