"""The tokenizer of an export, with `<image>` and `<pad>`.

Transformers marks the positions of an image with the id of `<image>`, and looks up its embedding before it is replaced
by features, so that the id needs a row. This project needs no such token. Both tokens keep their ids, or the one that
the source's `config.json` has for images; otherwise they get the first unused ones, as in `llava-hf/llava-1.5-7b-hf`:
32000 and 32001 after the 32,000 tokens of LLaMA. If the model has no such rows, it is exported with more, a multiple of
64 as in that model. Each new row is the mean of the others, and so never has the largest logit.
"""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError
from llava_jax.convert.tensors import write_json
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.models.hf_fields import Json

# The files of a tokenizer; no others are copied from a source.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_ROLES = ("bos", "eos", "unk", "pad")
PAD_TOKEN = "<pad>"
ROWS_MULTIPLE = 64


class ImageToken(NamedTuple):
    """The token of images."""

    id: int
    text: str


class SpecialTokens(NamedTuple):
    """The tokens of images and padding in an export, and the number of rows that its model needs for them."""

    image: ImageToken
    pad: str
    added: dict[str, int]  # tokens that the tokenizer lacks -> id
    rows: int


def choose_special_tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, index: int | None = None
) -> SpecialTokens:
    """Chooses the tokens of images and of padding. A padding token that equals the unknown token is not used.

    `index` is the id of images in the source's `config.json`; it is ignored if it has no row. Raises UserError if the
    files of the source contradict each other.
    """
    vocab = tokenizer.get_vocab()
    own = vocab.get(IMAGE_TOKEN)
    index = index if index is not None and index < vocab_size else None
    if None not in (own, index) and own != index:
        raise UserError(f"the source's image_token_index is {index}, but its tokenizer gives {IMAGE_TOKEN} id {own}")
    tokens = {id: token for token, id in vocab.items()}
    id = next(id for id in (own, index, max(tokens) + 1) if id is not None)
    image = ImageToken(id, tokens.get(id, IMAGE_TOKEN))
    added = {} if id in tokens else {image.text: id}
    pad = tokenizer.pad_token
    if pad is None or pad == tokenizer.unk_token:
        pad = PAD_TOKEN
        if pad not in vocab:
            added[pad] = max(*tokens, *added.values(), -1) + 1
    needed = 1 + max(image.id, added.get(pad, vocab.get(pad, 0)))
    rows = vocab_size if needed <= vocab_size else -(-needed // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return SpecialTokens(image, pad, added, rows)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which mean the same for transformers 4.51 ... 5.23.

    They are not copied from the source, since versions interpret a class name like `LlamaTokenizer` differently, while
    `PreTrainedTokenizerFast` follows tokenizer.json. Raises UserError if tokens cannot be added.
    """
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    _add(values, special.added | ({} if special.image.text != IMAGE_TOKEN else {IMAGE_TOKEN: special.image.id}))
    write_json(directory / "tokenizer.json", values)
    roles = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in _ROLES} | {"pad_token": special.pad}
    config = {name: token for name, token in roles.items() if token is not None} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "padding_side": "left",  # answers of a batch of prompts continue on the right
    }
    if tokenizer.model_max_length < 10**9:  # a huge number means no limit
        config["model_max_length"] = tokenizer.model_max_length
    write_json(directory / "tokenizer_config.json", config)


def _add(values: Json, tokens: dict[str, int]) -> None:
    """Makes these tokens special ones of a tokenizer.json, whether or not its vocabulary has them."""
    known = {token["content"] for token in values["added_tokens"]}
    tokens = {text: id for text, id in tokens.items() if text not in known}
    if not tokens:
        return
    vocab = values["model"]["vocab"]
    if not isinstance(vocab, dict):
        kind = values["model"]["type"]
        raise UserError(f"{', '.join(tokens)} cannot be added to a {kind} tokenizer: add it before the import")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = values["added_tokens"] + [{"id": id, "content": text} | flags for text, id in tokens.items()]
    values["added_tokens"] = sorted(added, key=lambda token: token["id"])
    # Tokens keep their ids in the vocabulary; outside it, they would get new ones when the file is read.
    vocab |= {token["content"]: token["id"] for token in added}
