"""What runs on the device to answer many requests: programs of fixed shapes, all compiled ahead.

Axes: B slots, T tokens, D embed, P patches a picture, V vocabulary, C conversations, I pictures kept.
"""

import contextlib
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
from llava_jax.inference.decoding import Choice, choose
from llava_jax.inference.generate import MOST_LOGPROBS
from llava_jax.inference.quantization import quantize_decoder
from llava_jax.models.attention import BLOCK
from llava_jax.models.llama import Conversations
from llava_jax.models.llava import Llava
from llava_jax.parallel.sharding import FSDP_RINGS, RULES, axis_sizes, replicated

LENGTHS = (16, 32, 64, 128, 256)  # tokens of a prompt that are computed at a time
MAX_STEPS = 8  # tokens of an answer that one call of `decode` can write
DECODE, ENCODE, COPY = "decode", "encode", "copy"


class Slots(NamedTuple):
    """What the slots of a batch are about, arrays [B]. A slot at position S does nothing."""

    conversations: np.ndarray  # int32, where their keys and values are
    tokens: np.ndarray  # int32, the newest ones
    positions: np.ndarray  # int32, where these go
    limits: np.ndarray  # int32, positions at which the answers have all their tokens
    choice: Choice


class Chosen(NamedTuple):
    """Tokens and how likely the model found them, zeros where nobody asked: arrays [B, ...]."""

    tokens: jax.Array  # int32; -1 where there is none
    logprobs: jax.Array  # float32
    top_tokens: jax.Array  # int32[..., MOST_LOGPROBS], the likeliest in their place
    top_logprobs: jax.Array  # float32[..., MOST_LOGPROBS]


class PromptPiece(NamedTuple):
    """A piece of a prompt, T of `LENGTHS`."""

    tokens: np.ndarray  # int32[T], 0 past the piece's end
    features: np.ndarray  # int32[T]: picture kept x P + patch, -1 for text
    start: np.ndarray  # int32, the position of the first
    length: np.ndarray  # int32, how many of them there are
    conversation: np.ndarray  # int32
    choice: Choice  # [1]


