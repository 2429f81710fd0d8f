"""The engine's programs, which have fixed shapes and are compiled ahead, and the arrays that they work on.

Axes: B slots, T tokens, D embed, P patches an image (or tile), C rows of the cache, I images (or tiles) whose features
are cached.
"""

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.cli import UserError
from llava_jax.data.features import TEXT
from llava_jax.inference.decoding import RowSampling, Sampled, Slots, decode, sample, with_logprobs
from llava_jax.inference.quantization import quantize_decoder
from llava_jax.inference.scores import ScoreRules, ruled
from llava_jax.models import batched_lora
from llava_jax.models.attention import BLOCK
from llava_jax.models.config import LoraConfig
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava, Params
from llava_jax.parallel.sharding import FSDP_RINGS, RULES, axis_sizes, replicated

CHUNK_SIZES = (16, 32, 64, 128, 256)  # tokens of a prompt that are computed at a time
ROWS = (2, 4, 8, 16, 32)  # that a dispatch of `decode` may have, besides all slots; CPUs sum differently for one row
MAX_STEPS = 8  # tokens of an answer that one call of `decode` can generate
DECODE, ENCODE, COPY = "decode", "encode", "copy"


class PromptChunk(NamedTuple):
    """Consecutive tokens of a prompt, T of `CHUNK_SIZES`."""

    tokens: np.ndarray  # int32[T], 0 in padding
    features: np.ndarray  # int32[T]: cached tile x P + patch, or TEXT or NEWLINE of `data.features`
    start: np.ndarray  # int32, the position of the first
    length: np.ndarray  # int32, without padding
    row: np.ndarray  # int32, of the cache
    sampling: RowSampling  # [1]
    adapter: np.ndarray  # int32, of the prompt, see `models.batched_lora`
    rules: ScoreRules  # [1], of the token after it


class Programs:
    """The programs below compiled for a model, with the KV cache and the cached features of images.

    Raises `UserError` where the cache does not fit into memory.
    """

    def __init__(
        self,
        model: Llava,  # its layers are rearranged for decoding
        *,
        slots: int,  # B
        rows: int,  # C, at least B
        positions: int,  # S, which is rounded up
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
        self.slots, self.rows, self.positions = slots, rows, -(-positions // BLOCK) * BLOCK
        self.images, self.image_tokens, self.vocabulary = images, model.config.image_tokens, text.vocab_size
        self._weights, self._structure = jax.tree.flatten(model)
        self._compiled: dict[str | int, Callable] = {}
        self._compiling = threading.Lock()

        entries = jax.ShapeDtypeStruct(
            (rows, text.num_kv_heads, self.positions, text.head_dim),
            model.dtype,
            sharding=_cache_sharding(mesh, text.num_kv_heads),
        )
        self._check_memory(2 * text.num_layers, entries, mesh)
        cache = KVCache(*((entries,) * text.num_layers for _ in "kv"))
        features_shape = (images, self.image_tokens, text.hidden_size)
        features = jax.ShapeDtypeStruct(features_shape, model.dtype, sharding=mesh and replicated(mesh))
        image = np.zeros((model.config.vision.image_size, model.config.vision.image_size, 3), np.uint8)
        self._shapes = cache, features
        self._stop_ids = np.array(stop_ids, np.int32)

        number, flag = np.int32(0), np.bool(False)
        self.sizes = [slots]  # rows that a dispatch of `decode` may have; after `find_sizes` also fewer
        fewer = [size for size in ROWS if size < slots]
        # For so many rows. Not committed to a device: the compiler chooses how they are sharded over a mesh.
        self.no_rules = {rows: jax.tree.map(jnp.asarray, self.new_rules(rows)) for rows in {1, *fewer, slots}}
        # Each with its arguments after the model, of which the first is donated.
        self._programs: dict[str | int, tuple] = {
            ENCODE: (encode, features, image, number, number),
            COPY: (copy, cache, number, number),
        }
        for size in (*fewer, slots):
            some_slots, program = self.idle_slots(size), functools.partial(decode, max_steps=MAX_STEPS)
            self._programs[f"{DECODE} {size}"] = (program, cache, some_slots, self._stop_ids, number, flag)
        for size in CHUNK_SIZES:
            zeros = np.zeros(size, np.int32)
            chunk = PromptChunk(zeros, zeros, number, number, number, RowSampling.greedy(1), number, self.new_rules(1))
            self._programs[size] = (prefill, cache, features, chunk, flag)
        self.names = list(self._programs)
        self.reset()

    def _check_memory(self, count: int, entries: jax.ShapeDtypeStruct, mesh: Mesh | None) -> None:
        """Raises `UserError` where the cache, `count` arrays, is larger than the free memory."""
        shard = entries.sharding.shard_shape(entries.shape) if mesh else entries.shape
        wanted = count * math.prod(shard) * entries.dtype.itemsize
        free = free_bytes(mesh.devices.flat[0] if mesh else jax.devices()[0])
        if wanted > free:
            raise UserError(
                f"{self.slots} slots of {self.positions} positions take {wanted / 2**30:.1f} GB for keys and values, "
                f"and {max(free, 0) / 2**30:.1f} GB are free: lower --slots or --context"
            )

    def new_rules(self, rows: int) -> ScoreRules:
        """Neutral ones, to be set."""
        return ScoreRules.neutral(rows, self.vocabulary, self.positions)

    def idle_slots(self, rows: int) -> Slots:
        """Neutral ones, to be set."""
        tokens, limits, places, adapters = (np.zeros(rows, np.int32) for _ in range(4))
        idle, endless = np.full(rows, self.positions, np.int32), np.zeros(rows, bool)
        rules = self.no_rules[rows]
        return Slots(tokens, idle, limits, places, RowSampling.greedy(rows), adapters, rules, endless)

    def find_sizes(self) -> None:
        """Finds out with how many rows a dispatch gives the same bits as one with all slots: texts must not depend on
        other requests. Overwrites a row of the cache."""
        if min(ROWS) >= self.slots:
            return
        tokens = np.random.default_rng(0).integers(0, self.vocabulary, CHUNK_SIZES[-1], np.int32)
        length = min(len(tokens), self.positions - MAX_STEPS)
        numbers = (np.int32(0), np.int32(length), np.int32(0))
        text = np.full(len(tokens), TEXT, np.int32)
        self.prefill(PromptChunk(tokens, text, *numbers, RowSampling.greedy(1), np.int32(0), self.no_rules[1]), True)
        expected = self._probe(self.slots, tokens[0], length)
        same = [size for size in ROWS if size < self.slots and self._probe(size, tokens[0], length) == expected]
        self.sizes = [*same, self.slots]

    def _probe(self, rows: int, token: int, position: int) -> bytes:
        """The tokens and log probabilities that follow the one at a position of the cache's first row."""
        slots = self.idle_slots(rows)
        slots.tokens[0], slots.positions[0], slots.limits[0], slots.endless[0] = token, position, self.positions, True
        return b"".join(np.asarray(x[0]).tobytes() for x in self.decode(slots, MAX_STEPS - 1, True))

    def reset(self) -> None:
        """Empties the caches."""
        self.cache = self.features = None  # frees the old arrays before the new ones are made
        self.cache, self.features = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype, device=like.sharding), self._shapes
        )

    def compile(self, name: str | int) -> Callable:
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
        """Computes a chunk of a prompt -> the token after it, [1]."""
        sampled, self.cache = self.compile(len(chunk.tokens))(self.cache, self.features, chunk, np.bool(report))
        return jax.device_get(sampled)

    def decode(self, slots: Slots, steps: int, report: bool) -> Sampled:
        """Generates at most `steps` tokens in every slot, as many as one of `sizes` -> [B, MAX_STEPS]."""
        program = self.compile(f"{DECODE} {len(slots.tokens)}")
        sampled, self.cache = program(self.cache, slots, self._stop_ids, np.int32(steps), np.bool(report))
        return jax.device_get(sampled)

    def copy(self, source: int, target: int) -> None:
        """Copies a row of the cache."""
        self.cache = self.compile(COPY)(self.cache, np.int32(source), np.int32(target))


