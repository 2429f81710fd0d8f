"""Hugging Face's parameter names and ours: one table, read forwards by import and backwards by export.

The Hugging Face side holds leaf names, without what a layout puts in front of them (`vision_tower.vision_model.`,
`model.language_model.`, ...). PyTorch keeps linear weights as [out, in] and convolutions as [out, in, height, width]
and one tensor a layer; ours are [in, out], [height, width, in, out] and stacked over layers (models/llava.py).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from llava_jax.models.config import TextConfig, VisionConfig
from llava_jax.models.projector import num_projector_layers

# A transform is the permutation of axes from Hugging Face's tensor to ours.
SAME = (0,)
TABLE = (0, 1)  # embeddings stay [rows, features]
TRANSPOSE = (1, 0)
OIHW_TO_HWIO = (2, 3, 1, 0)


class Entry(NamedTuple):
    """One parameter of ours and where Hugging Face keeps it."""

    name: str  # ours, dotted
    hf: str  # leaf name, with `{layer}` where ours is stacked
    transform: tuple[int, ...] = SAME
    layers: int | None = None  # length of our leading axis, None where not stacked

    def leaves(self) -> list[str]:
        """The Hugging Face leaf names, in the order of our leading axis."""
        if self.layers is None:
            return [self.hf]
        return [self.hf.format(layer=layer) for layer in range(self.layers)]

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each Hugging Face tensor, from the shape of ours."""
        if self.layers is not None:
            shape = shape[1:]
        return tuple(shape[axis] for axis in np.argsort(self.transform))