class Programs:
    """The programs below compiled for a model, and the arrays they work on: conversations, and features of pictures.

    Args:
      model: its layers are rearranged for decoding.
      slots, conversations, pictures: B, C (at least B) and I; S is at least `positions`.
      stop_ids: tokens that end answers.
      int8: whether the decoder's weights are stored in eight bits, see `models.quantization`.
      mesh: what the model's parameters lie on.
    """

    def __init__(
        self,
        model: Llava,
        *,
        slots: int,
        conversations: int,
        positions: int,
        pictures: int,
        stop_ids: list[int],
        int8: bool = False,
        mesh: Mesh | None = None,
    ):
        text = model.config.text
        model.unstack_layers(transposed=slots == 1 and not int8)
        if int8:
            quantize_decoder(model.llm)
        self.slots = slots
        self._weights, self._structure = jax.tree.flatten(model)
        shape = (conversations, text.num_kv_heads, -(-positions // BLOCK) * BLOCK, text.head_dim)
        self.positions = shape[2]
        self._cache_shape = jax.ShapeDtypeStruct(shape, model.dtype, sharding=_cache_sharding(mesh, text.num_kv_heads))
        kept = (pictures, model.config.image_tokens, text.hidden_size)
        self._kept_shape = jax.ShapeDtypeStruct(kept, model.dtype, sharding=mesh and replicated(mesh))
        self._layers = text.num_layers
        self._image_shape = (model.config.vision.image_size, model.config.vision.image_size, 3)
        self._stop_ids = np.array(stop_ids, np.int32)
        self._compiled: dict[str | int, Callable] = {}
        self._compiling = threading.Lock()
        self._refuse_too_large(slots, mesh)
        self.reset()

    def _refuse_too_large(self, slots: int, mesh: Mesh | None) -> None:
        """Raises UserError where the arrays do not fit into what is free."""
        shards = self._cache_shape.sharding.shard_shape(self._cache_shape.shape) if mesh else self._cache_shape.shape
        wanted = 2 * self._layers * math.prod(shards) * self._cache_shape.dtype.itemsize
        free = free_bytes(mesh.devices.flat[0] if mesh else jax.devices()[0])
        if wanted > free:
            raise UserError(
                f"{slots} slots of {self.positions} positions take {wanted / 2**30:.1f} GB for keys and values, and "
                f"{max(free, 0) / 2**30:.1f} GB are free: lower --slots or --context"
            )

    def reset(self) -> None:
        """Forgets all conversations and pictures."""
        self.cache = self.kept = None  # before there are new ones

        def zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros(like.shape, like.dtype, device=like.sharding)

        keys, values = (tuple(zeros(self._cache_shape) for _ in range(self._layers)) for _ in "kv")
        self.cache = Conversations(keys, values)
        self.kept = zeros(self._kept_shape)

    def names(self) -> list[str | int]:
        """What `compile` takes."""
        return [*LENGTHS, ENCODE, DECODE, COPY]

    def compile(self, name: str | int) -> Callable:
        """A program, of whose arguments the weights and the arrays here are given already."""
        with self._compiling:
            if name not in self._compiled:
                self._compiled[name] = self._compile(name)
            return self._compiled[name]

    def encode(self, image: np.ndarray, place: int) -> None:
        """Keeps the features of a picture uint8[H, W, 3] as number `place`."""
        self.kept = self.compile(ENCODE)(self._weights, self.kept, image, np.int32(place))

    def extend(self, piece: PromptPiece, report: bool) -> Chosen:
        """-> what follows it, [1]."""
        program = self.compile(len(piece.tokens))
        chosen, self.cache = program(self._weights, self.cache, self.kept, piece, np.bool(report))
        return jax.device_get(chosen)

    def decode(self, slots: Slots, steps: int, report: bool) -> Chosen:
        """-> what follows, [B, MAX_STEPS], of which `steps` or fewer are written."""
        program = self.compile(DECODE)
        chosen, self.cache = program(self._weights, self.cache, slots, self._stop_ids, np.int32(steps), np.bool(report))
        return jax.device_get(chosen)

    def copy(self, source: int, target: int) -> None:
        """Makes one conversation begin as another does."""
        self.cache = self.compile(COPY)(self.cache, np.int32(source), np.int32(target))

    def _compile(self, name: str | int) -> Callable:
        cache = Conversations(*((self._cache_shape,) * self._layers for _ in "kv"))
        flag, number = np.bool(False), np.int32(0)
        match name:
            case "copy":
                return jax.jit(copy, donate_argnums=0).lower(cache, number, number).compile()
            case "encode":
                arguments = (self._kept_shape, np.zeros(self._image_shape, np.uint8), number)
                return self._lower(encode, arguments, donated=1).compile()
            case "decode":
                zeros = np.zeros(self.slots, np.int32)
                slots = Slots(zeros, zeros, zeros, zeros, make_choice(self.slots))
                return self._lower(decode, (cache, slots, self._stop_ids, number, flag), donated=1).compile()
            case int():
                zeros = np.zeros(name, np.int32)
                piece = PromptPiece(zeros, zeros, number, number, number, make_choice(1))
                return self._lower(extend, (cache, self._kept_shape, piece, flag), donated=1).compile()
        raise ValueError(name)

    def _lower(self, program: Callable, arguments: tuple, donated: int) -> Any:
        """The weights go in as a flat list, since flattening modules takes longer than a token of a small model."""

        def flat(weights: list[jax.Array], *arguments: Any) -> Any:
            return program(jax.tree.unflatten(self._structure, weights), *arguments)

        return jax.jit(flat, donate_argnums=donated).lower(self._weights, *arguments)


def make_choice(rows: int) -> Choice:
    """Greedy, in arrays that may be written to."""
    zeros = (np.zeros(rows, dtype) for dtype in (np.float32, np.float32, np.int32, np.uint32, np.uint32))
    return Choice(*zeros)


def encode(model: Llava, kept_IPD: jax.Array, image: jax.Array, place: jax.Array) -> jax.Array:
    """The kept features with those of a picture at `place`."""
    return kept_IPD.at[place].set(model.encode_images(image[None])[0])


def extend(
    model: Llava, cache: Conversations, kept_IPD: jax.Array, piece: PromptPiece, report: jax.Array
) -> tuple[Chosen, Conversations]:
    """Puts a piece of a prompt into its conversation; -> what follows it, [1]."""
    x_TD = model.embed(piece.tokens[None])[0]
    features_TD = kept_IPD.reshape(-1, kept_IPD.shape[-1])[jnp.maximum(piece.features, 0)]
    x_TD = jnp.where(piece.features[:, None] >= 0, features_TD, x_TD)
    steps_T = jnp.arange(len(piece.tokens))
    positions_T = jnp.where(steps_T < piece.length, piece.start + steps_T, cache.positions)
    hidden_1TD, cache = model.llm.extend(x_TD[None], positions_T[None], piece.conversation[None], cache)
    logits_1V = model.llm.logits(hidden_1TD[:, piece.length - 1])
    tokens_1 = choose(logits_1V, (piece.start + piece.length)[None], piece.choice)
    return _chosen(logits_1V, tokens_1, report), cache


def decode(
    model: Llava, cache: Conversations, slots: Slots, stop_ids: jax.Array, steps: jax.Array, report: jax.Array
) -> tuple[Chosen, Conversations]:
    """What follows in every slot that has anything to do, at most `steps` tokens."""
    none = cache.positions

    def working(carry: tuple) -> jax.Array:
        step, _, positions_B, _, _ = carry
        return (step < steps) & (positions_B < none).any()

    def advance(carry: tuple) -> tuple:
        step, tokens_B, positions_B, cache, written = carry
        working_B = positions_B < none
        x_B1D = model.embed(tokens_B[:, None])
        hidden_B1D, cache = model.llm.extend(x_B1D, positions_B[:, None], slots.conversations, cache)
        logits_BV = model.llm.logits(hidden_B1D[:, 0])
        positions_B += 1
        tokens_B = choose(logits_BV, positions_B, slots.choice)
        chosen = _chosen(logits_BV, jnp.where(working_B, tokens_B, -1), report)
        written = jax.tree.map(lambda all_, new: all_.at[:, step].set(new), written, chosen)
        going_on_B = working_B & (positions_B < slots.limits) & ~jnp.isin(tokens_B, stop_ids)
        return step + 1, tokens_B, jnp.where(going_on_B, positions_B, none), cache, written

    B = len(slots.tokens)
    written = Chosen(
        jnp.full((B, MAX_STEPS), -1, jnp.int32),
        jnp.zeros((B, MAX_STEPS)),
        jnp.zeros((B, MAX_STEPS, MOST_LOGPROBS), jnp.int32),
        jnp.zeros((B, MAX_STEPS, MOST_LOGPROBS)),
    )
    carry = (jnp.int32(0), slots.tokens, slots.positions, cache, written)
    *_, cache, written = jax.lax.while_loop(working, advance, carry)
    return written, cache


def copy(cache: Conversations, source: jax.Array, target: jax.Array) -> Conversations:
    """The cache with a conversation in the place of another, too."""
    return jax.tree.map(lambda x_CKSH: x_CKSH.at[target].set(x_CKSH[source]), cache)


def _chosen(logits_BV: jax.Array, tokens_B: jax.Array, report: jax.Array) -> Chosen:
    def likelihoods() -> tuple[jax.Array, ...]:
        logprobs_BV = jax.nn.log_softmax(logits_BV)
        logprobs_B = jnp.take_along_axis(logprobs_BV, jnp.maximum(tokens_B, 0)[:, None], axis=1)[:, 0]
        top_logprobs, top_tokens = jax.lax.top_k(logprobs_BV, MOST_LOGPROBS)
        return logprobs_B, top_tokens, top_logprobs

    def nothing() -> tuple[jax.Array, ...]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(likelihoods))

    return Chosen(tokens_B, *jax.lax.cond(report, likelihoods, nothing))


def free_bytes(device: jax.Device) -> int:
    """Memory of a device that is free; of this machine, where the device is its processor."""
    if (stats := device.memory_stats()) and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cache_sharding(mesh: Mesh | None, num_kv_heads: int) -> jax.sharding.Sharding | None:
    """Key/value heads lie where those of training do."""
    if mesh is None:
        return None
    sizes = axis_sizes(mesh)
    axis = next((axis for axis in RULES["heads"] if sizes[axis] > 1 and num_kv_heads % sizes[axis] == 0), None)
    return NamedSharding(mesh, P(None, FSDP_RINGS if axis == "fsdp" else axis))
