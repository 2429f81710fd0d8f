"""FLOPs of a training step by formula: 2 for each multiply-add of a matrix product, 0 for everything else.

The products follow from the shapes of the kernels: a kernel of N numbers takes 2 N FLOPs a token.

Frozen parameters have no weight gradients. If a parameter before them is trained, the gradients of activations pass
through them all the same (4 N T FLOPs instead of 6 N T); if none is, as in the vision tower of both stages, they only
run forward (2 N T).

For attention the literature has two conventions: "full" counts every query with every key, as dense attention
computes it; "causal" counts half of that, which is what a decoder needs.

Axes: B rows, T positions, D embed, N heads, H head width, V vocabulary.
"""

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping

from llava_jax.data.plan import Layout
from llava_jax.models import pieces
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import NEWLINE_PARAMETER, Shapes, abstract_params
from llava_jax.models.projectors import projector_kind
from llava_jax.models.registry import TOWERS
from llava_jax.training.loss import CHUNK as LABEL_CHUNK

Sizes = Mapping[str, int]  # of kernels by name, in numbers
CONVENTIONS = ("full", "causal")
# Remat policy -> what of a decoder layer the backward pass computes again: attention, and results of linear layers, but
# not that of the last one, `down_proj`, which it does not need.
_AFTER_QKV = ("attention", "o_proj", "gate_proj", "up_proj")
_ALL = ("q_proj", "k_proj", "v_proj", *_AFTER_QKV)
RECOMPUTED: dict[str, tuple[str, ...]] = {"none": (), "full": _ALL, "save_qkv": _AFTER_QKV, "offload": _ALL}
# The last product of a layer of the towers, as `down_proj` is of the decoder's.
LAST_OF_TOWER = "vision.layers.mlp.fc2.kernel"


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

    def __add__(self, other: "Part") -> "Part":
        return Part(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, factor: float) -> "Part":
        return Part(*(factor * value for value in dataclasses.astuple(self)))


def step_flops(
    model: LlavaConfig, layout: Layout, trainable: Collection[str], remat: str, passes: int = 1
) -> dict[str, Part]:
    """FLOPs of a step over all devices, by part, attention "full".

    Args:
      trainable: names of the trained parameters, see `optim.trained`.
      remat: the policy of the layers, a key of `RECOMPUTED`.
      passes: forward passes of a step: microbatches, times the devices that the rows are split over.
    """
    images, rows = layout.groups * layout.image_slots, layout.batch_rows
    text = model.text
    sizes, weights = _sizes(model, _plain_shapes(model)), _sizes(model, trainable)
    first, depths = first_trained_layers(model, trainable), _depths(model)
    # The share of the layers that gradients of activations pass through.
    vision, decoder = (1 - first[stack] / max(depths[stack], 1) for stack in ("vision.layers", "llm.layers"))
    hidden = decoder > 0 or any(name.startswith("llm.norm.") for name in trainable)  # pass through the logits
    attention = layout.max_length**2 * 4.0 * text.num_heads * text.head_dim * text.num_layers
    tower, tower_attention = _vision(model, sizes, weights, vision, remat)
    parts = {
        "vision": tower * images,
        "vision attention": tower_attention * images,
        "projector": _projector(model, sizes, weights, vision, trainable) * (images * layout.image_tokens),
        "llm": _decoder(sizes, weights, decoder, remat) * (rows * layout.max_length),
        "llm attention": _attention(attention, decoder, RECOMPUTED[remat]) * rows,
    }
    slots = layout.label_slots
    slots += -slots % min(slots, LABEL_CHUNK)  # padded to whole chunks
    logits = 2.0 * text.hidden_size * text.vocab_size
    head = "llm.embed_tokens.embedding" if text.tie_word_embeddings else "llm.lm_head.kernel"
    parts["logits"] = Part(logits, logits * hidden, logits * (head in trainable)) * (layout.groups * slots)
    if model.lora is not None:
        parts["adapters"] = _adapters(model, layout, trainable, {"vision": vision, "llm": decoder}, remat, passes)
    return parts


