"""Projectors: the W of the paper (section 4.1). A kind of projector is a module that registers one `ProjectorKind`."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

from flax import nnx

from llava_jax.models.hf_names import Entry
from llava_jax.models.registry import PROJECTORS, registers


class ProjectorKind(ABC):
    """Projectors of some `projector_type`s. mlp.py has those of the published models."""

    pattern: str  # regular expression of the `projector_type`s, matched as a whole
    # The `projector_hidden_act` of a LLaVA of transformers -> the `projector_type` that computes the same. Transformers
    # has no other projectors: a model with another one cannot be exported to it.
    hf_types: Mapping[str, str] = {}
    # Of parameters that `parallel.sharding.PARAMETER_AXES` has no pattern for.
    parameter_axes: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    @abstractmethod
    def build(self, projector_type: str, in_features: int, features: int, rngs: nnx.Rngs) -> nnx.Module:
        """The Flax module, which maps [..., in_features] to [..., features]."""

    @abstractmethod
    def entries(self, projector_type: str) -> list[Entry]:
        """Our parameters (`projector.linear_1.kernel`) and transformers' (`linear_1.weight`), layer by layer."""


register = registers(PROJECTORS)


def projector_kind(projector_type: str) -> ProjectorKind:
    """The kind of a `projector_type` that a `LlavaConfig` has, which has checked it."""
    return next(kind for pattern, kind in PROJECTORS.items() if re.fullmatch(pattern, projector_type))
