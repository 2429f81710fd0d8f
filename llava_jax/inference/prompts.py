"""Requests as token ids and preprocessed images, and batches of them that compute shared prefixes once."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.cli import UserError
from llava_jax.data.conversation import check_system, place_prompt_images
from llava_jax.data.images import load_image, load_pixels, preprocess
from llava_jax.data.templates import IMAGE_TOKEN, Template, get_template, stop_strings, with_im_start_end
from llava_jax.data.tokenization import IMAGE_TOKEN_INDEX, encode_turns, expand, load_tokenizer
from llava_jax.inference.detokenization import AnswerStream
from llava_jax.inference.requests import ImageInput, Request, Sampling
from llava_jax.models.config import LlavaConfig

MIN_TOKENS = 16  # that a row of a batch has room for


class Prompt(NamedTuple):
    """A request as token ids."""

    tokens: np.ndarray  # int32[L], 0 where an image is
    image_feature_index: np.ndarray  # int32[L]: image of the request x P + patch, -1 for text
    images: Sequence[ImageInput]
    begun: str = ""  # the text that the answer continues, with which the prompt ends


class PromptEncoder:
    """Turns requests into token ids and preprocessed images, and token ids into text.

    Args:
      config: of the model.
      tokenizer: of the model.
      template: of conversations.
      end_ids: tokens that end an answer, besides the tokenizer's EOS and the template's end mark.
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
        """With the checkpoint's tokenizer and end tokens, and its template unless another is given."""
        end_ids = checkpoint.description.hf.get("generation_config", {}).get("eos_token_id") or ()
        return cls(
            checkpoint.config,
            load_tokenizer(checkpoint.tokenizer_dir),
            template or get_template(checkpoint.template),
            (end_ids,) if isinstance(end_ids, int) else end_ids,
        )

    def encode(self, request: Request) -> Prompt:
        """Tokenizes a request. Raises `UserError` where it is malformed."""
        check_system(request.turns, self.template)
        turns = place_prompt_images(request.turns, self.config.image_position)
        encoded = encode_turns([*turns, ("assistant", None)], self.template, self.tokenizer, request.begun)
        marks = int((encoded.input_ids == IMAGE_TOKEN_INDEX).sum())
        if marks != len(request.images):
            raise UserError(f"request {request}: {marks} {IMAGE_TOKEN} in the text, but {len(request.images)} images")
        if len(encoded.input_ids) == 0:
            raise UserError(f"request {request}: template {self.template.name} makes an empty prompt of it")
        row = expand(encoded, self.config.image_tokens, max_length=np.iinfo(np.int32).max)
        return Prompt(row.tokens, row.image_feature_index, request.images, request.begun)

    def read(self, image: ImageInput) -> np.ndarray:
        """Reads and preprocesses an image -> uint8[H, W, 3]. Raises `UserError` where it is missing or damaged."""
        if isinstance(image, np.ndarray):
            return image
        opened = load_pixels(image) if isinstance(image, Image.Image) else load_image(image)
        config = self.config
        size = config.vision.image_size
        return preprocess(opened, size, config.image_aspect, config.image_mean, config.image_resample)

    def answer_stream(self, sampling: Sampling, begun: str = "") -> AnswerStream:
        """Decodes the tokens of an answer that continues `begun`."""
        return AnswerStream(self.tokenizer, self.stop_ids, [*self.stop_strings, *sampling.stop], begun)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> set[int]:
    """EOS, and the stop strings that are one token."""
    encoded = [tokenizer.encode(stop, add_special_tokens=False) for stop in stops]
    ids = {ids[0] for ids in encoded if len(ids) == 1} | {tokenizer.eos_token_id}
    return ids - {None, tokenizer.unk_token_id}


class ContextExceeded(UserError):
    """A prompt and its answer take more positions than the context has."""


