"""Token ids and labels of conversations.

The rendered text is cut at `<image>` and tokenized chunk by chunk, with BOS before the first chunk alone. Published
checkpoints were trained on these ids, side effects included (a SentencePiece tokenizer begins the chunk after an image
with `▁`). The labels come from character offsets, never from the lengths of parts that are tokenized again.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from llava_jax.cli import UserError, short, warn
from llava_jax.data.conversation import OpenTurn, check_system, check_thoughts, place_images, render
from llava_jax.data.features import TEXT, Features, joined
from llava_jax.data.samples import Sample
from llava_jax.data.templates import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, Template
from llava_jax.data.tokenizer_files import Tokenizer, read_tokenizer_files
from llava_jax.remote import local

IMAGE_TOKEN_INDEX = -200  # the id of an image
IGNORE_INDEX = -100  # the label of a position without a target


class Encoded(NamedTuple):
    """A conversation: ids, with `IMAGE_TOKEN_INDEX` for an image, and unshifted labels; int32[N] both."""

    input_ids: np.ndarray
    labels: np.ndarray


class Segment(NamedTuple):
    """A sample in a row: an `Encoded` with its images expanded to the positions of their features."""

    tokens: np.ndarray  # int32[L], 0 under images
    labels: np.ndarray  # int32[L]
    image_feature_index: np.ndarray  # int32[L]: tile x P + patch, or TEXT or NEWLINE of `data.features`
    num_images: int
    num_tiles: int  # of all images; as many as images without AnyRes


def load_tokenizer(directory: epath.PathLike) -> Tokenizer:
    """Loads the fast tokenizer of an HF directory; of a bare `tokenizer.model` of LLaMA with SentencePiece's own ids.

    transformers 5 adds no BOS if a SentencePiece model has no `add_bos_token`; here LLaMA's default, true, is used. It
    also drops `legacy` (whether text after `</s>` begins with `▁`) in `save_pretrained`; here it is kept. The directory
    may be remote (`gs://`). Code in it is never run.

    Raises:
      UserError: there is no tokenizer, it knows no character offsets, or it adds an end token to every text.
    """
    if not epath.Path(directory).is_dir():
        raise UserError(f"{directory}: no such tokenizer directory")
    files = read_tokenizer_files(local(directory), directory)
    try:
        tokenizer = _load(local(directory), files)
        ids, has_pieces = tokenizer.encode("a"), bool(tokenizer.get_vocab())
    except UserError:
        raise
    except BaseException as error:  # the tokenizers library raises bare exceptions for a broken file, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "auto_map" in files.get("tokenizer_config.json", ()):
            raise UserError(
                f"{directory}: tokenizer_config.json has auto_map, so the tokenizer needs code of its own, which is "
                "never run: save it as a tokenizer.json with a class of transformers, and remove auto_map"
            ) from error
        raise UserError(
            f"{directory}: holds no tokenizer that transformers reads: {str(error) or type(error).__name__}"
        ) from error
    if not has_pieces:
        raise UserError(f"{directory}: its tokenizer has no pieces")
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: {type(tokenizer).__name__} knows no character offsets: save a tokenizer.json")
    if ids[-1:] == [tokenizer.eos_token_id]:
        raise UserError(
            f"{directory}: adds {tokenizer.eos_token} to every text, a prompt included: set add_eos_token to false in "
            "its tokenizer_config.json (templates have end marks of their own)"
        )
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def _load(directory: Path, files: dict[str, dict[str, Any]]) -> Tokenizer:
    from transformers import AutoTokenizer, LlamaTokenizer  # and torch where it is installed, which takes seconds

    from llava_jax.data import sentencepiece_model

    model_file = directory / "tokenizer.model"
    config = files.get("tokenizer_config.json", {})
    if "tokenizer.json" in files:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if isinstance(tokenizer, LlamaTokenizer):
            if config.get("legacy") is None:  # transformers 4 does what the file says, 5 ignores it
                tokenizer.legacy = sentencepiece_model.begins_every_part(files["tokenizer.json"])
            sentencepiece_model.begin_with_space(tokenizer, tokenizer.add_prefix_space is not False)
            # transformers 5 saves the wrong merges that it made of a tokenizer.model: that file is used if it exists.
            model = sentencepiece_model.read_model(model_file) if model_file.exists() else None
            if model and sentencepiece_model.fits(model, tokenizer):
                sentencepiece_model.follow(model, tokenizer, model_file)
        if sentencepiece_model.has_wrong_merges(tokenizer):
            warn(
                f"{directory / 'tokenizer.json'}: joins two spaces, as transformers 5 converts LLaMA's "
                "tokenizer.model, which does not: put that file beside it, and its ids count"
            )
        return tokenizer
    is_llama = config.get("tokenizer_class", "LlamaTokenizer") in ("LlamaTokenizer", "LlamaTokenizerFast")
    if not (is_llama and model_file.exists()):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    bos = config.get("add_bos_token", True)
    tokenizer = LlamaTokenizer.from_pretrained(
        directory, add_bos_token=bos, local_files_only=True, trust_remote_code=False
    )
    sentencepiece_model.follow(sentencepiece_model.read_model(model_file), tokenizer, model_file)
    return tokenizer


def encode_sample(
    sample: Sample, template: Template, tokenizer: Tokenizer, *, image_position: str = "first", seed: int = 0
) -> Encoded:
    """Ids and labels of a training sample.

    Raises `UserError` with its id if it has no answer, or a system prompt or thoughts for which the template has no
    place.
    """
    turns = place_images(sample.turns, image_position, seed, sample.id)
    try:
        check_system(turns, template)
        check_thoughts(turns, template)
        encoded = encode_turns(turns, template, tokenizer)
    except UserError as error:
        raise UserError(f"sample {short(sample.id)}: {error}") from error
    if np.all(encoded.labels == IGNORE_INDEX):
        raise UserError(f"sample {short(sample.id)}: nothing to learn from, as it has no answer: drop it from the data")
    return encoded


def encode_turns(turns: Sequence[OpenTurn], template: Template, tokenizer: Tokenizer, begun: str = "") -> Encoded:
    """Ids and labels of turns, which are rendered as in `render`.

    Raises `UserError` if the template puts images between tokens that are not in the vocabulary.
    """
    if IM_START_TOKEN in template.image:
        require_tokens(tokenizer, IM_START_TOKEN, IM_END_TOKEN)
    system = default_system(tokenizer) if template.system is None else None
    text, target_spans = render(turns, template, system, begun)
    return _encode(text, target_spans, tokenizer)


def expand(encoded: Encoded, image_tokens: int, max_length: int, images: Sequence[Features] | None = None) -> Segment:
    """Gives every image the positions of its features and truncates to `max_length`, but not within an image.

    An image that does not fit completely is dropped with all after it; `num_images` are left. The dropped positions may
    hold all labels.

    Args:
      images: the features of each image; by default one tile of `image_tokens` features (P).
    """
    if images is None:
        images = [one_tile(image_tokens)] * int((encoded.input_ids == IMAGE_TOKEN_INDEX).sum())
    ids, labels = truncate(encoded, images, max_length)
    is_image, widths = ids == IMAGE_TOKEN_INDEX, _widths(encoded, images)[: len(ids)]
    under_image = np.repeat(is_image, widths)
    num_images = int(is_image.sum())
    feature_index = np.full(under_image.shape, TEXT, np.int32)
    feature_index[under_image] = joined(images[:num_images], image_tokens)
    return Segment(
        tokens=np.where(under_image, 0, np.repeat(ids, widths)).astype(np.int32),
        labels=np.repeat(labels, widths),
        image_feature_index=feature_index,
        num_images=num_images,
        num_tiles=sum(image.tiles for image in images[:num_images]),
    )


def truncate(encoded: Encoded, images: Sequence[Features], max_length: int) -> Encoded:
    """The part of ids and labels that `expand` keeps."""
    kept = int(np.searchsorted(np.cumsum(_widths(encoded, images)), max_length, side="right"))
    return Encoded(encoded.input_ids[:kept], encoded.labels[:kept])


@functools.lru_cache
def one_tile(tokens: int) -> Features:
    """The features of an image without AnyRes."""
    return Features(np.arange(tokens, dtype=np.int32), tiles=1)


def _widths(encoded: Encoded, images: Sequence[Features]) -> np.ndarray:
    """The positions of each id; int[N]."""
    is_image = encoded.input_ids == IMAGE_TOKEN_INDEX
    widths = np.ones(is_image.shape, np.int64)
    widths[is_image] = [len(image.index) for image in images]
    return widths


class _Chunk(NamedTuple):
    """The tokens of a part of a text that is tokenized by itself."""

    after_image: bool
    ids: np.ndarray  # int32[N], without BOS unless it begins the text
    starts: np.ndarray  # int64[N]: the first character of each in the complete text, not decreasing
    ends: np.ndarray  # int64[N]: the character after its last
    added: np.ndarray  # bool[N]: whether the tokenizer added it to the text


def _encode(text: str, target_spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Encoded:
    spans = np.array(target_spans, np.int64).reshape(-1, 2)
    chunks = _tokenize(text, (), tokenizer)
    if cuts := _straddled(chunks, spans[:, 0]):
        # White space at the beginning of an answer may share a token with the end of its prompt. Generation never
        # gives that token: a prompt that ends with "\n" is followed by "\n", not by "\n\n". So it is cut there.
        uncut, chunks = chunks, _tokenize(text, cuts, tokenizer)
        _require_same_text(uncut, chunks, text[cuts[0] :], tokenizer)
    ids, labels = [], []
    for chunk in chunks:
        if chunk.after_image:
            ids.append([IMAGE_TOKEN_INDEX])
            labels.append([IGNORE_INDEX])
        ids.append(chunk.ids)
        labels.append(np.where(_overlap(chunk, spans) & ~chunk.added, chunk.ids, IGNORE_INDEX))
    return Encoded(np.concatenate(ids).astype(np.int32), np.concatenate(labels).astype(np.int32))


def _tokenize(text: str, cuts: Sequence[int], tokenizer: Tokenizer) -> list[_Chunk]:
    """Tokenizes the texts between images, cut at these characters, each by itself."""
    parts, start = [], 0  # (text, its first character, whether it follows an image)
    for i, between in enumerate(text.split(IMAGE_TOKEN)):
        end = start + len(between)
        bounds = [start, *(cut for cut in cuts if start < cut < end), end]
        parts += [(text[a:b], a, i > 0 and a == start) for a, b in itertools.pairwise(bounds)]
        start = end + len(IMAGE_TOKEN)
    tokenized = tokenizer(
        [part for part, _, _ in parts], return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    chunks = []
    for i, (_, begin, after_image) in enumerate(parts):
        added = np.array(tokenized["special_tokens_mask"][i], bool)
        kept = ~added if i else np.full(added.shape, True)
        ids = np.array(tokenized["input_ids"][i], np.int32)
        offsets = np.array(tokenized["offset_mapping"][i], np.int64).reshape(-1, 2)[kept] + begin
        chunks.append(_Chunk(after_image, ids[kept], *_extents(offsets, begin), added[kept]))
    return chunks


def _extents(offsets: np.ndarray, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the tokens of a part of a text that begins at `begin`, from offsets int[N, 2].

    Some tokenizers leave white space out of their offsets: a token gets the characters between it and the one before.
    A token with an empty offset counts as a character, because it is a target in an answer.
    """
    starts, ends = offsets.T
    previous_ends = np.maximum.accumulate(np.concatenate([[begin], ends]))[:-1]
    starts = np.minimum(starts, previous_ends)
    return starts, np.maximum(ends, starts + 1)