def first_trained_layers(model: LlavaConfig, trainable: Collection[str]) -> dict[str, int]:
    """The first layer of each stack that gradients of activations pass through; behind the last if there is none.

    Once they pass through a piece of a stack (`models.pieces`), they pass through all layers of it and those after it.
    """
    unused, shapes = TOWERS[model.vision.kind].unused, abstract_params(model)
    inputs = {
        "vision.layers": "vision.",
        "llm.layers": ("vision.", "projector.", NEWLINE_PARAMETER, "llm.embed_tokens."),
    }

    def first(stack: str, depth: int) -> int:
        found = [depth]
        for name in trainable:
            if pieces.stack_of(name) == stack:
                found.append(pieces.rows(name, shapes[pieces.whole(name)])[0])
            elif name.startswith(inputs[stack]) and not name.startswith(unused):
                found.append(0)
        return min(found)

    return {stack: first(stack, depth) for stack, depth in _depths(model).items()}


def _depths(model: LlavaConfig) -> dict[str, int]:
    return {"vision.layers": model.vision_layers_used, "llm.layers": model.text.num_layers}


def _plain_shapes(model: LlavaConfig) -> Shapes:
    """Quantized or not, kernels take part in the same products."""
    return abstract_params(dataclasses.replace(model, base_dtype=""))


def _sizes(model: LlavaConfig, names: Collection[str], endings: tuple[str, ...] = (".kernel",)) -> dict[str, int]:
    """The sizes of the kernels among these parameters by name, of layers that run."""
    sizes: dict[str, int] = {}
    shapes, depths = _plain_shapes(model), _depths(model)
    for name in names:
        if name.endswith(endings):
            whole = pieces.whole(name)
            start, stop = pieces.rows(name, shapes[whole])
            layers = max(min(stop, depths.get(pieces.stack_of(name), stop)) - start, 0)
            sizes[whole] = sizes.get(whole, 0) + layers * math.prod(shapes[whole].shape[1:])
    return sizes


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


# ------------------------------------------------------------------------------------------- one image, token or row
# `sizes`: those of all kernels. `weights`: of the trained ones. `backward`: the share of the layers that gradients of
# activations pass through.


def _vision(model: LlavaConfig, sizes: Sizes, weights: Sizes, backward: float, remat: str) -> tuple[Part, Part]:
    """One image: (products with weights, attention). The patch embedding needs no gradient of the pixels."""
    vision = model.vision

    def products(sizes: Sizes) -> dict[str, float]:
        tokens = {name: vision.num_tokens if pieces.stack_of(name) else vision.num_patches for name in sizes}
        return {name: 2.0 * tokens[name] * size for name, size in sizes.items() if name.startswith("vision.")}

    forward = products(sizes)
    recomputed = RECOMPUTED["full" if remat == "save_qkv" else remat]  # the tower's layers do not name qkv
    later = sum(forward.values()) - forward.get("vision.patch_embedding.kernel", 0.0)
    again = later - forward.get(LAST_OF_TOWER, 0.0) if recomputed else 0.0
    part = Part(sum(forward.values()), later * backward, sum(products(weights).values(), 0.0), again * backward)
    attention = 4.0 * vision.num_tokens**2 * vision.hidden_size * model.vision_layers_used
    return part, _attention(attention, backward, recomputed)


def _projector(model: LlavaConfig, sizes: Sizes, weights: Sizes, backward: float, trainable: Collection[str]) -> Part:
    """One patch. `backward`: whether the tower is trained; else gradients end at the first trained layer."""
    products = [2.0 * sizes[f"{layer}.kernel"] for layer in _layers_of_projector(model)]
    first = 0 if backward else _first_trained_layer_of_projector(model, trainable) + 1
    gradients = 2.0 * sum(size for name, size in weights.items() if name.startswith("projector."))
    return Part(sum(products), sum(products[first:]), gradients)