def check_context(request: Request, length: int, new_tokens: int, context: int) -> None:
    """Raises `ContextExceeded` unless a prompt of `length` positions and its answer fit into the context."""
    if length + new_tokens > context:
        raise ContextExceeded(
            f"request {request}: its prompt takes {length} positions and the answer up to {new_tokens}, but the "
            f"context has {context}: shorten the conversation or lower max-new-tokens"
        )


class PromptBatch(NamedTuple):
    """Prompts padded on the right. The rows share the image slots, as a group of the training layout."""

    tokens: np.ndarray  # int32[B, T], 0 in padding
    lengths: np.ndarray  # int32[B], at least 1
    images: np.ndarray | None  # uint8[1, I, H, W, 3]; None where no prompt has an image
    image_feature_index: np.ndarray  # int32[B, T]


class SharedPrefixes(NamedTuple):
    """Prompts cut in two, with each distinct prefix once."""

    prefixes: list[Prompt]
    suffixes: list[Prompt]
    prefix_of: np.ndarray  # int32: the prefix of each suffix


def bucket(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n: few shapes, and at most half is padding."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power > 2 and n <= power * 3 // 4 else power


def padded_shape(prompts: Sequence[Prompt]) -> tuple[int, int]:
    """(B, T) of a batch of these prompts."""
    return bucket(len(prompts)), bucket(max(MIN_TOKENS, *(len(prompt.tokens) for prompt in prompts)))


def assemble(prompts: Sequence[Prompt], image_tokens: int, read: Callable[[ImageInput], np.ndarray]) -> PromptBatch:
    """Pads the prompts to a batch. `read` gives uint8[H, W, 3]; it is called once for each distinct image."""
    B, T = padded_shape(prompts)
    tokens, lengths, index = np.zeros((B, T), np.int32), np.ones(B, np.int32), np.full((B, T), -1, np.int32)
    slots: dict[Any, int] = {}
    images: list[np.ndarray] = []
    for row, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        tokens[row, :length], lengths[row] = prompt.tokens, max(length, 1)
        for image in prompt.images:
            if _key(image) not in slots:
                slots[_key(image)] = len(images)
                images.append(read(image))
        own_slots = np.array([slots[_key(image)] for image in prompt.images] + [0])
        ordinal, patch = np.divmod(prompt.image_feature_index, image_tokens)  # -1 gives ordinal -1, the 0 at the end
        shared_index = own_slots[ordinal] * image_tokens + patch
        index[row, :length] = np.where(prompt.image_feature_index >= 0, shared_index, -1)
    if not images:
        return PromptBatch(tokens, lengths, None, index)
    padded = np.zeros((1, bucket(len(images)), *images[0].shape), np.uint8)
    padded[0, : len(images)] = images
    return PromptBatch(tokens, lengths, padded, index)


def share_prefixes(prompts: Sequence[Prompt]) -> SharedPrefixes | None:
    """Cuts each prompt after its last image, since benchmarks ask many questions about one image.

    None where that would save less than half of the positions to compute.
    """
    numbers: dict[Any, int] = {}
    prefixes, suffixes, prefix_of = [], [], []
    for prompt in prompts:
        tokens, index, images = prompt[:3]
        cut = int(np.max(np.flatnonzero(index >= 0), initial=-1)) + 1
        key = (tokens[:cut].tobytes(), index[:cut].tobytes(), *map(_key, images))
        if key not in numbers:
            numbers[key] = len(prefixes)
            prefixes.append(Prompt(tokens[:cut], index[:cut], images))
        suffixes.append(Prompt(tokens[cut:], index[cut:], ()))
        prefix_of.append(numbers[key])
    shared = np.prod(padded_shape(prefixes)) + np.prod(padded_shape(suffixes))
    if 2 * shared > np.prod(padded_shape(prompts)) or not all(len(suffix.tokens) for suffix in suffixes):
        return None
    return SharedPrefixes(prefixes, suffixes, np.array(prefix_of, np.int32))


def _key(image: ImageInput) -> Any:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)