def _overlap(chunk: _Chunk, spans: np.ndarray) -> np.ndarray:
    """Which tokens overlap one of the sorted spans, int[S, 2]; bool[N]."""
    first = np.searchsorted(spans[:, 1], chunk.starts, side="right")  # the first span that ends after the token's start
    return np.append(spans[:, 0], np.iinfo(np.int64).max)[first] < chunk.ends


def _straddled(chunks: list[_Chunk], positions: np.ndarray) -> list[int]:
    """The sorted positions that are within a token."""
    found = []
    for chunk in chunks:
        ends = np.maximum.accumulate(chunk.ends)
        first = np.searchsorted(ends, positions, side="right")  # the first token that ends after the position
        within = np.append(chunk.starts, np.iinfo(np.int64).max)[first] < positions
        found += positions[within].tolist()
    return found


def _require_same_text(uncut: list[_Chunk], cut: list[_Chunk], answer: str, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if cutting the text changes what its tokens decode to, as in SentencePiece by a space."""
    before, after = (tokenizer.decode(np.concatenate([chunk.ids for chunk in chunks])) for chunks in (uncut, cut))
    if before != after:
        raise UserError(
            f"the tokenizer joins the end of the prompt and the beginning of the answer {answer[:20]!r} in one token, "
            "so that no prompt can be continued by this answer: choose a template made for the tokenizer"
        )


def default_system(tokenizer: Tokenizer) -> str:
    """The system prompt for templates that leave it to the tokenizer (`system` None)."""
    return _default_system(str(tokenizer.chat_template))


@functools.lru_cache
def _default_system(chat_template: str) -> str:
    """The default system prompt, a literal in a ChatML chat template; "" if it has none.

    SmolLM2 and Qwen2 differ in nothing else. Reading the source of the template does not need to run it.
    """
    match = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>", chat_template)
    return match[1] if match else ""


def require_tokens(tokenizer: Tokenizer, *tokens: str) -> None:
    """Raises `UserError` if the tokenizer lacks one of the tokens."""
    missing = [token for token in tokens if token not in tokenizer.get_added_vocab()]
    if missing:
        raise UserError(f"mm_use_im_start_end needs tokens that the tokenizer lacks: {', '.join(missing)}")
