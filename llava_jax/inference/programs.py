"""The engine's programs, which have fixed shapes and are compiled ahead, and the arrays that they work on.

Axes: B slots, T tokens, D embed, P patches an image (or tile), C pages of the cache, M pages of an answer, I images (or
tiles) whose features are cached.
"""

import contextlib
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.cli import UserError, say
from llava_jax.data.features import TEXT
from llava_jax.inference.decoding import RowSampling, Sampled, Slots, decode, sample, with_logprobs
from llava_jax.inference.quantization import quantize_decoder
from llava_jax.inference.scores import ScoreRules, ruled
from llava_jax.models import batched_lora
from llava_jax.models.config import LoraConfig
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava, Params
from llava_jax.parallel.sharding import FSDP_RINGS, RULES, axis_sizes, replicated

CHUNK_SIZES = (16, 32, 64, 128, 256)  # tokens of a prompt that are computed at a time
PIECES, PIECE = 16, 16  # of several prompts, and tokens of each: as many positions as the largest chunk has
SHAPES = (*((1, size) for size in CHUNK_SIZES), (PIECES, PIECE))  # of the tokens of a dispatch of `prefill`
PAGE = 256  # positions of a page of the KV cache, which attention computes at a time
MEMORY_SHARE = 0.9  # of the free memory, that the cache may take
ROWS = (2, 4, 8, 16, 32)  # that a dispatch of `decode` may have, besides all slots; CPUs sum differently for one row
MAX_STEPS = 8  # tokens of an answer that one call of `decode` can generate
DECODE, ENCODE, COPY = "decode", "encode", "copy"


class PromptChunk(NamedTuple):
    """Consecutive tokens of a prompt, or B pieces of one or several prompts; [B, T] is one of `SHAPES`."""

    tokens: np.ndarray  # int32[B, T], 0 in padding
    features: np.ndarray  # int32[B, T]: cached tile x P + patch, or TEXT or NEWLINE of `data.features`
    starts: np.ndarray  # int32[B], the positions of the first tokens
    lengths: np.ndarray  # int32[B], without padding
    pages: np.ndarray  # int32[B, M], of the cache, that hold the prompts
    adapters: np.ndarray  # int32[B], of the prompts, see `models.batched_lora`
    sampling: RowSampling  # [B]
    rules: ScoreRules  # [B], of the tokens after them

    @classmethod
    def padding(cls, shape: tuple[int, int], pages: int, rules: ScoreRules) -> "PromptChunk":
        """To be set, NumPy arrays; `pages` is M."""
        B, (starts, lengths, adapters) = shape[0], np.zeros((3, shape[0]), np.int32)
        tokens, features = np.zeros(shape, np.int32), np.full(shape, TEXT, np.int32)
        return cls(
            *(tokens, features, starts, lengths, np.zeros((B, pages), np.int32), adapters),
            *(RowSampling.greedy(B), rules),
        )

    def set(
        self, b: int, tokens: np.ndarray, features: np.ndarray | int, start: int, pages: Sequence[int], adapter: int
    ) -> None:
        """Sets piece b."""
        length = len(tokens)
        self.tokens[b, :length], self.features[b, :length] = tokens, features
        self.starts[b], self.lengths[b], self.adapters[b] = start, length, adapter
        self.pages[b, : len(pages)] = pages