def _first_trained_layer_of_projector(model: LlavaConfig, trainable: Collection[str]) -> int:
    """Its number; that behind the last if none is trained."""
    layers = _layers_of_projector(model)
    trained = (number for number, layer in enumerate(layers) if any(name.startswith(f"{layer}.") for name in trainable))
    return next(trained, len(layers))


def _layers_of_projector(model: LlavaConfig) -> list[str]:
    entries = projector_kind(model.projector_type).entries(model.projector_type)
    return [entry.name.removesuffix(".kernel") for entry in entries if entry.name.endswith(".kernel")]


def _adapters(
    model: LlavaConfig,
    layout: Layout,
    trainable: Collection[str],
    backward: Mapping[str, float],  # of "vision" and "llm", see above
    remat: str,
    passes: int,
) -> Part:
    """All adapters in one step: y = x W + s (x A) B. DoRA multiplies A by B in each pass, to measure the columns of
    W + s A B, and computes x W again with dropout."""
    lora, images = model.lora, layout.groups * layout.image_slots
    shapes, depths = abstract_params(model), _depths(model)
    tokens = {
        "vision": images * model.vision.num_tokens,
        "projector": images * layout.image_tokens,
        "llm": layout.batch_rows * layout.max_length,
    }
    weights = _sizes(model, trainable, (".lora.a", ".lora.b"))
    total = Part()
    for name in [name.removesuffix(".lora.a") for name in shapes if name.endswith(".lora.a")]:
        part, stack = name.partition(".")[0], pieces.stack_of(name)
        inputs, outputs = shapes[f"{name}.lora.a"].shape[-2], shapes[f"{name}.lora.b"].shape[-1]
        layers = depths.get(stack, 1)
        per_number = 2.0 * tokens[part] * layers
        into, out, product = (per_number * size for size in (lora.rank * inputs, lora.rank * outputs, inputs * outputs))
        norms = 2.0 * inputs * lora.rank * outputs * layers * passes * lora.dora
        dropped = product * (lora.dora and lora.dropout > 0)
        # Shares of the layers that compute the gradient of x A, and of x.
        inner = outer = backward.get(part)
        if part == "projector":
            number, first = _layers_of_projector(model).index(name), _first_trained_layer_of_projector(model, trainable)
            inner, outer = (backward["vision"] > 0 or first < end for end in (number + 1, number))
        gradients = 2.0 * tokens[part] * sum(weights.get(f"{name}.lora.{matrix}", 0) for matrix in "ab")
        again = 0.0
        if stack and remat != "none":
            # The gradient of the magnitude needs the results of all products.
            result_again = _is_recomputed(name, remat)
            again = into + out * (result_again or lora.dora) + norms
            again += dropped or product * (lora.dora and not result_again)
        total += Part(into + out + dropped + norms, out * inner + (into + dropped) * outer, gradients, again * inner)
    return total


def _is_recomputed(linear: str, remat: str) -> bool:
    """Whether a layer's backward pass computes the result of a linear layer again."""
    if linear.startswith("llm."):
        return linear.rpartition(".")[2] in RECOMPUTED[remat]
    return f"{linear}.kernel" != LAST_OF_TOWER


def _decoder(sizes: Sizes, weights: Sizes, backward: float, remat: str) -> Part:
    """One token through all layers, without attention."""
    layers, trained = ({name: of[name] for name in of if name.startswith("llm.layers.")} for of in (sizes, weights))
    again = 2.0 * sum(size for name, size in layers.items() if _is_recomputed(name.removesuffix(".kernel"), remat))
    forward = 2.0 * sum(layers.values())
    return Part(forward, forward * backward, 2.0 * sum(trained.values()), again * backward)


def _attention(forward: float, backward: float, recomputed: Collection[str]) -> Part:
    """Scores and weighted values, 2 T T N H each a layer; each has two gradients."""
    return Part(forward, 2 * forward * backward, 0.0, forward * backward * ("attention" in recomputed))
