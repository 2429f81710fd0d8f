"""What an import found on disk, and errors for what cannot be used."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.layouts import TIED_HEAD, Source
from llava_jax.models.config import LlavaConfig
from llava_jax.models.hf_fields import Json
from llava_jax.models.registry import PROJECTORS


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the user; None means as the source says, or else the default."""

    template: str | None = None  # default: the one that equals the tokenizer's chat template, or v1
    projector_type: str | None = None  # default: mlp2x_gelu
    aspect: str | None = None  # default: pad, as LLaVA-1.5 was trained
    image_position: str | None = None  # default: first, as LLaVA-1.5 was trained
    select_layer: int | None = None  # default: -2
    select_feature: str | None = None  # default: patch
    grid_order: str | None = None  # "original" or "transformers": who trained it; default: whose files they are
    seed: int = 0  # of a fresh projector
    unmerged: bool = False  # an adapter stays beside the weights
    base_dtype: str = ""  # of the language model's linear layers, see `models.quantized`
    rows: str = "source"  # of embeddings and head; "tokenizer": one for each of its ids


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on disk, whose names and shapes have been checked and whose weights have not been read yet."""

    config: LlavaConfig
    sources: dict[str, Source]  # part -> its tensors; without a projector, a fresh one is made
    hf: dict[str, Json]  # JSON files of the source, kept for an export
    write_tokenizer: Callable[[Path], None]  # to a directory
    trained: bool  # as a LLaVA, with a conversation template
    trained_whole: tuple[str, ...] | None = None  # beside an adapter, see `Description`


def projector_type(source: Source | None, file: Path | None, requested: str | None) -> str:
    """The type of the projector in `file`, or of a fresh one.

    Names tell the number of layers but not the activation: a requested type counts if it has just these names.
    """
    if source is None:
        return requested or "mlp2x_gelu"
    leaves = set(source.leaves("projector"))
    if requested and _is_stored_as(requested, leaves):
        return requested
    linears = {leaf.split(".")[0] for leaf in leaves if re.fullmatch(r"linear_\d+\..+", leaf)}
    if not linears:
        raise UserError(f"{file}: no projector (multi_modal_projector.linear_1.weight or model.mm_projector.0.weight)")
    found = "linear" if len(linears) == 1 else f"mlp{len(linears)}x_gelu"
    refuse_contradiction(str(file), "--projector-type", requested, found)
    return found


def _is_stored_as(projector_type: str, leaves: set[str]) -> bool:
    kinds = [kind for pattern, kind in PROJECTORS.items() if re.fullmatch(pattern, projector_type)]
    return any({leaf for e in kind.entries(projector_type) for leaf in e.leaves()} == leaves for kind in kinds)


def has_identity(source: Source, config: LlavaConfig) -> bool:
    """Whether linear_2 of two is the identity, as transformers' files have it for a linear projector."""
    if config.projector_type != "mlp2x_gelu":
        return False
    weight, bias = source.get("projector", "linear_2.weight"), source.get("projector", "linear_2.bias")
    return np.array_equal(weight, np.eye(len(weight), dtype=weight.dtype)) and not bias.any()


def check_tensors(config: LlavaConfig, *held: tuple[Path, Source, tuple[str, ...]]) -> None:
    """Raises UserError that lists what is wrong with the tensors of these (path, source, parts), or names a tied head
    that is not the embeddings."""
    found = [(path, source.problems(config, parts)) for path, source, parts in held]
    if problems := [f"{path}: {'; '.join(problems)}" for path, problems in found if problems]:
        raise UserError("; ".join(problems))
    for path, source, parts in held:
        if "head" in parts and config.text.tie_word_embeddings and TIED_HEAD in source:
            head, embeddings = source.get(*TIED_HEAD), source.get("llm", "embed_tokens.weight")
            if head.dtype != embeddings.dtype or not np.array_equal(head, embeddings):
                raise UserError(f"{path}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight")


def refuse_contradiction(where: str, flag: str, requested: Any, found: Any) -> None:
    if requested not in (None, found):
        raise UserError(f"{where}: has {found}, not {requested}: leave {flag} out")
