"""The prefix cache: finds out which tokens and images of a prompt the device holds already, by their content."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.cli import UserError
from llava_jax.data.features import NEWLINE, TEXT
from llava_jax.inference.adapters import Adapter
from llava_jax.inference.requests import Request

Text = str | Sequence[int]  # or its token ids


class PreparedPrompt(NamedTuple):
    """A request as token ids and preprocessed images, for any number of answers."""

    request: Request
    tokens: np.ndarray  # int32[L]
    image_feature_index: np.ndarray  # int32[L]: tile of the request x P + patch, or TEXT or NEWLINE of `data.features`
    contents: np.ndarray  # int64[L]: from the adapter, and the token or (a negative number) the tile and the patch
    tiles: Sequence[np.ndarray]  # of the images, uint8[H, W, 3] each
    digests: Sequence[bytes]  # of the tiles
    adapter: Adapter  # that answers it

    def extended(self, tokens: Sequence[int]) -> np.ndarray:
        """`contents`, and those of tokens of the answer."""
        return np.concatenate([self.contents, _of_version(np.array(tokens, np.int64), self.adapter)])


def prepare(adapter: Adapter, request: Request) -> PreparedPrompt:
    """Tokenizes a request, preprocesses its images and hashes them. Raises `UserError` for a malformed request and for
    a missing or damaged image."""
    prompts = adapter.prompts
    prompt = prompts.encode(request)
    several = len(request.images) > 1
    preprocessed = {id(image): prompts.read(image, several).tiles for image in request.images}
    tiles = [tile for image in request.images for tile in preprocessed[id(image)]]
    digests = [hashlib.blake2b(tile.tobytes(), digest_size=16).digest() for tile in tiles]
    contents, index = prompt.tokens.astype(np.int64), prompt.image_feature_index
    for number, digest in enumerate(digests):
        own = index // prompts.config.image_tokens == number
        first = np.frombuffer(digest, np.int64, count=1)
        contents[own] = (first + index[own] % prompts.config.image_tokens) | np.iinfo(np.int64).min
    contents[index == NEWLINE] = np.iinfo(np.int64).min
    contents = _of_version(contents, adapter)
    return PreparedPrompt(request, prompt.tokens, index, contents, tiles, digests, adapter)


def prepare_text(adapter: Adapter, text: Text, special: bool = True) -> PreparedPrompt:
    """A text or token ids as they are; a text gets the tokenizer's BOS if `special`. Raises `UserError`."""
    prompts = adapter.prompts
    if isinstance(text, str):
        ids = prompts.tokenizer.encode(text, add_special_tokens=special)
    else:
        ids, vocabulary = list(text), prompts.config.text.vocab_size
        if unknown := [token for token in ids if not 0 <= token < vocabulary]:
            raise UserError(f"token {unknown[0]} is none of the model: it has 0 to {vocabulary - 1}")
        text = prompts.tokenizer.decode(ids)
    if not ids:
        raise UserError("the prompt is empty")
    tokens = np.array(ids, np.int32)
    contents = _of_version(tokens.astype(np.int64), adapter)
    request = Request([("user", text)], begun=text)
    return PreparedPrompt(request, tokens, np.full(len(ids), TEXT, np.int32), contents, (), (), adapter)


def _of_version(contents: np.ndarray, adapter: Adapter) -> np.ndarray:
    """Makes contents differ from those of other adapters, whose keys and values are others. Tokens have 32 bits."""
    return contents ^ (adapter.version << 32)


class Placement(NamedTuple):
    """Where a prompt goes: `row` holds its first `reused` positions, once `source`, if any, is copied there."""

    row: int
    reused: int
    source: int | None = None


class PrefixCache:
    """The contents of the rows of a KV cache. A row whose answer is finished keeps them until the row is needed; the
    least recently used one is taken first."""

    def __init__(self, rows: int):
        self._contents = [np.zeros(0, np.int64) for _ in range(rows)]
        self._idle = OrderedDict.fromkeys(range(rows))  # the least recently used first

    def allocate(self, contents: np.ndarray) -> Placement:
        """A row for a prompt. At least one row must be idle."""
        common = [common_length(held, contents[:-1]) for held in self._contents]  # the last position gives a token
        best = int(np.argmax(common))
        oldest, reused = next(iter(self._idle)), common[best]
        lost = len(self._contents[best]) - reused
        if reused == 0 or best == oldest:
            placement = Placement(oldest, common[oldest])
        elif best in self._idle and lost <= reused:
            placement = Placement(best, reused)
        else:
            placement = Placement(oldest, reused, source=best)
        del self._idle[placement.row]
        self._contents[placement.row] = contents[: placement.reused]
        return placement

    def known(self, contents: np.ndarray) -> int:
        """The positions of a prompt that are in the cache."""
        return max(common_length(held, contents[:-1]) for held in self._contents)

    def update(self, row: int, contents: np.ndarray) -> None:
        """The row holds these positions now, and other prompts may reuse them."""
        self._contents[row] = contents

    def release(self, row: int) -> None:
        """The row's answer is finished."""
        self._idle[row] = None


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the common prefix."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


class LruIndex:
    """Gives the n most recently used keys the numbers 0 ... n - 1."""

    def __init__(self, n: int):
        self._numbers: OrderedDict[Hashable, int] = OrderedDict((object(), number) for number in range(n))

    def find(self, key: Hashable) -> tuple[int, bool]:
        """-> the key's number, and whether it had it already."""
        known = key in self._numbers
        number = self._numbers.pop(key) if known else self._numbers.popitem(last=False)[1]
        self._numbers[key] = number
        return number, known
