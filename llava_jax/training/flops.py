"""FLOPs of a training step by formula: 2 a multiply-add of matrix products, nothing else counted.

Frozen parameters have no weight gradients. If a parameter before them is trained, the gradients of activations pass
through them all the same (4 N T FLOPs instead of 6 N T); if none is, as in the vision tower of both stages, they only
run forward (2 N T).

Attention has two conventions in the literature: "full" counts every query with every key (what dense attention
computes), "causal" half of that (what a decoder needs).

Axes: B rows, T positions, P patches, D embed, F mlp, N heads, K key/value heads, H head width, V vocabulary.
"""

import dataclasses
import operator
from collections.abc import Collection, Iterable, Mapping

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

    def __add__(self, other: "Part") -> "Part":
        return Part(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, factor: float) -> "Part":
        return Part(*(factor * value for value in dataclasses.astuple(self)))


def trainable_parts(names: Iterable[str]) -> frozenset[str]:
    """Names of parameters -> the parts they belong to."""
    return frozenset(name.split(".")[0] for name in names)


def step_flops(model: LlavaConfig, layout: Layout, trainable: Collection[str], remat: str) -> dict[str, Part]:
    """FLOPs of a step over all devices, by part, attention "full".

    Args:
      trainable: names of the trained parameters, see `optim.trained`.
      remat: the policy of the layers, a key of `RECOMPUTED`.
    """
    images, rows = layout.groups * layout.image_slots, layout.batch_rows
    text, layers = model.text, model.vision_layers_used
    trainable = frozenset(trainable)
    vision = any(name.startswith("vision.") for name in trainable)
    decoder_input = vision or any(name.startswith(("projector.", "llm.embed_tokens.")) for name in trainable)
    decoder = decoder_input or any(name.startswith("llm.layers.") for name in trainable)
    parts = {
        "vision": _vision(model.vision, layers, trainable, remat) * images,
        "vision attention": _attention(model.vision.num_tokens, model.vision.hidden_size, layers, vision, remat)
        * images,
        "projector": _projector(model, vision, trainable) * (images * layout.image_tokens),
        "llm": _decoder(text, decoder, trainable, remat) * (rows * layout.max_length),
        "llm attention": _attention(layout.max_length, text.num_heads * text.head_dim, text.num_layers, decoder, remat)
        * rows,
    }
    slots = layout.label_slots
    slots += -slots % min(slots, LABEL_CHUNK)  # padded to whole chunks
    logits = 2.0 * text.hidden_size * text.vocab_size
    head = "llm.embed_tokens.embedding" if text.tie_word_embeddings else "llm.lm_head.kernel"
    hidden = decoder or "llm.norm.scale" in trainable
    parts["logits"] = Part(logits, logits * hidden, logits * (head in trainable)) * (layout.groups * slots)
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


# ------------------------------------------------------------------------------------------- one image, token or row


def _vision(vision: VisionConfig, layers: int, trainable: Collection[str], remat: str) -> Part:
    """One image: the patches, then projections and MLP of each layer. Pixels need no gradient."""
    D, P, S = vision.hidden_size, vision.num_patches, vision.num_tokens
    patches = 2.0 * P * 3 * vision.patch_size**2 * D
    products = {
        "attention.q_proj": ("qkv", 2.0 * S * D * D),
        "attention.k_proj": ("qkv", 2.0 * S * D * D),
        "attention.v_proj": ("qkv", 2.0 * S * D * D),
        "attention.out_proj": ("output", 2.0 * S * D * D),
        "mlp.fc1": ("gate_up", 2.0 * S * D * vision.intermediate_size),
        "mlp.fc2": ("down", 2.0 * S * D * vision.intermediate_size),
    }
    backward = any(name.startswith("vision.") for name in trainable)
    embedding = Part(forward=patches, weights=patches * ("vision.patch_embedding.kernel" in trainable))
    return embedding + _layers("vision.layers", products, backward, trainable, _recomputed("vision", remat)) * layers


def _projector(model: LlavaConfig, backward: bool, trainable: Collection[str]) -> Part:
    """One patch. `backward`: whether the tower is trained, else the first layer has no gradient of its input."""
    total = Part()
    for number in range(1, num_projector_layers(model.projector_type) + 1):
        width = model.vision.hidden_size if number == 1 else model.text.hidden_size
        flops = 2.0 * width * model.text.hidden_size
        trains = f"projector.linear_{number}.kernel" in trainable
        total += Part(flops, flops * backward, flops * trains)
        backward = backward or trains or f"projector.linear_{number}.bias" in trainable
    return total


def _decoder(text: TextConfig, backward: bool, trainable: Collection[str], remat: str) -> Part:
    """One token through all layers, attention left out."""
    D, H = text.hidden_size, text.head_dim
    products = {
        "attention.q_proj": ("qkv", 2.0 * D * text.num_heads * H),
        "attention.k_proj": ("qkv", 2.0 * D * text.num_kv_heads * H),
        "attention.v_proj": ("qkv", 2.0 * D * text.num_kv_heads * H),
        "attention.o_proj": ("output", 2.0 * text.num_heads * H * D),
        "mlp.gate_proj": ("gate_up", 2.0 * D * text.intermediate_size),
        "mlp.up_proj": ("gate_up", 2.0 * D * text.intermediate_size),
        "mlp.down_proj": ("down", 2.0 * text.intermediate_size * D),
    }
    return _layers("llm.layers", products, backward, trainable, _recomputed("llm", remat)) * text.num_layers


def _layers(
    prefix: str,
    products: Mapping[str, tuple[str, float]],
    backward: bool,
    trainable: Collection[str],
    recomputed: Collection[str],
) -> Part:
    """One layer. `products`: the FLOPs of each, and its name in `RECOMPUTED`. `backward`: whether gradients of
    activations pass through, which they do through all of the stacked layers or through none."""
    layer = sum(flops for _, flops in products.values())
    weights = sum(flops for name, (_, flops) in products.items() if f"{prefix}.{name}.kernel" in trainable)
    again = sum(flops for kind, flops in products.values() if kind in recomputed)
    return Part(layer, layer * backward, weights, again * backward)


def _attention(length: int, width: int, layers: int, backward: bool, remat: str) -> Part:
    """One row or image: scores and weighted values, 2 T T N H each; each has two gradients."""
    layer = 4.0 * length**2 * width
    again = layer * ("attention" in RECOMPUTED[remat])
    return Part(layer, 2 * layer * backward, 0.0, again * backward) * layers


def _recomputed(part: str, remat: str) -> tuple[str, ...]:
    """The tower's layers name nothing that "save_qkv" could keep."""
    return RECOMPUTED["full" if part == "vision" and remat == "save_qkv" else remat]
