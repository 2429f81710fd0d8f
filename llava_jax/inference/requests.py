"""Requests to a model, and sampling options. Imports no JAX: commands check their options before they import it."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data.features import Features

if TYPE_CHECKING:
    from llava_jax.inference.constraints import Constraint

MAX_LOGPROBS = 20  # alternatives to a token
MAX_BIASES = 1024  # of `Sampling.logit_bias`
WORD = 32  # tokens whose bits are in a number of a mask
ENGINE_ONLY = ("logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
ENGINE_ONLY += ("stop_token_ids", "ignore_eos", "constraint", "verbatim")  # fields of `Sampling`


class PreparedImage(NamedTuple):
    """A preprocessed image, see `PromptEncoder.read`."""

    tiles: np.ndarray  # uint8[tiles, H, W, 3]; one tile without AnyRes
    features: Features  # what it has in the sequence


ImageInput = Image.Image | PreparedImage | str | os.PathLike
"""An image, or the path of its file."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversation that the model answers."""

    # (role, text) as `data.conversation.render` takes them; the last is the user's. Each `<image>` in a text is the
    # place of an image. For models that were trained with images before the text, `PromptEncoder` moves it there.
    turns: Sequence[tuple[str, str]]
    # One for each `<image>`, in order. One that occurs several times as the same path or object is read once.
    images: Sequence[ImageInput] = ()
    begun: str = ""  # text that the answer continues, and that is not part of it

    def __str__(self) -> str:
        question = " ".join(self.turns[-1][1].split()) if self.turns else ""
        return repr(question if len(question) <= 40 else question[:37] + "...")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, and how many at most. Raises `UserError` for values out of range."""

    temperature: float = 0.0  # 0 is greedy: the most likely token is taken
    top_p: float = 1.0  # samples among the most likely tokens that together reach it (Holtzman et al. 2020)
    seed: int = 0  # equal seeds give equal answers to equal prompts
    max_new_tokens: int = 512  # of an answer
    top_k: int = 0  # samples among this many most likely tokens; 0 for no limit
    stop: tuple[str, ...] = ()  # strings that end the answer, besides those of the template; they are not part of it
    # Samples among the tokens that have at least this share of the most likely one's probability (Nguyen et al. 2024),
    # after `top_k` and `top_p`.
    min_p: float = 0.0

    # Only the engine (`inference.engine`) takes these.
    logprobs: int | None = None  # how many alternatives to each token are reported, None for no report
    # Scores of tokens of the prompt and of the answer are divided by it, negative ones multiplied (Keskar et al. 2019).
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # is subtracted from the scores of tokens of the answer
    frequency_penalty: float = 0.0  # is subtracted from them for each time that a token was generated
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its score), before the penalties
    stop_token_ids: tuple[int, ...] = ()  # tokens that end the answer, besides those of the template
    ignore_eos: bool = False  # neither the stop tokens nor the end mark of the template end the answer
    constraint: "Constraint | None" = None  # what the answer has to look like, see `inference.constraints`
    # White space at both ends and the text of the template's end mark are part of the answer; always with a constraint.
    verbatim: bool = False

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
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p is {self.min_p}: it has to be 0 (no limit) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition-penalty is {self.repetition_penalty}: it has to be above 0")
        if not (math.isfinite(self.presence_penalty) and math.isfinite(self.frequency_penalty)):
            raise UserError("presence-penalty and frequency-penalty have to be finite")
        if len(self.logit_bias) > MAX_BIASES or not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise UserError(f"logit-bias: it has to be finite numbers for at most {MAX_BIASES} tokens")
        if self.constraint is not None and self.ignore_eos:
            raise UserError("ignore-eos: an answer that has to look like something ends where it does")

    @property
    def changes_scores(self) -> bool:
        """Whether other scores are sampled from than those of the model."""
        own = self.repetition_penalty, self.presence_penalty, self.frequency_penalty, self.logit_bias, self.constraint
        return own != (1, 0, 0, (), None)

    def check_plain(self) -> None:
        """Raises `UserError` for options that only the engine takes."""
        if names := [name for name in ENGINE_ONLY if getattr(self, name) != getattr(Sampling, name)]:
            raise UserError(f"sampling with {', '.join(names)} needs the engine: llava_jax.inference.engine.Engine")


GREEDY = Sampling()
