"""Tensors of transformers and our parameters, by the entries of models/hf_names.py: import and export, bit for bit."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llava_jax.models.config import LlavaConfig
from llava_jax.models.families import family_of, head_entries
from llava_jax.models.hf_names import SAME, TRANSPOSE, Entry
from llava_jax.models.llava import NEWLINE_PARAMETER, abstract_params
from llava_jax.models.projectors import projector_kind
from llava_jax.models.registry import TOWERS

# What an adapter's parameters are called by PEFT.
LORA = {
    "a": ("lora_A.weight", TRANSPOSE),
    "b": ("lora_B.weight", TRANSPOSE),
    "magnitude": ("lora_magnitude_vector", SAME),
}


def entries_of(config: LlavaConfig) -> dict[str, list[Entry]]:
    """The entries of each part that a model has; those of adapters have PEFT's names, without that of the adapter."""
    parts = {
        "vision": TOWERS[config.vision.kind].entries(config.vision),
        "projector": projector_kind(config.projector_type).entries(config.projector_type),
        "llm": family_of(config.text).entries(config.text),
        "head": head_entries(config.text),
    }
    if config.anyres and config.anyres.newline:
        parts["newline"] = [Entry(NEWLINE_PARAMETER, "image_newline")]
    return {part: [*entries, *_adapters(config, entries)] for part, entries in parts.items()}


def _adapters(config: LlavaConfig, entries: list[Entry]) -> Iterator[Entry]:
    shapes = abstract_params(config) if config.lora else {}
    for entry in entries:
        layer, leaf = entry.name.removesuffix(".kernel"), entry.hf.removesuffix(".weight")
        for ours, (theirs, transform) in LORA.items():
            if f"{layer}.lora.{ours}" in shapes:
                yield Entry(f"{layer}.lora.{ours}", f"{leaf}.{theirs}", transform, entry.layers)


def to_ours(entry: Entry, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our parameter from `get(leaf name)`, bit-equal in every type. All layers have the same type."""
    found = [read() for _, read in slices(entry, get)]
    return np.stack(found) if is_layered(entry) else found[0]


def slices(entry: Entry, get: Callable[[str], np.ndarray]) -> Iterator[tuple[int | None, Callable[[], np.ndarray]]]:
    """The same as (layer, function that reads it), so that not all of it has to be in memory.

    Matrices of layers come one by one, since a stack of them takes gigabytes; other parameters as a whole, with None.
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
    entry: Entry, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[tuple[tuple[slice, ...], np.ndarray]]
) -> np.ndarray:
    """Hugging Face's tensor of our parameter, or of one layer of it, given in chunks of (index, values)."""
    axes = np.argsort(entry.transform)
    tensor = np.empty([shape[axis] for axis in axes], dtype)
    for index, values in chunks:
        _permute(values, tuple(axes), tensor[tuple(index[axis] for axis in axes)])
    return tensor


def _permuted(tensor: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The permuted array, contiguous in memory."""
    if axes != TRANSPOSE:
        return np.ascontiguousarray(tensor.transpose(axes))
    transposed = np.empty(tensor.shape[::-1], tensor.dtype)
    _permute(tensor, axes, transposed)
    return transposed


def _permute(tensor: np.ndarray, axes: tuple[int, ...], target: np.ndarray) -> None:
    if axes != TRANSPOSE:
        target[...] = tensor.transpose(axes)
        return
    # NumPy's own copy takes seven times as long: it reads a cache line for each number. Integers are copied faster.
    bits = f"u{tensor.itemsize}"
    tensor, target = np.ascontiguousarray(tensor).view(bits), target.view(bits)
    for start in range(0, len(tensor), 16):
        target[:, start : start + 16] = tensor[start : start + 16].T