def encode(model: Llava, features_IPD: jax.Array, image: jax.Array, index: jax.Array, adapter: jax.Array) -> jax.Array:
    """The cached features with those of an image at `index`, by the projector of an adapter."""
    batched_lora.use(model, adapter[None])
    return features_IPD.at[index].set(model.encode_images(image[None])[0])


def prefill(
    model: Llava, cache: KVCache, features_IPD: jax.Array, chunk: PromptChunk, report: jax.Array
) -> tuple[Sampled, KVCache]:
    """Adds a chunk of a prompt to its row of the cache -> the token after it, [1], and the cache."""
    batched_lora.use(model, chunk.adapter[None])
    x_TD = model.embed(chunk.tokens[None])[0]
    features_TD = features_IPD.reshape(-1, features_IPD.shape[-1])[jnp.maximum(chunk.features, 0)]
    x_TD = jnp.where(chunk.features[:, None] >= 0, features_TD, x_TD)
    x_TD = model.place_newlines(x_TD, chunk.features)
    steps_T = jnp.arange(len(chunk.tokens))
    positions_T = jnp.where(steps_T < chunk.length, chunk.start + steps_T, cache.size)
    hidden_1TD, cache = model.llm.extend(x_TD[None], positions_T[None], cache, chunk.row[None])
    logits_1V = model.llm.logits(hidden_1TD[:, chunk.length - 1])
    scores_1V = ruled(logits_1V, chunk.rules, jnp.full((1, 1), -1))
    tokens_1 = sample(scores_1V, (chunk.start + chunk.length)[None], chunk.sampling)
    return with_logprobs(tokens_1, logits_1V, report, chunk.rules), cache


def copy(model: Llava, cache: KVCache, source: jax.Array, target: jax.Array) -> KVCache:
    """The cache with a copy of row `source` as row `target`."""
    return jax.tree.map(lambda x_CKSH: x_CKSH.at[target].set(x_CKSH[source]), cache)


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
