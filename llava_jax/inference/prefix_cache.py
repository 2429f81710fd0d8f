"""Which conversations the cache holds, and which pictures' features: what was computed is found again by content."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.inference.generate import PromptEncoder, Request


class PreparedPrompt(NamedTuple):
    """A request as ids and pixels, and what tells its positions from others."""

    tokens: np.ndarray  # int32[L]
    features: np.ndarray  # int32[L]: number of the picture in the request x P + patch, -1 for text
    contents: np.ndarray  # int64[L]: the token, or below 0 what a patch of this picture's content has for one
    pixels: Sequence[np.ndarray]  # of each picture
    digests: Sequence[bytes]


def prepare(prompts: PromptEncoder, request: Request) -> PreparedPrompt:
    """Raises UserError where the request is malformed or a picture damaged."""
    prompt = prompts.encode(request)
    read: dict[int, np.ndarray] = {id(picture): prompts.read(picture) for picture in request.images}
    pixels = [read[id(picture)] for picture in request.images]
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
    contents = prompt.tokens.astype(np.int64)
    for number, digest in enumerate(digests):
        own = prompt.image_feature_index // prompts.config.image_tokens == number
        first = np.frombuffer(digest, np.int64, count=1)
        contents[own] = (first + np.arange(own.sum())) | np.iinfo(np.int64).min
    return PreparedPrompt(prompt.tokens, prompt.image_feature_index, contents, pixels, digests)


class Place(NamedTuple):
    """Where a prompt goes: its first `reused` positions are there already, once `source` is copied if there is one."""

    conversation: int
    reused: int
    source: int | None = None


class Shelf:
    """Conversations by their number in the cache, those that are over included, until their place is needed.

    The longest unused ones go first.
    """

    def __init__(self, conversations: int):
        self._contents = [np.zeros(0, np.int64) for _ in range(conversations)]
        self._idle = OrderedDict.fromkeys(range(conversations))  # the longest unused first

    def take(self, contents: np.ndarray) -> Place:
        """A place for a prompt. One that is idle has to be there."""
        begun = [_common(held, contents[:-1]) for held in self._contents]  # the last one's computation gives a token
        best = int(np.argmax(begun))
        oldest, reused = next(iter(self._idle)), begun[best]
        lost = len(self._contents[best]) - reused
        if reused == 0 or best == oldest:
            place = Place(oldest, begun[oldest])
        elif best in self._idle and lost <= reused:
            place = Place(best, reused)
        else:
            place = Place(oldest, reused, source=best)
        del self._idle[place.conversation]
        self._contents[place.conversation] = contents[: place.reused]
        return place

    def holds(self, conversation: int, contents: np.ndarray) -> None:
        """These are there by now, and may be shared."""
        self._contents[conversation] = contents

    def give_back(self, conversation: int) -> None:
        self._idle[conversation] = None


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many elements both begin with."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


class Places:
    """Numbers 0 ... n - 1 for what is used most recently."""

    def __init__(self, n: int):
        self._numbers: OrderedDict[Hashable, int] = OrderedDict((object(), number) for number in range(n))

    def find(self, key: Hashable) -> tuple[int, bool]:
        """-> its number, and whether it had it already."""
        known = key in self._numbers
        number = self._numbers.pop(key) if known else self._numbers.popitem(last=False)[1]
        self._numbers[key] = number
        return number, known
