"""Answers of a model to requests, in batches or streamed.

An answer depends on nothing but its request and `Sampling`, up to rounding: not on the other rows of its batch. The
programs in `decoding` generate several tokens a dispatch and end at stop tokens on the device. Stop strings may lie
across tokens, so they are searched here, in the text.
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from llava_jax.checkpoint.merged import merged
from llava_jax.checkpoint.reading import Checkpoint, ShardingOf, first_device
from llava_jax.cli import UserError
from llava_jax.data.templates import Template
from llava_jax.inference import decoding
from llava_jax.inference.adapters import Adapter, Adapters, AdapterWeights, max_rank
from llava_jax.inference.decoding import RowSampling, Slots, prompt_hash
from llava_jax.inference.prompts import (
    Prompt,
    PromptBatch,
    PromptEncoder,
    assemble,
    bucket,
    check_context,
    share_prefixes,
)
from llava_jax.inference.quantization import check_quantization
from llava_jax.inference.requests import GREEDY, ImageInput, Request, Sampling
from llava_jax.models import batched_lora
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava, abstract_params, build
from llava_jax.parallel.sharding import AXES, make_mesh, param_sharding

STREAM_STEPS = 4  # tokens a dispatch of `Generator.stream`
HEADROOM = 128  # positions for the answer that a cache has at least when it is made or grows


def default_dtype() -> jnp.dtype:
    """float32 on CPUs and bfloat16 on other devices."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def load_model(
    checkpoint: Checkpoint, dtype: jnp.dtype | str | None = None, sharding: ShardingOf = first_device
) -> Llava:
    """Loads the weights of a checkpoint in `dtype` (see `default_dtype`), by default on the first device.

    Adapters are added to them, so that they cost nothing afterwards.
    """
    checkpoint, dtype = merged(checkpoint), jnp.dtype(dtype or default_dtype())
    params = checkpoint.load(dtype=lambda name, stored: dtype, sharding=sharding)
    return build(checkpoint.config, params, dtype)


def mesh_sharding(config: LlavaConfig, mesh: Mesh) -> ShardingOf:
    """Shards the parameters over a mesh as training does."""
    shapes = abstract_params(dataclasses.replace(config, base_dtype=""))
    return lambda name: param_sharding(mesh, name, shapes[name].shape)


def _mesh(devices: Sequence[jax.Device], axes: Mapping[str, int] | None) -> Mesh | None:
    """The mesh over which a model is sharded; None on one device."""
    if axes:
        if unknown := set(axes) - set(AXES):
            raise UserError(f"mesh has an axis {min(unknown)!r}: choose among {', '.join(AXES)}")
        return make_mesh(axes, devices or None)
    return make_mesh({"tensor": len(devices)}, devices) if len(devices) > 1 else None


