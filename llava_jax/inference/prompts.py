"""Requests as token ids and preprocessed images, and batches of them that compute shared prefixes once."""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.cli import UserError
from llava_jax.data.conversation import check_system, place_prompt_images
from llava_jax.data.features import TEXT, Features, Size
from llava_jax.data.images import load_image, load_pixels, preprocess, read_size
from llava_jax.data.templates import IMAGE_TOKEN, Template, get_template, stop_strings, with_im_start_end
from llava_jax.data.tokenization import IMAGE_TOKEN_INDEX, encode_turns, expand, load_tokenizer, one_tile
from llava_jax.inference.detokenization import AnswerStream
from llava_jax.inference.requests import ImageInput, PreparedImage, Request, Sampling
from llava_jax.models.config import LlavaConfig

MIN_TOKENS = 16  # that a row of a batch has room for


class Prompt(NamedTuple):
    """A request as token ids."""

    tokens: np.ndarray  # int32[L], 0 where an image is
    image_feature_index: np.ndarray  # int32[L]: tile of the request x P + patch, or TEXT or NEWLINE of `data.features`
    images: Sequence[ImageInput]
    tiles: Sequence[int]  # of each image
    begun: str = ""  # the text that the answer continues, with which the prompt ends


class PromptEncoder:
    """Turns requests into token ids and preprocessed images, and token ids into text."""

    def __init__(
        self,
        config: LlavaConfig,  # of the model, as is the tokenizer
        tokenizer: PreTrainedTokenizerBase,
        template: Template,  # of conversations
        end_ids: Sequence[int] = (),  # tokens that end an answer, besides EOS and the template's end mark
    ):
        self.config, self.tokenizer = config, tokenizer
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
        features = [self._features(image, several=marks > 1) for image in request.images]
        row = expand(encoded, self.config.image_tokens, np.iinfo(np.int32).max, features)
        return Prompt(
            row.tokens, row.image_feature_index, request.images, [image.tiles for image in features], request.begun
        )

    def read(self, image: ImageInput, several: bool = False) -> PreparedImage:
        """Reads and preprocesses an image. `several`: whether it is one of several of its request.

        Raises `UserError` where it is missing, damaged, or too thin for AnyRes.
        """
        if isinstance(image, PreparedImage):
            return image
        opened, config = load_pixels(image) if isinstance(image, Image.Image) else load_image(image), self.config
        if config.tiling:
            return PreparedImage(config.tiling.tiles(opened, several), self._features(opened, several))
        size = config.vision.image_size
        pixels = preprocess(opened, size, config.image_aspect, config.image_mean, config.image_resample)
        return PreparedImage(pixels[None], one_tile(config.image_tokens))

    def _features(self, image: ImageInput, several: bool) -> Features:
        if isinstance(image, PreparedImage):
            return image.features
        if self.config.tiling is None:
            return one_tile(self.config.image_tokens)
        size = Size(*load_pixels(image).size) if isinstance(image, Image.Image) else read_size(image)
        return self.config.tiling.features(size, several)

    def answer_stream(self, sampling: Sampling, begun: str = "") -> AnswerStream:
        """Decodes the tokens of an answer that continues `begun`."""
        stop_ids = [*(() if sampling.ignore_eos else self.stop_ids), *sampling.stop_token_ids]
        # Special tokens are in the answer only if the constraint has them.
        constrained = sampling.constraint is not None
        verbatim = sampling.verbatim or constrained
        stops = [*(() if sampling.ignore_eos or verbatim else self.stop_strings), *sampling.stop]
        return AnswerStream(self.tokenizer, stop_ids, stops, begun, verbatim, special=constrained)


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


def assemble(prompts: Sequence[Prompt], image_tokens: int, read: Callable[..., PreparedImage]) -> PromptBatch:
    """Pads the prompts to a batch. `read` is `PromptEncoder.read`; it is called once for each distinct image."""
    B, T = padded_shape(prompts)
    tokens, lengths, index = np.zeros((B, T), np.int32), np.ones(B, np.int32), np.full((B, T), TEXT, np.int32)
    slots: dict[Any, range] = {}  # of the tiles of each image
    tiles: list[np.ndarray] = []
    for row, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        tokens[row, :length], lengths[row] = prompt.tokens, max(length, 1)
        keys = list(map(_key, prompt.images, prompt.tiles))
        for key, image in zip(keys, prompt.images, strict=True):
            if key not in slots:
                new = read(image, several=len(keys) > 1).tiles
                slots[key] = range(len(tiles), len(tiles) + len(new))
                tiles.extend(new)
        own_slots = np.array([*itertools.chain.from_iterable(slots[key] for key in keys), 0])
        tile, patch = np.divmod(prompt.image_feature_index, image_tokens)  # text gives tile -1, the 0 at the end
        shared_index = own_slots[tile] * image_tokens + patch
        index[row, :length] = np.where(prompt.image_feature_index >= 0, shared_index, prompt.image_feature_index)
    if not tiles:
        return PromptBatch(tokens, lengths, None, index)
    padded = np.zeros((1, bucket(len(tiles)), *tiles[0].shape), np.uint8)
    padded[0, : len(tiles)] = tiles
    return PromptBatch(tokens, lengths, padded, index)


def share_prefixes(prompts: Sequence[Prompt]) -> SharedPrefixes | None:
    """Cuts each prompt after its last image, since benchmarks ask many questions about one image.

    None where that would save less than half of the positions to compute.
    """
    numbers: dict[Any, int] = {}
    prefixes, suffixes, prefix_of = [], [], []
    for prompt in prompts:
        tokens, index, images, tiles = prompt[:4]
        cut = int(np.max(np.flatnonzero(index != TEXT), initial=-1)) + 1
        key = (tokens[:cut].tobytes(), index[:cut].tobytes(), *map(_key, images, tiles))
        if key not in numbers:
            numbers[key] = len(prefixes)
            prefixes.append(Prompt(tokens[:cut], index[:cut], images, tiles))
        suffixes.append(Prompt(tokens[cut:], index[cut:], (), ()))
        prefix_of.append(numbers[key])
    shared = np.prod(padded_shape(prefixes)) + np.prod(padded_shape(suffixes))
    if 2 * shared > np.prod(padded_shape(prompts)) or not all(len(suffix.tokens) for suffix in suffixes):
        return None
    return SharedPrefixes(prefixes, suffixes, np.array(prefix_of, np.int32))


def _key(image: ImageInput, tiles: int) -> Any:
    """The same for an image with as many tiles: one of several of a request may have its base alone."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image), tiles
