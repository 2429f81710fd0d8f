"""Answers many requests at a time with one model.

One thread owns the device and answers (`batch`); `submit` and `Answer` may be used from any other. The greedy answer
to a request does not depend on what else runs: every dispatch has the same shapes, and a slot's numbers depend on
nothing in the others.
"""

import collections
import dataclasses
import math
import threading
import time
import traceback

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.cli import UserError, track
from llava_jax.data.templates import Template
from llava_jax.inference.answer import Answer, ContextExceeded, EngineClosed, EngineError, QueueFull, Sink
from llava_jax.inference.batch import Batch
from llava_jax.inference.generate import PromptEncoder, Request, Sampling, default_dtype
from llava_jax.inference.prefix_cache import PreparedPrompt, prepare
from llava_jax.inference.programs import LENGTHS, Programs
from llava_jax.models.config import QUANTIZATIONS
from llava_jax.models.llava import Llava, abstract_params, build
from llava_jax.parallel.sharding import param_sharding

SAMPLES = 1024  # of the time to the first token that `stats` keeps


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what is going on."""

    slots: int
    busy: int  # slots that answer
    queued: int  # requests that wait for one
    prompt_tokens: int
    prefix_tokens: int  # of these, what was not computed again
    generated_tokens: int
    finished: int
    cancelled: int
    failed: int
    first_token_seconds: tuple[float, ...]  # of the last `SAMPLES` answers


COUNTS = ("prompt_tokens", "prefix_tokens", "generated_tokens", "finished", "cancelled", "failed")


class Engine:
    """Args:
    model: its layers are rearranged for decoding.
    prompts: what requests are to it.
    slots: answers at a time.
    context: positions of a prompt and its answer; by default as many as the model knows.
    queue: requests that may wait for a slot.
    kept: conversations that are kept besides those in slots, so that their next turn begins where they ended; by
      default half as many as slots.
    pictures: features of so many pictures are kept.
    quantize: "int8" stores the decoder's weights in eight bits; None as they are.
    mesh: what the model's parameters lie on.
    """

    def __init__(
        self,
        model: Llava,
        prompts: PromptEncoder,
        *,
        slots: int = 8,
        context: int | None = None,
        queue: int = 64,
        kept: int | None = None,
        pictures: int = 64,
        quantize: str | None = None,
        mesh: Mesh | None = None,
    ):
        if quantize not in QUANTIZATIONS:
            raise UserError(f"quantize is {quantize!r}: choose {' or '.join(map(repr, QUANTIZATIONS))}")
        self.config = model.config
        longest = self.config.text.max_position_embeddings
        self.context = min(context or longest, longest)
        self.slots, self.ready = slots, False
        self.tokenizer, self.template = prompts.tokenizer, prompts.template
        self._conversations = slots + (slots // 2 if kept is None else kept)
        self._pictures = max(pictures, LENGTHS[-1] // self.config.image_tokens + 2)  # those of a piece of a prompt
        self._programs = Programs(
            model,
            slots=slots,
            conversations=self._conversations,
            positions=self.context,
            pictures=self._pictures,
            stop_ids=prompts.stop_ids,
            int8=quantize == "int8",
            mesh=mesh,
        )
        self._prompts, self._limit = prompts, queue
        self._encoding = threading.Lock()  # tokenizers are not made for many threads
        self._changed = threading.Condition()  # guards what follows
        self._waiting: collections.deque[tuple[Answer, PreparedPrompt]] = collections.deque()
        self._closing, self._draining = False, True
        self._counts = collections.Counter()
        self._first_token_seconds: collections.deque[float] = collections.deque(maxlen=SAMPLES)
        self._answer_seconds = 1.0  # a moving mean
        self._batch = self._new_batch()
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
        """Loads the weights in `dtype` (see `default_dtype`), on a mesh as training lays them out."""
        dtype, shapes = jnp.dtype(dtype or default_dtype()), abstract_params(checkpoint.config)

        def place(name: str) -> NamedSharding:
            return param_sharding(mesh, name, shapes[name].shape)

        params = checkpoint.load(dtype=lambda name, stored: dtype, sharding=place if mesh is not None else None)
        model = build(checkpoint.config, params, dtype)
        del params  # whose arrays are rearranged one by one
        return cls(model, PromptEncoder.from_checkpoint(checkpoint, template), mesh=mesh, **options)

    @property
    def capacity(self) -> int:
        """Requests that it holds at a time: those it answers and those that wait."""
        return self.slots + self._limit

    def warm_up(self) -> None:
        """Compiles what answering takes, which would else happen when it is first needed; then `ready`."""
        for name in track(self._programs.names(), "compiling"):
            self._programs.compile(name)
        with self._changed:
            self.ready = not self._closing

    def count_tokens(self, request: Request) -> int:
        """Positions that its prompt takes, pictures included. Raises UserError where it is malformed."""
        with self._encoding:
            return len(self._prompts.encode(request).tokens)

    def room(self, request: Request) -> int:
        """Positions that the prompt leaves for an answer; negative if the prompt itself does not fit."""
        return self.context - self.count_tokens(request)

    def submit(self, request: Request, sampling: Sampling, sink: Sink | None = None) -> Answer:
        """Hands over a request. With a `sink`, which must not block, the answer is not iterated.

        Raises:
          UserError: it is malformed or a picture is damaged.
          ContextExceeded: with `max_new_tokens` it is beyond the context.
          QueueFull: too many wait already.
          EngineClosed: the engine is closed or closing.
        """
        length, new = self.count_tokens(request), sampling.max_new_tokens
        if length + new > self.context:
            raise ContextExceeded(
                f"request {request}: its prompt takes {length} positions and the answer up to {new}, but the context "
                f"has {self.context}: shorten the conversation or lower max-new-tokens",
                length,
                new,
                self.context,
            )
        self._check_room()
        with self._encoding:
            prompt = prepare(self._prompts, request)
        answer = Answer(request, sampling, length, sink)
        with self._changed:
            self._check_room()
            self._waiting.append((answer, prompt))
            self._changed.notify_all()
        return answer

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                slots=self.slots,
                busy=len(self._batch.running),
                queued=len(self._waiting),
                first_token_seconds=tuple(self._first_token_seconds),
                **{name: self._counts[name] for name in COUNTS},
            )

    def forget(self) -> None:
        """Forgets what was computed for earlier requests. Only while nothing runs."""
        self._batch = self._new_batch()

    def close(self, drain: bool = True) -> None:
        """Takes no more requests. Finishes those that it has, or cancels them without `drain`; then returns."""
        with self._changed:
            self._closing, self._draining, self.ready = True, drain and self._draining, False
            self._changed.notify_all()
        self._thread.join()

    def _check_room(self) -> None:
        if self._closing:
            raise EngineClosed("the engine is shutting down")
        if len(self._waiting) + len(self._batch.running) >= self.capacity:
            raise QueueFull(math.ceil(self._answer_seconds / self.slots))

    def _new_batch(self) -> Batch:
        return Batch(self._programs, self._prompts, self._conversations, self._pictures)

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._step()
        finally:  # if not even beginning anew was possible, nobody may wait for ever
            with self._changed:
                self._closing, self.ready = True, False
                left = [answer for answer, _ in self._waiting]
                self._waiting.clear()
            for answer in left:
                self._count(answer, failed=True)
                answer.fail(EngineClosed("the engine broke down"))

    def _step(self) -> None:
        try:
            self._enter()
            for answer in self._batch.step():
                self._count(answer)
        except Exception as error:  # what the device raises; nothing of the arrays there can be trusted
            traceback.print_exception(error)
            self._fail(error)

    def _wait(self) -> bool:
        """Until there is something to do; False if there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._batch.running or self._closing)
            if self._closing and not self._draining:
                for answer in [answer for answer, _ in self._waiting] + [r.answer for r in self._batch.running]:
                    answer.cancel()
            return bool(self._waiting or self._batch.running)

    def _enter(self) -> None:
        """Fills the free slots. Who was cancelled leaves the queue."""
        with self._changed:
            gone = [answer for answer, _ in self._waiting if answer.cancelled]
            self._waiting = collections.deque(pair for pair in self._waiting if not pair[0].cancelled)
            while self._waiting and not self._batch.full:
                self._batch.enter(*self._waiting.popleft())
        for answer in gone:
            answer.finish("cancelled")
            self._count(answer)

    def _count(self, answer: Answer, failed: bool = False) -> None:
        with self._changed:
            outcome = "failed" if failed else "cancelled" if answer.finish_reason == "cancelled" else "finished"
            self._counts[outcome] += 1
            self._counts["prompt_tokens"] += answer.prompt_tokens
            self._counts["prefix_tokens"] += answer.prefix_tokens
            self._counts["generated_tokens"] += answer.completion_tokens
            if answer.first_token_seconds is not None:
                self._first_token_seconds.append(answer.first_token_seconds)
            if outcome == "finished":
                self._answer_seconds += 0.1 * (time.monotonic() - answer.submitted - self._answer_seconds)

    def _fail(self, error: Exception) -> None:
        """Ends what runs, and begins anew."""
        failed = [running.answer for running in self._batch.running]
        self._batch = self._new_batch()
        for answer in failed:
            failure = EngineError(f"{type(error).__name__}: {' '.join(str(error).split())}")
            failure.__cause__ = error
            self._count(answer, failed=True)
            answer.fail(failure)
        self._programs.reset()
