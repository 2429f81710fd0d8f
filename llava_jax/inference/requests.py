"""Requests to a model, and sampling options. Imports no JAX: commands check their options before they import it."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data.features import Features

MAX_LOGPROBS = 20  # alternatives to a token


class PreparedImage(NamedTuple):
    """A preprocessed image, see `PromptEncoder.read`.

    Attributes:
      tiles: uint8[tiles, H, W, 3]; one tile without AnyRes.
      features: what it has in the sequence.
    """

    tiles: np.ndarray
    features: Features


ImageInput = Image.Image | PreparedImage | str | os.PathLike
"""An image, or the path of its file."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversation that the model answers.

    Attributes:
      turns: (role, text) of the conversation as `data.conversation.render` takes them; the last is the user's. Each
        `<image>` in a text is the place of an image. For models that were trained with images before the text,
        `PromptEncoder` moves these marks there.
      images: one for each `<image>`, in order. Give an image that occurs several times as the same path or object: it
        is then read once.
      begun: text that the answer continues. It is not part of the answer.
    """

    turns: Sequence[tuple[str, str]]
    images: Sequence[ImageInput] = ()
    begun: str = ""

    def __str__(self) -> str:
        question = " ".join(self.turns[-1][1].split()) if self.turns else ""
        return repr(question if len(question) <= 40 else question[:37] + "...")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, and how many at most.

    Attributes:
      temperature: 0 is greedy: the most likely token is taken.
      top_p: samples among the most likely tokens whose probabilities together reach it (Holtzman et al. 2020).
      seed: equal seeds give equal answers to equal prompts.
      max_new_tokens: of an answer.
      top_k: samples among this many most likely tokens; 0 for no limit.
      stop: strings that end the answer, besides those of the template. They are not part of the answer.
      logprobs: how many alternatives to each token are reported, None for no report. Only the engine reports them.

    Raises `UserError` for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512
    top_k: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it has to be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}: it has to be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens is {self.max_new_tokens}: it has to be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: it has to be 0 or more and below 2^32")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: it has to be 0 (no limit) or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}: it has to be 0 to {MAX_LOGPROBS}")
        if not all(self.stop):
            raise UserError("stop: an empty string would end every answer before it begins")


GREEDY = Sampling()
