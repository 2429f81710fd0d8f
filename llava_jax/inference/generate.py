"""Answers of a model to requests, in batches or streamed.

An answer is a function of its request and of `Sampling` alone, to the rounding of sums: not of the rows beside it.
The programs are in `decoding`: several tokens a dispatch, ended on the device at tokens that end answers; stop strings
are looked for here, in the text, since they may lie across the borders of tokens.
"""

import contextlib
import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.cli import UserError
from llava_jax.data.conversation import IMAGE_TOKEN, check_system, place_prompt_images
from llava_jax.data.images import load_image, preprocess
from llava_jax.data.templates import Template, get_template, stop_strings, with_im_start_end
from llava_jax.data.tokenization import IMAGE_TOKEN_INDEX, encode_turns, expand, load_tokenizer
from llava_jax.inference import decoding
from llava_jax.inference.detokenization import AnswerStream
from llava_jax.inference.prompts import Picture, Prompt, PromptBatch, assemble, bucket, share_beginnings
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava, abstract_params, build
from llava_jax.parallel.sharding import make_mesh, param_sharding

STREAM_STEPS = 4  # tokens a dispatch where someone reads along
MOST_LOGPROBS = 20  # alternatives to a token
HEADROOM = 128  # slots for the answer that a cache has at least when it is made or grows


@dataclasses.dataclass(frozen=True)
class Request:
    """Turns (role, text) as `data.conversation.render` takes them, the last one the user's, and a picture for each
    `<image>` in them, in their order. The same picture is best given as the same path or object. Where the model was
    trained with images before the text, its `PromptEncoder` puts the marks there."""

    turns: Sequence[tuple[str, str]]
    images: Sequence[Picture] = ()
    begun: str = ""  # what the answer continues; no part of it

    def __str__(self) -> str:
        question = " ".join(self.turns[-1][1].split()) if self.turns else ""
        return repr(question if len(question) <= 40 else question[:37] + "...")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many at most. Temperature 0 always takes the likeliest one."""

    temperature: float = 0.0
    top_p: float = 1.0  # among the fewest likeliest tokens that have this probability together
    seed: int = 0
    max_new_tokens: int = 512
    top_k: int = 0  # among so many likeliest; 0 for no limit
    stop: tuple[str, ...] = ()  # text that ends the answer and is no part of it, besides the template's
    logprobs: int | None = None  # alternatives to each token to report; only `serve.engine` does

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it has to be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}: it has to be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens is {self.max_new_tokens}: it has to be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: it has to be 0 or more and below 2^32")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: it has to be 0 (no limit) or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}: it has to be 0 to {MOST_LOGPROBS}")
        if not all(self.stop):
            raise UserError("stop: an empty string would end every answer before it begins")


GREEDY = Sampling()


class PromptEncoder:
    """What a request is to a model: ids and preprocessed images.

    `end_ids` are tokens that end an answer, besides the tokenizer's EOS and the template's end mark.
    """

    def __init__(
        self, config: LlavaConfig, tokenizer: PreTrainedTokenizerBase, template: Template, end_ids: Sequence[int] = ()
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.template = with_im_start_end(template, config.im_start_end)
        self.stop_strings = stop_strings(template)
        self.stop_ids = sorted({*_stop_ids(tokenizer, self.stop_strings), *end_ids})

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, template: Template | None = None) -> "PromptEncoder":
        end_ids = checkpoint.description.hf.get("generation_config", {}).get("eos_token_id") or ()
        return cls(
            checkpoint.config,
            load_tokenizer(checkpoint.tokenizer_dir),
            template or get_template(checkpoint.template),
            (end_ids,) if isinstance(end_ids, int) else end_ids,
        )

    def encode(self, request: Request) -> Prompt:
        """Raises UserError where the request is malformed."""
        check_system(request.turns, self.template)
        turns = place_prompt_images(request.turns, self.config.image_position)
        encoded = encode_turns([*turns, ("assistant", None)], self.template, self.tokenizer, request.begun)
        marks = int((encoded.input_ids == IMAGE_TOKEN_INDEX).sum())
        if marks != len(request.images):
            raise UserError(f"request {request}: {marks} {IMAGE_TOKEN} in the text, but {len(request.images)} pictures")
        if len(encoded.input_ids) == 0:
            raise UserError(f"request {request}: template {self.template.name} makes an empty prompt of it")
        row = expand(encoded, self.config.image_tokens, max_length=np.iinfo(np.int32).max)
        return Prompt(row.tokens, row.image_feature_index, request.images, request.begun)

    def read(self, picture: Picture) -> np.ndarray:
        """-> uint8[H, W, 3], which can be given in place of the picture. Raises UserError where it is damaged."""
        if isinstance(picture, np.ndarray):
            return picture
        image = picture if isinstance(picture, Image.Image) else load_image(picture)
        return preprocess(image, self.config.vision.image_size, self.config.image_aspect, self.config.image_mean)

    def answer_stream(self, sampling: Sampling, begun: str = "") -> AnswerStream:
        """The text of an answer to come, which continues `begun`."""
        return AnswerStream(self.tokenizer, self.stop_ids, [*self.stop_strings, *sampling.stop], begun)


def default_dtype() -> jnp.dtype:
    """float32 on CPUs and bfloat16 elsewhere."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