class Programs:
    """The programs below compiled for a model, with the KV cache and the cached features of images.

    Attributes:
      sizes: rows that a dispatch of `decode` may have; all slots, and after `find_sizes` also fewer.
      joins: of `CHUNK_SIZES`, whose positions may be pieces of a dispatch with other prompts; see `find_sizes`.
      no_rules: for so many rows, on the device.
      pages: C, of the cache. Fewer than wanted where the memory has no room for them.
      most_pages: M, that an answer may need.

    Raises `UserError` where the memory has no room for one answer, or for a page for each slot.
    """

    def __init__(
        self,
        model: Llava,  # its layers are rearranged for decoding
        *,
        slots: int,  # B
        answers: int,  # for how many of all positions pages are wanted
        cache_bytes: int | None = None,  # that they may take on a device; no more than `MEMORY_SHARE` in any case
        positions: int,  # of an answer and its prompt, rounded up to whole pages
        images: int,  # I
        stop_ids: list[int],  # tokens that end answers
        int8: bool = False,  # whether the decoder's weights are stored in eight bits, see `inference.quantization`
        mesh: Mesh | None = None,  # over which the model's parameters are sharded
        adapters: int = 0,  # how many there is room for, see `models.batched_lora`
        adapter_rank: int = 0,  # the largest that they may have
    ):
        text = model.config.text
        if adapters:
            batched_lora.attach(model, adapters, adapter_rank, mesh)
        model.unstack_layers(transposed=slots == 1 and not int8)
        if int8:
            quantize_decoder(model.llm)
        self.slots, self.most_pages = slots, -(-positions // PAGE)
        self.positions = self.most_pages * PAGE
        self.images, self.image_tokens, self.vocabulary = images, model.config.image_tokens, text.vocab_size
        self._weights, self._structure = jax.tree.flatten(model)
        self._compiled: dict[str | tuple[int, int], Callable] = {}
        self._compiling = threading.Lock()

        features_shape = (images, self.image_tokens, text.hidden_size)
        features = jax.ShapeDtypeStruct(features_shape, model.dtype, sharding=mesh and replicated(mesh))
        sharding = _cache_sharding(mesh, text.num_kv_heads)
        page = jax.ShapeDtypeStruct((1, text.num_kv_heads, PAGE, text.head_dim), model.dtype, sharding=sharding)
        free = free_bytes(mesh.devices.flat[0] if mesh else jax.devices()[0]) - _device_bytes(features)
        self.pages = self._page_count(answers, 2 * text.num_layers * _device_bytes(page), free, cache_bytes)
        entries = page.update(shape=(self.pages, *page.shape[1:]))
        cache = KVCache(*((entries,) * text.num_layers for _ in "kv"))
        image = np.zeros((model.config.vision.image_size, model.config.vision.image_size, 3), np.uint8)
        self._shapes = cache, features
        self._stop_ids = np.array(stop_ids, np.int32)

        number, flag = np.int32(0), np.bool(False)
        # Not committed to a device: the compiler chooses how they are sharded over a mesh.
        self.sizes, self.joins = [slots], set()
        fewer = [size for size in ROWS if size < slots]
        self.no_rules = {rows: jax.tree.map(jnp.asarray, self.new_rules(rows)) for rows in {1, PIECES, *fewer, slots}}
        # Each with its arguments after the model, of which the first is donated.
        self._programs: dict[str | tuple[int, int], tuple] = {
            ENCODE: (encode, features, image, number, number),
            COPY: (copy, cache, number, number),
        }
        for size in (*fewer, slots):
            some_slots, program = self.idle_slots(size), functools.partial(decode, max_steps=MAX_STEPS)
            self._programs[f"{DECODE} {size}"] = (program, cache, some_slots, self._stop_ids, number, flag)
        for shape in SHAPES if slots > 1 else SHAPES[:-1]:
            self._programs[shape] = (prefill, cache, features, self.new_chunk(shape), flag)
        self.names = list(self._programs)
        self.reset()

    def _page_count(self, answers: int, page_bytes: int, free: float, cache_bytes: int | None) -> int:
        """Those of so many answers with all positions, or as many as there is memory for on a device."""
        limit = max(MEMORY_SHARE * free, 0.0)
        if given := cache_bytes is not None and cache_bytes < limit:
            limit = cache_bytes
        room, wanted = int(limit // page_bytes), answers * self.most_pages
        one_answer = self.most_pages + 1  # and the page of which it may begin with a copy, see `prefix_cache`
        if (least := max(one_answer, self.slots)) > room:
            what, option = f"{self.positions} positions", "--context"
            if self.slots > one_answer:
                what, option = f"{self.slots} slots", "--slots"
            raise UserError(
                f"{what} take {least * page_bytes / 2**30:.2f} GB for keys and values at least, and there is room for "
                f"{limit / 2**30:.2f} GB: lower {option}{' or raise --cache-mb' if given else ''}"
            )
        if room < wanted and not given:
            say(
                f"keys and values get {room * PAGE:,} positions, as the free memory allows, for {self.slots} slots of "
                f"{self.positions:,}: long answers may wait for each other",
                file=sys.stderr,
            )
        return min(max(wanted, one_answer), room)

    def new_chunk(self, shape: tuple[int, int], rules: ScoreRules | None = None) -> PromptChunk:
        """Padding, to be set."""
        return PromptChunk.padding(shape, self.most_pages, rules or self.no_rules[shape[0]])

    def new_rules(self, rows: int) -> ScoreRules:
        """Neutral ones, to be set."""
        return ScoreRules.neutral(rows, self.vocabulary, self.positions)

    def idle_slots(self, rows: int) -> Slots:
        """Neutral ones, to be set."""
        tokens, limits, adapters = (np.zeros(rows, np.int32) for _ in range(3))
        idle, endless = np.full(rows, self.positions, np.int32), np.zeros(rows, bool)
        pages, rules = np.zeros((rows, self.most_pages), np.int32), self.no_rules[rows]
        return Slots(tokens, idle, limits, pages, RowSampling.greedy(rows), adapters, rules, endless)

    def find_sizes(self) -> None:
        """Finds out with how many rows a dispatch gives the same bits as one with all slots, and which chunks of a
        prompt give those of pieces: texts must not depend on other requests. Overwrites pages of the cache."""
        if self.slots == 1:
            return
        tokens = np.random.default_rng(0).integers(0, self.vocabulary, CHUNK_SIZES[-1], np.int32)
        some = tokens[: 4 * PIECE]
        pieces = self._probe_prompt((PIECES, PIECE), some)
        self.joins = {size for size in CHUNK_SIZES if self._probe_prompt((1, size), some) == pieces}
        self._probe_prompt((1, len(tokens)), tokens)
        length = min(len(tokens), self.positions - MAX_STEPS)
        expected = self._probe(self.slots, tokens[0], length)
        same = [size for size in ROWS if size < self.slots and self._probe(size, tokens[0], length) == expected]
        self.sizes = [*same, self.slots]

    def _probe_prompt(self, shape: tuple[int, int], tokens: np.ndarray) -> list[bytes]:
        """What a prompt of at most a page gives in dispatches of a shape: the next token, log probabilities, keys and
        values."""
        B, T = shape
        for first in range(0, len(tokens), B * T):
            chunk = self.new_chunk(shape)
            for b, start in enumerate(range(first, min(first + B * T, len(tokens)), T)):
                chunk.set(b, tokens[start : start + T], TEXT, start, range(self.most_pages), 0)
            sampled = self.prefill(chunk, True)
        held = (x_CKSH[0, :, : len(tokens)] for x_CKSH in jax.tree.leaves(self.cache))
        return [np.asarray(x).tobytes() for x in (*(x[b] for x in sampled), *held)]

    def _probe(self, rows: int, token: int, position: int) -> bytes:
        """The tokens and log probabilities that follow the one at a position of what `_probe_prompt` computed."""
        slots = self.idle_slots(rows)
        slots.pages[0] = range(self.most_pages)
        slots.tokens[0], slots.positions[0], slots.limits[0], slots.endless[0] = token, position, self.positions, True
        return b"".join(np.asarray(x[0]).tobytes() for x in self.decode(slots, MAX_STEPS - 1, True))

    def reset(self) -> None:
        """Empties the caches."""
        self.cache = self.features = None  # frees the old arrays before the new ones are made
        self.cache, self.features = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), self._shapes
        )

    def compile(self, name: str | tuple[int, int]) -> Callable:
        """The program of one of `names` without its first argument, the model. Compiled at the first call."""
        with self._compiling:
            if name not in self._compiled:
                program, *arguments = self._programs[name]

                # Weights are passed as a flat list: flattening modules takes longer than a token of a small model.
                def flat(weights: list[jax.Array], *arguments: Any) -> Any:
                    return program(jax.tree.unflatten(self._structure, weights), *arguments)

                self._compiled[name] = jax.jit(flat, donate_argnums=1).lower(self._weights, *arguments).compile()
            return functools.partial(self._compiled[name], self._weights)

    def set_adapter(self, index: int, config: LoraConfig, params: Params) -> None:
        """Makes these the parameters of adapter `index`. Nothing is compiled again, and programs may be running."""
        model = jax.tree.unflatten(self._structure, self._weights)
        batched_lora.write(model, index, config, params)
        self._weights[:] = jax.tree.leaves(model)

    def encode(self, image: np.ndarray, index: int, adapter: int) -> None:
        """Caches the features of an image uint8[H, W, 3] at `index`."""
        self.features = self.compile(ENCODE)(self.features, image, np.int32(index), np.int32(adapter))

    def prefill(self, chunk: PromptChunk, report: bool) -> Sampled:
        """Computes a chunk of prompts -> the tokens after its pieces, [B], on the device: most are not needed."""
        sampled, self.cache = self.compile(chunk.tokens.shape)(self.cache, self.features, chunk, np.bool(report))
        return sampled

    def decode(self, slots: Slots, steps: int, report: bool) -> Sampled:
        """Generates at most `steps` tokens in every slot, as many as one of `sizes` -> [B, MAX_STEPS]."""
        program = self.compile(f"{DECODE} {len(slots.tokens)}")
        sampled, self.cache = program(self.cache, slots, self._stop_ids, np.int32(steps), np.bool(report))
        return jax.device_get(sampled)

    def copy(self, source: int, target: int) -> None:
        """Copies a page of the cache."""
        self.cache = self.compile(COPY)(self.cache, np.int32(source), np.int32(target))


