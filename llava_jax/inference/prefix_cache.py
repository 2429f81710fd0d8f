"""The prefix cache: finds out which tokens and images of a prompt the device holds already, by their content."""

import dataclasses
import hashlib
import itertools
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


@dataclasses.dataclass(eq=False)
class Held:
    """A sequence in the cache: the contents of its first positions, and its pages in order, which may be more."""

    contents: np.ndarray
    pages: list[int]
    most: int  # pages in all that it may need


class Placement(NamedTuple):
    """Where a prompt goes: `held` has its first positions, once page `copy[0]` is copied to `copy[1]`, if given."""

    held: Held
    copy: tuple[int, int] | None


class PrefixCache:
    """What the pages of a KV cache hold. Sequences that begin in the same way share pages.

    An answer gets pages as it becomes longer. When it is finished, its sequence is kept until pages are needed; the
    least recently used one is given up first. Answers together may need more pages than there are. So a page is given
    only if all running answers can still end one after another, however long they become (the banker's algorithm,
    Dijkstra 1965); otherwise the answer waits until another one ends.
    """

    def __init__(self, pages: int, size: int):
        self._size = size  # S, positions of a page
        self._users = np.zeros(pages, int)  # sequences that have each page
        self._free = list(range(pages))[::-1]
        self._running: list[Held] = []
        self._kept: list[Held] = []  # the least recently used first

    @property
    def in_use(self) -> int:
        """The number of pages of running answers."""
        return len({page for held in self._running for page in held.pages})

    def begin(self, contents: np.ndarray, longest: int) -> Placement | None:
        """Pages for a prompt, whose answer ends at position `longest` at the latest; None if it has to wait."""
        source, known = self._closest(contents[:-1])  # the last position gives a token
        whole = known // self._size
        held = Held(contents[:known], source.pages[:whole] if source else [], -(-longest // self._size))
        copied = source.pages[whole] if known % self._size else None
        self._running.append(held)
        self._users[held.pages] += 1
        if not self.extend(held, len(contents), copied):
            held.contents, copied = contents[: whole * self._size], None  # maybe without the page to be copied
            if not self.extend(held, len(contents)):
                self._running.remove(held)
                self._give_back(held.pages)
                return None
        if source in self._kept:
            self._kept.remove(source)
            if known < len(source.contents):
                self._kept.append(source)
            else:  # it is continued: nothing else can begin with more of it
                self._give_back(source.pages)
        return Placement(held, None if copied is None else (copied, held.pages[whole]))

    def extend(self, held: Held, positions: int, copied: int | None = None) -> bool:
        """Gives a running sequence the pages for so many positions, not page `copied`, or returns False: it has to
        wait."""
        wanted = -(-positions // self._size) - len(held.pages)
        if wanted <= 0:
            return True
        if not self._is_safe(held, wanted, copied):
            return False
        pinned = [] if copied is None else [copied]
        self._users[pinned] += 1
        while len(self._free) < wanted:
            self._give_back(self._kept.pop(0).pages)
        new = [self._free.pop() for _ in range(wanted)]
        self._give_back(pinned)
        self._users[new] += 1
        held.pages += new
        return True

    def _is_safe(self, held: Held, wanted: int, copied: int | None) -> bool:
        """Whether all running sequences can end one after another if this one gets so many of the pages that they don't
        have, nor is page `copied`."""
        users = np.zeros(len(self._users), int)
        for each in self._running:
            users[each.pages] += 1
        unused = int((users == 0).sum()) - wanted - (copied is not None and users[copied] == 0)
        if unused < 0:
            return False
        left = {id(each): each.most - len(each.pages) - wanted * (each is held) for each in self._running}
        for each in sorted(self._running, key=lambda each: left[id(each)]):
            if left[id(each)] > unused:
                return False
            users[each.pages] -= 1
            unused += int((users[each.pages] == 0).sum()) + wanted * (each is held)
        return True

    def end(self, held: Held) -> None:
        """The answer is finished. Its sequence is kept, if it has a page of its own."""
        self._running.remove(held)
        used = -(-len(held.contents) // self._size)
        self._give_back(held.pages[used:])
        del held.pages[used:]
        if (self._users[held.pages] == 1).any():
            self._kept.append(held)
        else:
            self._give_back(held.pages)

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def known(self, contents: np.ndarray) -> int:
        """The positions of a prompt that are in the cache."""
        return self._closest(contents[:-1])[1]

    def _closest(self, contents: np.ndarray) -> tuple[Held | None, int]:
        """The sequence that begins with most of these positions, and how many they are."""
        closest, length = None, 0
        for held in itertools.chain(self._running, self._kept):
            if length >= min(len(held.contents), len(contents)) or held.contents[length] != contents[length]:
                continue  # it has no more in common
            if (common := common_length(held.contents, contents)) > length:
                closest, length = held, common
        return closest, length


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
