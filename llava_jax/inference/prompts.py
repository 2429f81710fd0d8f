"""Prompts in batches of few shapes, whatever they share computed once."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray | str | os.PathLike  # an array is a picture as the model sees it

SHORTEST = 16  # tokens that a row has room for at least


class Prompt(NamedTuple):
    """A request as ids: int32[L], with image_feature_index as in `data.tokenization.Segment`, and its pictures."""

    tokens: np.ndarray
    image_feature_index: np.ndarray
    pictures: Sequence[Picture]
    begun: str = ""  # what the answer continues, which the prompt ends with


class PromptBatch(NamedTuple):
    """Prompts padded on the right; the rows share the image slots, as one group of the training layout."""

    tokens: np.ndarray  # int32[B, T], 0 where there is none
    lengths: np.ndarray  # int32[B], at least 1
    images: np.ndarray | None  # uint8[1, I, H, W, 3]; None where no prompt has a picture
    image_feature_index: np.ndarray  # int32[B, T]


class Shared(NamedTuple):
    """Prompts cut in two: beginnings, each there once, and ends."""

    beginnings: list[Prompt]
    ends: list[Prompt]
    beginning_of: np.ndarray  # int32, for each end


def bucket(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n: few shapes, at most half of them waste."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power > 2 and n <= power * 3 // 4 else power


def padded_shape(prompts: Sequence[Prompt]) -> tuple[int, int]:
    """(B, T) of a batch of these prompts."""
    return bucket(len(prompts)), bucket(max(SHORTEST, *(len(prompt.tokens) for prompt in prompts)))


def assemble(prompts: Sequence[Prompt], image_tokens: int, read: Callable[[Picture], np.ndarray]) -> PromptBatch:
    """Pads the prompts to a batch. `read` makes uint8[H, W, 3], once of each distinct picture."""
    B, T = padded_shape(prompts)
    tokens, lengths, index = np.zeros((B, T), np.int32), np.ones(B, np.int32), np.full((B, T), -1, np.int32)
    slots: dict[Any, int] = {}
    pictures: list[np.ndarray] = []
    for row, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        tokens[row, :length], lengths[row] = prompt.tokens, max(length, 1)
        for picture in prompt.pictures:
            if _key(picture) not in slots:
                slots[_key(picture)] = len(pictures)
                pictures.append(read(picture))
        own_slots = np.array([slots[_key(picture)] for picture in prompt.pictures] + [0])
        ordinal, patch = np.divmod(prompt.image_feature_index, image_tokens)  # -1 gives ordinal -1, the 0 at the end
        shared_index = own_slots[ordinal] * image_tokens + patch
        index[row, :length] = np.where(prompt.image_feature_index >= 0, shared_index, -1)
    if not pictures:
        return PromptBatch(tokens, lengths, None, index)
    images = np.zeros((1, bucket(len(pictures)), *pictures[0].shape), np.uint8)
    images[0, : len(pictures)] = pictures
    return PromptBatch(tokens, lengths, images, index)


def share_beginnings(prompts: Sequence[Prompt]) -> Shared | None:
    """Cuts each prompt after its last picture, since benchmarks ask many questions about one.

    None where that would save less than half of the positions to compute.
    """
    numbers: dict[Any, int] = {}
    beginnings, ends, beginning_of = [], [], []
    for prompt in prompts:
        tokens, index, pictures = prompt[:3]
        cut = int(np.max(np.flatnonzero(index >= 0), initial=-1)) + 1
        key = (tokens[:cut].tobytes(), index[:cut].tobytes(), *map(_key, pictures))
        if key not in numbers:
            numbers[key] = len(beginnings)
            beginnings.append(Prompt(tokens[:cut], index[:cut], pictures))
        ends.append(Prompt(tokens[cut:], index[cut:], ()))
        beginning_of.append(numbers[key])
    shared = np.prod(padded_shape(beginnings)) + np.prod(padded_shape(ends))
    if 2 * shared > np.prod(padded_shape(prompts)) or not all(len(end.tokens) for end in ends):
        return None
    return Shared(beginnings, ends, np.array(beginning_of, np.int32))


def _key(picture: Picture) -> Any:
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else id(picture)
