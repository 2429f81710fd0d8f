"""Token ids and the mask of what is learned.

The ids are those of the rendered prompt, cut at `<image>` and tokenized chunk by chunk with BOS before the first
alone: what published checkpoints were trained on, side effects included (a SentencePiece tokenizer begins the chunk
after an image with `▁`). The mask comes from character offsets and never from the lengths of parts tokenized anew.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from llava_jax.cli import UserError
from llava_jax.data.conversation import (
    IM_END_TOKEN,
    IM_START_TOKEN,
    IMAGE_TOKEN,
    Template,
    place_images,
    render,
)
from llava_jax.data.sources import Sample
from llava_jax.remote import local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_INDEX = -200  # stands in ids where the features of an image go
IGNORE_INDEX = -100  # a label that is not learned


class Encoded(NamedTuple):
    """A conversation as ids: int32[N] both; one `IMAGE_TOKEN_INDEX` an image, labels unshifted."""

    input_ids: np.ndarray
    labels: np.ndarray


class Row(NamedTuple):
    """An `Encoded` with P positions an image. `image_feature_index` is image x P + patch, -1 for text."""

    tokens: np.ndarray  # int32[L], 0 under images
    labels: np.ndarray  # int32[L]
    image_feature_index: np.ndarray  # int32[L]
    num_images: int


def load_tokenizer(directory: epath.PathLike) -> PreTrainedTokenizerBase:
    """The fast tokenizer of an HF directory, a bare `tokenizer.model` of LLaMA included.

    transformers 5 adds no BOS where a SentencePiece model comes without `add_bos_token`; here LLaMA's default, true,
    holds. It also forgets `legacy` (whether text after `</s>` begins with `▁`) in `save_pretrained`; here it is kept.
    The directory may be remote (`gs://`). Raises `UserError` where there is no tokenizer, or none that knows character
    offsets.
    """
    if not epath.Path(directory).is_dir():
        raise UserError(f"{directory}: no such tokenizer directory")
    try:
        tokenizer = _load(local(directory))
    except Exception as error:  # the tokenizers library raises no other class for a broken file
        raise UserError(f"{directory}: holds no tokenizer that transformers reads: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: {type(tokenizer).__name__} knows no character offsets: save a tokenizer.json")
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def _load(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, LlamaTokenizer  # and torch where it is installed, which takes seconds

    if (directory / "tokenizer.model").exists() and not (directory / "tokenizer.json").exists():
        config_file = directory / "tokenizer_config.json"
        config = json.loads(config_file.read_text()) if config_file.exists() else {}
        if config.get("tokenizer_class", "LlamaTokenizer") in ("LlamaTokenizer", "LlamaTokenizerFast"):
            return LlamaTokenizer.from_pretrained(directory, add_bos_token=config.get("add_bos_token", True))
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def encode_sample(
    sample: Sample,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_position: str = "first",
    seed: int = 0,
) -> Encoded:
    """Ids and labels of a training sample. Raises `UserError` with its id where there is nothing to learn."""
    turns = place_images(sample.turns, image_position, seed, sample.id)
    try:
        encoded = encode_turns(turns, template, tokenizer)
    except UserError as error:
        raise UserError(f"sample {sample.id}: {error}") from error
    if np.all(encoded.labels == IGNORE_INDEX):
        raise UserError(f"sample {sample.id}: nothing to learn from, since it has no answer: drop it from the data")
    return encoded


def encode_turns(
    turns: Sequence[tuple[str, str | None]],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> Encoded:
    """Ids and labels of turns as `render` takes them; with an open last turn the prompt of an answer.

    Raises `UserError` where the template puts images between tokens that are not in the vocabulary.
    """
    if IM_START_TOKEN in template.image:
        require_tokens(tokenizer, IM_START_TOKEN, IM_END_TOKEN)
    system = default_system(tokenizer) if template.system is None else None
    text, learned_spans = render(turns, template, system)
    return _encode(text, learned_spans, tokenizer)


def expand(encoded: Encoded, image_tokens: int, max_length: int) -> Row:
    """Gives every image its `image_tokens` positions and truncates to `max_length`, never within an image.

    An image that does not fit whole goes, and all after it: `num_images` tells how many are left. What is cut may
    hold every label.
    """
    ids, labels = truncate(encoded, image_tokens, max_length)
    is_image = ids == IMAGE_TOKEN_INDEX
    widths = np.where(is_image, image_tokens, 1)
    under_image = np.repeat(is_image, widths)
    num_images = int(is_image.sum())
    feature_index = np.full(under_image.shape, -1, np.int32)
    feature_index[under_image] = np.arange(num_images * image_tokens, dtype=np.int32)
    return Row(
        tokens=np.where(under_image, 0, np.repeat(ids, widths)).astype(np.int32),
        labels=np.repeat(labels, widths),
        image_feature_index=feature_index,
        num_images=num_images,
    )


def truncate(encoded: Encoded, image_tokens: int, max_length: int) -> Encoded:
    """What `expand` keeps."""
    widths = np.where(encoded.input_ids == IMAGE_TOKEN_INDEX, image_tokens, 1)
    kept = int(np.searchsorted(np.cumsum(widths), max_length, side="right"))
    return Encoded(encoded.input_ids[:kept], encoded.labels[:kept])


def _encode(text: str, learned_spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    chunks = text.split(IMAGE_TOKEN)
    tokenized = tokenizer(chunks, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, labels, chunk_start = [], [], 0
    for i, chunk in enumerate(chunks):
        chunk_ids = np.array(tokenized["input_ids"][i], np.int32)
        added = np.array(tokenized["special_tokens_mask"][i], bool)  # by the tokenizer, not found in the text
        offsets = np.array(tokenized["offset_mapping"][i], np.int64).reshape(-1, 2) + chunk_start
        chunk_labels = np.where(_overlap(offsets, learned_spans, chunk_start) & ~added, chunk_ids, IGNORE_INDEX)
        if i:
            ids.append([IMAGE_TOKEN_INDEX])
            labels.append([IGNORE_INDEX])
            chunk_ids, chunk_labels = chunk_ids[~added], chunk_labels[~added]
        ids.append(chunk_ids)
        labels.append(chunk_labels)
        chunk_start += len(chunk) + len(IMAGE_TOKEN)
    return Encoded(np.concatenate(ids).astype(np.int32), np.concatenate(labels).astype(np.int32))


def _overlap(offsets: np.ndarray, spans: list[tuple[int, int]], chunk_start: int) -> np.ndarray:
    """Which tokens overlap one of the sorted spans: bool[N] of offsets int[N, 2].

    Some tokenizers leave white space out of their offsets; a token takes what lies between it and the one before.
    One with an empty offset still counts as a character, since it has to be learned where it stands in an answer.
    """
    if not spans:
        return np.zeros(len(offsets), bool)
    starts, ends = offsets.T
    previous_ends = np.maximum.accumulate(np.concatenate([[chunk_start], ends]))[:-1]
    starts = np.minimum(starts, previous_ends)
    ends = np.maximum(ends, starts + 1)
    span_starts, span_ends = np.array(spans).T
    first = np.searchsorted(span_ends, starts, side="right")  # the first span that ends after the token's start
    span_starts = np.append(span_starts, np.iinfo(np.int64).max)
    return span_starts[first] < ends


def default_system(tokenizer: PreTrainedTokenizerBase) -> str:
    """The system prompt of templates that leave it to the tokenizer (`system` None)."""
    return _default_system(str(tokenizer.chat_template))


@functools.lru_cache
def _default_system(chat_template: str) -> str:
    """The default system prompt that a ChatML chat template holds as a literal; "" where it has none.

    SmolLM2 and Qwen2 differ in nothing else. Reading the source spares the base install a Jinja.
    """
    match = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>", chat_template)
    return match[1] if match else ""


def require_tokens(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> None:
    missing = [token for token in tokens if token not in tokenizer.get_added_vocab()]
    if missing:
        raise UserError(f"mm_use_im_start_end needs tokens that the tokenizer lacks: {', '.join(missing)}")