class Generator:
    """A model that answers requests; its layers are rearranged for decoding."""

    def __init__(self, model: Llava, prompts: PromptEncoder):
        self.config = model.config
        self.prompts = prompts
        self.decoder = decoding.Decoder(model)
        self.computing = 0.0  # seconds in which the device had something to do

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        template: Template | None = None,
        dtype: jnp.dtype | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> "Generator":
        """Loads the weights in `dtype`, see `default_dtype`, split over the devices, by default on the first of all."""
        dtype = dtype or default_dtype()
        params = checkpoint.load(None, lambda name, stored: dtype, _split(checkpoint.config, devices))
        model = build(checkpoint.config, params, dtype)
        return cls(model, PromptEncoder.from_checkpoint(checkpoint, template))

    def answer(self, requests: Sequence[Request], sampling: Sampling = GREEDY, batch_rows: int = 16) -> list[str]:
        """The answers, computed `batch_rows` at a time.

        Rows of a batch that begin with the same picture share its computation: keep such requests together.
        Raises UserError for a request that is malformed or, with `max_new_tokens`, beyond the model's context.
        """
        answers: list[str] = []
        for start in range(0, len(requests), batch_rows):
            batch = requests[start : start + batch_rows]
            prompts = [self._prompt(request, sampling.max_new_tokens) for request in batch]
            pieces = list(self._pieces(prompts, sampling, decoding.MAX_STEPS))
            answers += ["".join(parts) for parts in zip(*pieces, strict=True)]
        return answers

    def stream(self, request: Request, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The same answer in pieces, each as soon as it is certain. Raises as `answer` does."""
        prompt = self._prompt(request, sampling.max_new_tokens)
        for (piece,) in self._pieces([prompt], sampling, STREAM_STEPS):
            if piece:
                yield piece

    def room(self, request: Request) -> int:
        """Positions that the prompt leaves for an answer; negative if the prompt itself does not fit."""
        return self.config.text.max_position_embeddings - len(self.prompts.encode(request).tokens)

    def _prompt(self, request: Request, new_tokens: int) -> Prompt:
        prompt = self.prompts.encode(request)
        length, context = len(prompt.tokens), self.config.text.max_position_embeddings
        if length + new_tokens > context:
            raise UserError(
                f"request {request}: its prompt takes {length} positions and the answer up to {new_tokens}, but the "
                f"model's context has {context}: shorten the conversation or lower max-new-tokens"
            )
        return prompt

    def _assemble(self, prompts: Sequence[Prompt]) -> PromptBatch:
        return assemble(prompts, self.config.image_tokens, self.prompts.read)

    def _pieces(self, prompts: Sequence[Prompt], sampling: Sampling, max_steps: int) -> Iterator[list[str]]:
        """Answers a batch; yields after every dispatch, of at most `max_steps` tokens, what is new of each answer."""
        streams = [self.prompts.answer_stream(sampling, prompt.begun) for prompt in prompts]
        rows = bucket(len(prompts))
        choice = _choice(sampling, prompts, rows) if sampling.temperature > 0 else None
        lengths = [len(prompt.tokens) for prompt in prompts]
        slots = bucket(max(lengths) + min(sampling.max_new_tokens, HEADROOM))
        first, cache = self._start(prompts, choice, slots)

        with self._computing():
            tokens = np.asarray(first)[:, None]
        positions = np.array(lengths + [0] * (rows - len(prompts)), np.int32)  # of the newest tokens
        finished = np.arange(rows) >= len(prompts)
        stop_ids = np.array(self.prompts.stop_ids, np.int32)
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
            with self._computing():
                if needed > cache.slots:
                    cache = self.decoder.widen(cache, slots=bucket(needed + HEADROOM))
                written, cache = self.decoder.decode(
                    tokens[:, -1], positions, finished, stop_ids, cache=cache, choice=choice, steps=steps
                )
                tokens = np.asarray(written)[:, :steps]
            positions += steps
        yield [stream.close() for stream in streams]

    def _start(
        self, prompts: Sequence[Prompt], choice: decoding.Choice | None, slots: int
    ) -> tuple[jax.Array, KVCache]:
        """-> the first tokens of the answers, and the cache of the prompts."""
        shared = share_beginnings(prompts)
        if shared is None:
            batch = self._assemble(prompts)
            with self._computing():
                return self.decoder.prefill(batch, choice, slots=slots)
        beginnings, ends = self._assemble(shared.beginnings), self._assemble(shared.ends)
        padding = [0] * (len(ends.lengths) - len(prompts))
        starts = np.array([len(shared.beginnings[i].tokens) for i in shared.beginning_of] + padding, np.int32)
        beginning_of = np.array([*shared.beginning_of, *padding], np.int32)
        with self._computing():
            _, cache = self.decoder.prefill(beginnings, None, slots=0)
            return self.decoder.fork(cache, beginning_of, starts, ends, choice, slots=slots)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Counts the time within: of dispatching programs and of waiting for what they compute."""
        start = time.perf_counter()
        yield
        self.computing += time.perf_counter() - start


def _split(config: LlavaConfig, devices: Sequence[jax.Device]) -> Callable[[str], jax.sharding.Sharding] | None:
    """Where each parameter lies on these devices; None for the first of all."""
    if not devices:
        return None
    if len(devices) == 1:
        return lambda name: jax.sharding.SingleDeviceSharding(devices[0])
    mesh, shapes = make_mesh({"tensor": len(devices)}, devices), abstract_params(config)
    return lambda name: param_sharding(mesh, name, shapes[name].shape)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> set[int]:
    """EOS, and the stop strings that are one token."""
    encoded = [tokenizer.encode(stop, add_special_tokens=False) for stop in stops]
    ids = {ids[0] for ids in encoded if len(ids) == 1} | {tokenizer.eos_token_id}
    return ids - {None, tokenizer.unk_token_id}


def prompt_number(tokens: np.ndarray) -> int:
    """Tells a prompt from others: else all that are asked with the same seed would draw the same numbers."""
    return zlib.crc32(tokens.tobytes())


def _choice(sampling: Sampling, prompts: Sequence[Prompt], rows: int) -> decoding.Choice:
    def same(value: float, dtype: type) -> np.ndarray:
        return np.full(rows, value, dtype)

    numbers = [prompt_number(prompt.tokens) for prompt in prompts] + [0] * (rows - len(prompts))
    return decoding.Choice(
        temperature=same(sampling.temperature, np.float32),
        top_p=same(sampling.top_p, np.float32),
        top_k=same(sampling.top_k, np.int32),
        seeds=same(sampling.seed, np.uint32),
        numbers=np.array(numbers, np.uint32),
    )
