"""Matrices that the files of some families have as one (`Family.fused`): split on import, joined on export."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.outgoing import Tensor
from llava_jax.convert.stored_tensor import StoredTensor, Tensors
from llava_jax.models.config import TextConfig
from llava_jax.models.families import family_of

_MATRIX = re.compile(r"(.*\.)(\w+)\.weight")


def split(tensors: Tensors, config: TextConfig) -> Tensors:
    """The tensors of a decoder, or of a LLaVA with it, in which no two matrices are one.

    Raises UserError for a matrix that does not have the rows of its parts.
    """
    fused, found = family_of(config).fused(config), {}
    for name, tensor in tensors.items():
        match = _MATRIX.fullmatch(name)
        if match is None or match[2] not in fused:
            found[name] = tensor
            continue
        rows = fused[match[2]]
        if len(tensor.shape) != 2 or tensor.shape[0] != sum(rows.values()):
            named = " + ".join(f"{count} of {part}" for part, count in rows.items())
            raise UserError(f"{name} is {tensor.shape}, not of {named} rows")
        for (part, count), stop in zip(rows.items(), itertools.accumulate(rows.values()), strict=True):
            found[f"{match[1]}{part}.weight"] = _part(tensor, stop - count, stop)
    return found


def _part(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    return tensor._replace(shape=(stop - start, *tensor.shape[1:]), read=lambda: tensor.read()[start:stop])


def joined(tensors: Iterable[Tensor], config: TextConfig) -> Iterator[Tensor]:
    """The tensors of a decoder that is exported, as its family's files have them: the inverse of `split`."""
    fused = family_of(config).fused(config)
    whole_of = {part: whole for whole, parts in fused.items() for part in parts}
    groups: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        match = _MATRIX.fullmatch(tensor.name)
        if match is None or match[2] not in whole_of:
            yield tensor
            continue
        parts = fused[whole_of[match[2]]]
        name = f"{match[1]}{whole_of[match[2]]}.weight"
        group = groups.setdefault(name, {})
        group[match[2]] = tensor
        if len(group) == len(parts):
            yield _joined(name, [group[part] for part in parts])


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    dtype = jnp.result_type(*(part.dtype for part in parts))
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Tensor(name, shape, dtype, lambda: np.concatenate([part.read().astype(dtype) for part in parts]))