def vision_entries(config: VisionConfig) -> list[Entry]:
    """Leaf names of `CLIPVisionModel` and `SiglipVisionModel`, as `encoder.layers.0.mlp.fc1.weight`."""
    embeddings = [
        Entry("vision.patch_embedding.kernel", "embeddings.patch_embedding.weight", OIHW_TO_HWIO),
        Entry("vision.position_embedding", "embeddings.position_embedding.weight", TABLE),
    ]
    of_one_kind = {
        "clip": [
            Entry("vision.class_embedding", "embeddings.class_embedding"),
            *_norm("vision.pre_layernorm", "pre_layrnorm"),  # (sic)
        ],
        "siglip": [Entry("vision.patch_embedding.bias", "embeddings.patch_embedding.bias")],
    }
    ours, hf = "vision.layers", "encoder.layers.{layer}"
    layers = [
        *_norm(f"{ours}.layernorm1", f"{hf}.layer_norm1"),
        *_norm(f"{ours}.layernorm2", f"{hf}.layer_norm2"),
        *_linears(f"{ours}.attention", f"{hf}.self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        *_linears(f"{ours}.mlp", f"{hf}.mlp", ["fc1", "fc2"]),
    ]
    last = _norm("vision.post_layernorm", "post_layernorm")
    return embeddings + of_one_kind[config.kind] + _stacked(layers, config.num_layers) + last


def llm_entries(config: TextConfig) -> list[Entry]:
    """Leaf names of `LlamaModel`, `MistralModel` and `Qwen2Model`, as `layers.0.mlp.up_proj.weight`.

    All but the head, which layouts keep elsewhere.
    """
    ours, hf = "llm.layers", "layers.{layer}"
    layers = [
        Entry(f"{ours}.input_layernorm.scale", f"{hf}.input_layernorm.weight"),
        Entry(f"{ours}.post_attention_layernorm.scale", f"{hf}.post_attention_layernorm.weight"),
        *_linears(f"{ours}.attention", f"{hf}.self_attn", ["q_proj", "k_proj", "v_proj"], bias=config.qkv_bias),
        *_linears(f"{ours}.attention", f"{hf}.self_attn", ["o_proj"], bias=False),
        *_linears(f"{ours}.mlp", f"{hf}.mlp", ["gate_proj", "up_proj", "down_proj"], bias=False),
    ]
    return [
        Entry("llm.embed_tokens.embedding", "embed_tokens.weight", TABLE),
        *_stacked(layers, config.num_layers),
        Entry("llm.norm.scale", "norm.weight"),
    ]


def head_entries(config: TextConfig) -> list[Entry]:
    """`lm_head.weight`; nothing where it is tied to the embeddings."""
    return [] if config.tie_word_embeddings else [Entry("llm.lm_head.kernel", "lm_head.weight", TRANSPOSE)]


def projector_entries(projector_type: str) -> list[Entry]:
    """Leaf names of `LlavaMultiModalProjector`, `linear_1` up to `linear_N`."""
    linears = [f"linear_{i}" for i in range(1, num_projector_layers(projector_type) + 1)]
    return [entry for linear in linears for entry in _linear(f"projector.{linear}", linear)]


def to_ours(entry: Entry, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our parameter, from `get(leaf name)`; bit-equal in every type. Its layers are of one type."""
    found = [read() for _, read in pieces(entry, get)]
    return np.stack(found) if is_layered(entry) else found[0]


def pieces(entry: Entry, get: Callable[[str], np.ndarray]) -> Iterator[tuple[int | None, Callable[[], np.ndarray]]]:
    """The same as (layer, what reads it), so that there need not be all of it at once.

    Matrices of layers come with the layer's number, since a stack of them is gigabytes. All else is whole, with None.
    """
    if is_layered(entry):
        for layer, leaf in enumerate(entry.leaves()):
            yield layer, lambda leaf=leaf: _permuted(get(leaf), entry.transform)
    elif entry.layers is None:
        yield None, lambda: _permuted(get(entry.hf), entry.transform)
    else:
        yield None, lambda: np.stack([get(leaf) for leaf in entry.leaves()])


def is_layered(entry: Entry) -> bool:
    return entry.layers is not None and len(entry.transform) > 1


def to_hf(entry: Entry, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The (leaf name, tensor) pairs of our parameter; the inverse of `to_ours`."""
    for leaf, tensor in zip(entry.leaves(), [array] if entry.layers is None else array, strict=True):
        yield leaf, to_hf_tensor(entry, tensor.shape, tensor.dtype, [((slice(None),) * tensor.ndim, tensor)])


def to_hf_tensor(
    entry: Entry, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[tuple[tuple[slice, ...], np.ndarray]]
) -> np.ndarray:
    """Hugging Face's tensor of our parameter or of one layer of it, of which the parts are given as (place, values)."""
    axes = np.argsort(entry.transform)
    tensor = np.empty([shape[axis] for axis in axes], dtype)
    for place, values in parts:
        _permute(values, tuple(axes), tensor[tuple(place[axis] for axis in axes)])
    return tensor


def _permuted(tensor: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The transposed array, in memory of its own order."""
    if axes != TRANSPOSE:
        return np.ascontiguousarray(tensor.transpose(axes))
    transposed = np.empty(tensor.shape[::-1], tensor.dtype)
    _permute(tensor, axes, transposed)
    return transposed


def _permute(tensor: np.ndarray, axes: tuple[int, ...], target: np.ndarray) -> None:
    if axes != TRANSPOSE:
        target[...] = tensor.transpose(axes)
        return
    # numpy alone takes seven times as long: it reads a cache line for each number. And it moves integers faster.
    bits = f"u{tensor.itemsize}"
    tensor, target = np.ascontiguousarray(tensor).view(bits), target.view(bits)
    for start in range(0, len(tensor), 16):
        target[:, start : start + 16] = tensor[start : start + 16].T


def _stacked(entries: Iterable[Entry], layers: int) -> list[Entry]:
    return [entry._replace(layers=layers) for entry in entries]


def _norm(ours: str, hf: str) -> list[Entry]:
    return [Entry(f"{ours}.scale", f"{hf}.weight"), Entry(f"{ours}.bias", f"{hf}.bias")]


def _linear(ours: str, hf: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{ours}.kernel", f"{hf}.weight", TRANSPOSE), Entry(f"{ours}.bias", f"{hf}.bias")]
    return entries if bias else entries[:1]


def _linears(ours: str, hf: str, names: Iterable[str], bias: bool = True) -> list[Entry]:
    return [entry for name in names for entry in _linear(f"{ours}.{name}", f"{hf}.{name}", bias)]
