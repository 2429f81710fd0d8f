"""Answers many requests at a time with one model.

One thread owns the device and generates (`batch`); `prepare`, `submit` and `Answer` may be used from any thread. The
greedy answer to a request is independent of other requests (batch invariance): every dispatch has the same shapes, and
the computation of a slot uses nothing of the other slots.
"""

import collections
import dataclasses
import math
import threading
import time
import traceback

import jax.numpy as jnp
from jax.sharding import Mesh

from llava_jax.checkpoint.reading import Checkpoint, first_device
from llava_jax.cli import UserError, track
from llava_jax.data.templates import Template
from llava_jax.inference.adapters import Adapter, Adapters, UnknownAdapter
from llava_jax.inference.answer import Answer, EngineClosed, EngineError, QueueFull, Sink
from llava_jax.inference.batch import Batch
from llava_jax.inference.generate import load_model, mesh_sharding
from llava_jax.inference.prefix_cache import PreparedPrompt, Text, prepare, prepare_text
from llava_jax.inference.programs import CHUNK_SIZES, PIECES, Programs
from llava_jax.inference.prompts import PromptEncoder, check_context
from llava_jax.inference.quantization import check_quantization
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.llava import Llava


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and the current load."""

    slots: int
    busy: int  # slots with an answer
    queued: int  # requests that wait for a slot
    adapters: int  # that are loaded
    pages: int  # of keys and values, see `prefix_cache`
    pages_used: int  # by running answers
    prompt_tokens: int
    prefix_tokens: int  # of these, those that the prefix cache held
    generated_tokens: int
    finished: int
    cancelled: int
    failed: int


COUNTS = ("prompt_tokens", "prefix_tokens", "generated_tokens", "finished", "cancelled", "failed")


class UnknownToken(UserError):
    """A token in `Sampling` that the model does not have."""


class Engine:
    """A model that answers the requests of `submit`, many at a time."""

    def __init__(
        self,
        model: Llava,  # its layers are rearranged for decoding; use it only through the engine from then on
        prompts: PromptEncoder,  # the tokenizer and template of the model
        *,
        slots: int = 8,  # answers at a time
        context: int | None = None,  # positions of a prompt and its answer; by default as many as the model has
        queue: int = 64,  # requests that may wait for a slot
        # Room of the cache besides that of the slots, in answers of the whole context. It keeps finished conversations,
        # whose next turns reuse them; by default half as many as slots.
        kept: int | None = None,
        cache_bytes: int
        | None = None,  # of keys and values on a device, if that is less than what slots and `kept` need
        images: int = 64,  # for how many images, or tiles of AnyRes, the features are cached
        quantize: str | None = None,  # "int8" stores the decoder's weights in eight bits
        mesh: Mesh | None = None,  # over which the model's parameters are sharded
        adapters: int = 0,  # how many can be loaded at a time, into `Engine.adapters`; memory is taken for all of them
        adapter_rank: int = 0,  # the largest that they may have
    ):
        check_quantization(quantize)
        self.config = model.config
        longest = self.config.text.max_position_embeddings
        if context and context > longest:
            raise UserError(f"the context cannot be {context:,} positions: the model knows {longest:,}")
        self.context = context or longest
        self.slots, self.ready = slots, False
        most_tiles = self.config.tiling.most_tiles if self.config.tiling else 1
        in_a_chunk = (CHUNK_SIZES[-1] // self.config.image_tokens + 2 * min(slots, PIECES)) * most_tiles
        self._programs = Programs(
            model,
            slots=slots,
            answers=slots + (slots // 2 if kept is None else kept),
            cache_bytes=cache_bytes,
            positions=self.context,
            images=max(images, in_a_chunk),
            stop_ids=prompts.stop_ids,
            int8=quantize == "int8",
            mesh=mesh,
            adapters=adapters,
            adapter_rank=adapter_rank,
        )
        self.base = Adapter("", prompts)
        self.adapters = Adapters(self.base, adapters, adapter_rank, self._programs.set_adapter, self._used)
        self._limit = queue
        self._preparing = threading.Lock()  # tokenizers are not thread-safe
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: collections.deque[Answer] = collections.deque()
        self._closing, self._draining = False, True
        self._unprobed = False  # whether the sizes of dispatches are to be found out
        self._counts = collections.Counter()
        self._answer_seconds = 1.0  # a moving mean
        self._batch = Batch(self._programs)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        template: Template | None = None,
        *,
        dtype: jnp.dtype | str | None = None,
        mesh: Mesh | None = None,
        **options,
    ) -> "Engine":
        """Loads the weights of a checkpoint in `dtype` (see `generate.default_dtype`), sharded over `mesh` as in
        training. `options` are those of the class."""
        model = load_model(checkpoint, dtype, mesh_sharding(checkpoint.config, mesh) if mesh else first_device)
        return cls(model, PromptEncoder.from_checkpoint(checkpoint, template), mesh=mesh, **options)

    @property
    def capacity(self) -> int:
        """The number of requests that can be answered or wait at a time."""
        return self.slots + self._limit

    def warm_up(self) -> None:
        """Compiles all programs, which would otherwise be compiled when first used. The engine is `ready` then."""
        for name in track(self._programs.names, "compiling"):
            self._programs.compile(name)
        with self._changed:
            self._unprobed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing or not self._unprobed)
            self.ready = not self._closing

    def prepare(self, request: Request | Text, adapter: Adapter | None = None, special: bool = True) -> PreparedPrompt:
        """Tokenizes a request and preprocesses its images: do it once for any number of answers.

        Args:
          request: to be answered; or a text or token ids that the answer continues, without a template.
          adapter: of `adapters`, or `base`, the default.
          special: whether a text gets the tokenizer's BOS.

        Raises `UserError` where the request is malformed, or an image missing or damaged.
        """
        with self._preparing:
            if isinstance(request, Request):
                return prepare(adapter or self.base, request)
            return prepare_text(adapter or self.base, request, special)

    def room(self, prompt: PreparedPrompt) -> int:
        """Positions that the prompt leaves for an answer; negative if the prompt itself does not fit."""
        return self.context - len(prompt.tokens)

    def submit(self, prompt: Request | PreparedPrompt, sampling: Sampling, sink: Sink | None = None) -> Answer:
        """Queues a request. With a `sink`, which must not block, the answer is not iterated.

        Raises:
          UserError: the request is malformed, or an image missing or damaged.
          UnknownToken: the model does not have a token of `sampling`.
          ContextExceeded: prompt and `max_new_tokens` are more than the context.
          UnknownAdapter: the prompt's adapter has been unloaded.
          QueueFull: too many requests wait already.
          EngineClosed: the engine is closed or closing.
        """
        if isinstance(prompt, Request):
            prompt = self.prepare(prompt)
        check_context(prompt.request, len(prompt.tokens), sampling.max_new_tokens, self.context)
        for token in [*sampling.stop_token_ids, *(token for token, _ in sampling.logit_bias)]:
            if not 0 <= token < self.config.text.vocab_size:
                raise UnknownToken(f"token {token} is none of the model: it has 0 to {self.config.text.vocab_size - 1}")
        answer = Answer(prompt, sampling, sink)
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine is shutting down")
            if prompt.adapter not in self.adapters:
                raise UnknownAdapter(f"adapter {prompt.adapter.name} has been unloaded")
            if len(self._waiting) + len(self._batch.running) >= self.capacity:
                raise QueueFull(math.ceil(self._answer_seconds / self.slots))
            self._waiting.append(answer)
            self._changed.notify_all()
        return answer

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                slots=self.slots,
                busy=len(self._batch.running),
                queued=len(self._waiting),
                adapters=len(self.adapters.loaded()),
                pages=self._programs.pages,
                pages_used=self._batch.pages_used,
                **{name: self._counts[name] for name in COUNTS},
            )

    def clear_caches(self) -> None:
        """Empties the prefix cache and forgets the features of images. Only while nothing runs."""
        self._batch = Batch(self._programs)

    def close(self, drain: bool = True) -> None:
        """Takes no more requests. Finishes the accepted ones, or cancels them without `drain`; then returns."""
        with self._changed:
            self._closing, self._draining, self.ready = True, drain and self._draining, False
            self._changed.notify_all()
        self._thread.join()

    def _used(self) -> set[Adapter]:
        with self._changed:
            running = [running.answer for running in list(self._batch.running)]  # which the engine's thread changes
            return {answer.prompt.adapter for answer in [*self._waiting, *running]}

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        finally:  # also where the restart after a failure failed: no client may wait forever
            with self._changed:
                self._closing, self.ready = True, False
                self._changed.notify_all()
                left = list(self._waiting)
                self._waiting.clear()
            for answer in left:
                self._count(answer)
                answer.fail(EngineClosed("the engine broke down"))

    def _step(self) -> None:
        try:
            if self._unprobed and not self._batch.running:
                self._probe()
            self._enter()
            for answer in self._batch.step():
                self._count(answer)
        except Exception as error:  # raised by the device: its arrays cannot be trusted any more
            traceback.print_exception(error)
            self._fail(error)

    def _wait(self) -> bool:
        """Waits for work; False once the engine is closing and has none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._batch.running or self._closing or self._unprobed)
            if self._closing and not self._draining:
                for answer in [*self._waiting, *(running.answer for running in self._batch.running)]:
                    answer.cancel()
            return bool(self._waiting or self._batch.running or (self._unprobed and not self._closing))

    def _probe(self) -> None:
        try:
            self._programs.find_sizes()
            self.clear_caches()
        finally:
            with self._changed:
                self._unprobed = False
                self._changed.notify_all()

    def _enter(self) -> None:
        """Fills the free slots, and removes cancelled requests from the queue."""
        with self._changed:
            cancelled = [answer for answer in self._waiting if answer.cancelled]
            self._waiting = collections.deque(answer for answer in self._waiting if not answer.cancelled)
            while self._waiting and not self._batch.full:
                self._batch.enter(self._waiting.popleft())
        for answer in cancelled:
            answer.finish("cancelled")
            self._count(answer)

    def _count(self, answer: Answer) -> None:
        with self._changed:
            outcome = {None: "failed", "cancelled": "cancelled"}.get(answer.finish_reason, "finished")
            self._counts[outcome] += 1
            self._counts["prompt_tokens"] += answer.prompt_tokens
            self._counts["prefix_tokens"] += answer.prefix_tokens
            self._counts["generated_tokens"] += answer.completion_tokens
            if outcome == "finished":
                self._answer_seconds += 0.1 * (time.monotonic() - answer.submitted - self._answer_seconds)

    def _fail(self, error: Exception) -> None:
        """Fails the running answers, and starts again with empty caches."""
        failed = [running.answer for running in self._batch.running]
        self._batch = Batch(self._programs)
        for answer in failed:
            failure = EngineError(f"{type(error).__name__}: {' '.join(str(error).split())}")
            failure.__cause__ = error
            self._count(answer)
            answer.fail(failure)
        self._programs.reset()