def encode(model: Llava, features_IPD: jax.Array, image: jax.Array, index: jax.Array, adapter: jax.Array) -> jax.Array:
    """The cached features with those of an image at `index`, by the projector of an adapter."""
    batched_lora.use(model, adapter[None])
    return features_IPD.at[index].set(model.encode_images(image[None])[0])


def prefill(
    model: Llava, cache: KVCache, features_IPD: jax.Array, chunk: PromptChunk, report: jax.Array
) -> tuple[Sampled, KVCache]:
    """Adds pieces of prompts to their pages of the cache -> the tokens after them, [B], and the cache."""
    batched_lora.use(model, chunk.adapters)
    (B, T), starts_B1, lengths_B1 = chunk.tokens.shape, chunk.starts[:, None], chunk.lengths[:, None]
    x_BTD = model.embed(chunk.tokens)
    features_BTD = features_IPD.reshape(-1, features_IPD.shape[-1])[jnp.maximum(chunk.features, 0)]
    x_BTD = jnp.where(chunk.features[:, :, None] >= 0, features_BTD, x_BTD)
    x_BTD = model.place_newlines(x_BTD, chunk.features)
    steps_1T = jnp.arange(T)[None]
    padding = chunk.pages.shape[1] * cache.size
    positions_BT = jnp.where(steps_1T < lengths_B1, starts_B1 + steps_1T, padding)
    hidden_BTD, cache = model.llm.extend(x_BTD, positions_BT, cache, chunk.pages)
    logits_BV = model.llm.logits(hidden_BTD[jnp.arange(B), chunk.lengths - 1])
    scores_BV = ruled(logits_BV, chunk.rules, jnp.full((B, 1), -1))
    tokens_B = sample(scores_BV, chunk.starts + chunk.lengths, chunk.sampling)
    return with_logprobs(tokens_B, logits_BV, report, chunk.rules), cache


def copy(model: Llava, cache: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    """The cache with a copy of page `source` as page `target`."""
    return jax.tree.map(lambda x_CKSH: x_CKSH.at[target].set(x_CKSH[source]), cache)


def _device_bytes(array: jax.ShapeDtypeStruct) -> int:
    """What an array takes on a device."""
    shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
    return math.prod(shape) * array.dtype.itemsize


def free_bytes(device: jax.Device) -> int:
    """The free memory of a device; for CPUs, that of the machine."""
    if (stats := device.memory_stats()) and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cache_sharding(mesh: Mesh | None, num_kv_heads: int) -> jax.sharding.Sharding | None:
    """Shards the key/value heads as training does."""
    if mesh is None:
        return None
    sizes = axis_sizes(mesh)
    axis = next((axis for axis in RULES["heads"] if sizes[axis] > 1 and num_kv_heads % sizes[axis] == 0), None)
    return NamedSharding(mesh, P(None, FSDP_RINGS if axis == "fsdp" else axis))