class Generator:
    """A model that answers requests."""

    def __init__(
        self,
        model: Llava,  # its layers are rearranged for decoding; use it only through the generator from then on
        prompts: PromptEncoder,  # the tokenizer and template of the model
        quantize: str | None = None,  # "int8" stores the weights of the language model in eight bits
        # By name; the model has room for them (`models.batched_lora.attach`).
        adapters: Mapping[str, AdapterWeights] = MappingProxyType({}),
    ):
        self.config, self.prompts = model.config, prompts
        self.decoder = decoding.Decoder(model, quantize)  # the compiled programs; `decoder.compile` adds more
        self.adapters = Adapters(  # by name, see `with_adapter`
            Adapter("", prompts), len(adapters), max_rank(adapters), self.decoder.set_adapter, used=set
        )
        for name, weights in adapters.items():
            self.adapters.load(name, weights)
        self._adapter = np.zeros(1, np.int32) if adapters else None
        self.computing = 0.0  # seconds in which the device computed

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,  # its weights are read now
        template: Template | None = None,  # instead of the checkpoint's
        dtype: jnp.dtype | str | None = None,  # of weights and computation; see `default_dtype`
        devices: Sequence[jax.Device] = (),  # the weights are sharded over these; by default they lie on the first one
        *,
        mesh: Mapping[str, int] | None = None,  # sizes of its axes; by default each layer is split over all devices
        quantize: str | None = None,  # as that of the class
        adapters: Mapping[str, AdapterWeights] = MappingProxyType({}),  # of the checkpoint, by name
    ) -> "Generator":
        """Loads the weights of a checkpoint (`checkpoint.reading.open_checkpoint`)."""
        check_quantization(quantize)
        if sharded := _mesh(devices, mesh):
            sharding = mesh_sharding(checkpoint.config, sharded)
        else:
            sharding = (lambda name: SingleDeviceSharding(devices[0])) if devices else first_device
        model = load_model(checkpoint, dtype, sharding)
        if adapters:
            with jax.default_device(devices[0] if devices else None):
                batched_lora.attach(model, len(adapters), max_rank(adapters), sharded)
        return cls(model, PromptEncoder.from_checkpoint(checkpoint, template), quantize, adapters)

    def with_adapter(self, name: str) -> "Generator":
        """The same with one of `adapters`, in the template that it was trained with. Raises `UnknownAdapter`."""
        adapter, other = self.adapters.get(name), copy.copy(self)
        other.prompts, other._adapter = adapter.prompts, np.array([adapter.index], np.int32)
        return other

    def answer(self, requests: Sequence[Request], sampling: Sampling = GREEDY, batch_rows: int = 16) -> list[str]:
        """Answers all requests, `batch_rows` at a time.

        Rows of a batch that begin with the same image compute it once: keep such requests next to each other.
        Raises `UserError` for a request that is malformed or does not fit into the model's context together with
        `max_new_tokens`.
        """
        answers: list[str] = []
        for start in range(0, len(requests), batch_rows):
            batch = requests[start : start + batch_rows]
            prompts = [self._prompt(request, sampling.max_new_tokens) for request in batch]
            texts = list(self._generate(prompts, sampling, decoding.MAX_STEPS))
            answers += ["".join(parts) for parts in zip(*texts, strict=True)]
        return answers

    def stream(self, request: Request, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Yields the same answer in parts as they are generated. Raises as `answer` does."""
        prompt = self._prompt(request, sampling.max_new_tokens)
        for (text,) in self._generate([prompt], sampling, STREAM_STEPS):
            if text:
                yield text

    def encode_images(self, images: Sequence[ImageInput]) -> np.ndarray | list[np.ndarray]:
        """The embeddings of images as the decoder gets them: float32[N, P, D].

        With AnyRes a list of float32[L, D], as many as each image has in a prompt of its own, newlines included.
        """
        if self.config.tiling:
            prompts = []
            for image in map(self.prompts.read, images):
                index, tiles = image.features
                prompts.append(Prompt(np.zeros_like(index), index, [image], [tiles]))
            batch = self._assemble(prompts)
            x_BTD = self.decoder.embed(batch.tokens, batch.images, batch.image_feature_index, adapter=self._adapter)
            return [np.asarray(x_BTD[row, : len(each.tokens)], np.float32) for row, each in enumerate(prompts)]
        pixels = np.concatenate([self.prompts.read(image).tiles for image in images])
        return np.asarray(self.decoder.encode_images(pixels, adapter=self._adapter), np.float32)

    def logits(self, request: Request) -> np.ndarray:
        """The scores of the next token after each position of a prompt: float32[L, V]. An image takes P positions."""
        prompt = self._prompt(request, 0)
        scores = self.decoder.logits(self._assemble([prompt]), adapter=self._adapter)
        return np.asarray(scores[0, : len(prompt.tokens)])

    def room(self, request: Request) -> int:
        """Positions that the prompt leaves for an answer; negative if the prompt itself does not fit."""
        return self.config.text.max_position_embeddings - len(self.prompts.encode(request).tokens)

    def _prompt(self, request: Request, new_tokens: int) -> Prompt:
        prompt = self.prompts.encode(request)
        check_context(request, len(prompt.tokens), new_tokens, self.config.text.max_position_embeddings)
        return prompt

    def _assemble(self, prompts: Sequence[Prompt]) -> PromptBatch:
        return assemble(prompts, self.config.image_tokens, self.prompts.read)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, max_steps: int) -> Iterator[list[str]]:
        """Answers a batch. Yields the new text of each answer after every dispatch, of at most `max_steps` tokens."""
        sampling.check_plain()
        streams = [self.prompts.answer_stream(sampling, prompt.begun) for prompt in prompts]
        rows = bucket(len(prompts))
        row_sampling = None  # greedy
        if sampling.temperature > 0:
            row_sampling = RowSampling.greedy(rows)
            for row, prompt in enumerate(prompts):
                row_sampling.set(row, sampling, prompt_hash(prompt.tokens))
        lengths = [len(prompt.tokens) for prompt in prompts]
        size = bucket(max(lengths) + min(sampling.max_new_tokens, HEADROOM))
        first, cache = self._prefill(prompts, row_sampling, size)

        with self._timed():
            tokens = np.asarray(first)[:, None]
        positions = np.array(lengths + [0] * (rows - len(prompts)), np.int32)  # of the newest tokens
        finished = np.arange(rows) >= len(prompts)
        stop_ids = np.array(self.prompts.stop_ids, np.int32)
        no_limits = np.full(rows, np.iinfo(np.int32).max)
        remaining = sampling.max_new_tokens
        while True:
            new = tokens[: len(streams)].tolist()
            yield ["".join(map(stream.push, row)) for stream, row in zip(streams, new, strict=True)]
            remaining -= tokens.shape[1]
            finished[: len(streams)] = [stream.finished for stream in streams]
            if remaining == 0 or finished.all():
                break
            steps = min(remaining, max_steps)
            needed = int(positions[~finished].max()) + steps
            with self._timed():
                if needed > cache.size:
                    cache = self.decoder.grow(cache, size=bucket(needed + HEADROOM))
                working = np.where(finished, cache.size, positions)
                slots = Slots(tokens[:, -1], working, no_limits, sampling=row_sampling)
                sampled, cache = self.decoder.decode(
                    slots=slots, stop_ids=stop_ids, steps=steps, cache=cache, adapter=self._adapter
                )
                tokens = np.asarray(sampled.tokens)[:, :steps]
            positions += steps
        yield [stream.close() for stream in streams]

    def _prefill(self, prompts: Sequence[Prompt], sampling: RowSampling | None, size: int) -> tuple[jax.Array, KVCache]:
        """-> the first tokens of the answers, and the cache of the prompts."""
        adapter = self._adapter
        shared = share_prefixes(prompts)
        if shared is None:
            batch = self._assemble(prompts)
            with self._timed():
                return self.decoder.prefill(batch, sampling, size=size, adapter=adapter)
        prefixes, suffixes = self._assemble(shared.prefixes), self._assemble(shared.suffixes)
        padding = [0] * (len(suffixes.lengths) - len(prompts))
        starts = np.array([len(shared.prefixes[i].tokens) for i in shared.prefix_of] + padding, np.int32)
        prefix_of = np.array([*shared.prefix_of, *padding], np.int32)
        with self._timed():
            _, cache = self.decoder.prefill(prefixes, None, size=0, adapter=adapter)
            return self.decoder.prefill_suffixes(
                cache, prefix_of, starts, suffixes, sampling, size=size, adapter=adapter
            )

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds the time of dispatching programs and of waiting for their results to `computing`."""
        start = time.perf_counter()
        yield
        self.computing += time.perf_counter() - start
