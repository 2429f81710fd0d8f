"""Names of our parameters and of transformers': the vocabulary of the tables that towers, families and projectors have.

The Hugging Face side holds leaf names, without what a layout puts in front of them (`vision_tower.vision_model.`,
`model.language_model.`, ...). PyTorch keeps linear weights as [out, in] and convolutions as [out, in, height, width]
and one tensor a layer; ours are [in, out], [height, width, in, out] and stacked over layers (models/llava.py).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

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


def stacked(entries: Iterable[Entry], layers: int) -> list[Entry]:
    """The entries of one layer, for a stack of them."""
    return [entry._replace(layers=layers) for entry in entries]


def layer_norm(ours: str, hf: str) -> list[Entry]:
    return [Entry(f"{ours}.scale", f"{hf}.weight"), Entry(f"{ours}.bias", f"{hf}.bias")]


def linear(ours: str, hf: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{ours}.kernel", f"{hf}.weight", TRANSPOSE), Entry(f"{ours}.bias", f"{hf}.bias")]
    return entries if bias else entries[:1]


def linears(ours: str, hf: str, names: Iterable[str], bias: bool = True) -> list[Entry]:
    """`linear` for several modules that have the same name on both sides."""
    return [entry for name in names for entry in linear(f"{ours}.{name}", f"{hf}.{name}", bias)]
