"""The tokenizer of an export, with `<image>` and `<pad>`.

Hugging Face marks the positions of an image by an id of its own, which the tokenizer has to give to `<image>`, and
looks its embedding up before it puts the features there: the id needs a row. Ours needs none. Both tokens keep the ids
that they have, or that the source's `config.json` has for images; where there are none, they get the first that no
token uses, as in `llava-hf/llava-1.5-7b-hf`: 32000 and 32001 after the 32,000 pieces of LLaMA. Where the model has no
such rows, it is exported with more, a multiple of 64 as there; each new row is the mean of the others, and so never
has the largest logit.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError
from llava_jax.convert.tensors import write_json
from llava_jax.data.conversation import IMAGE_TOKEN

Json = dict[str, Any]

# What makes a directory's tokenizer; nothing else is copied from a source.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_ROLES = ("bos", "eos", "unk", "pad")
PAD_TOKEN = "<pad>"
ROWS_MULTIPLE = 64


class ImageToken(NamedTuple):
    """How the processor calls an image."""

    id: int
    text: str


class SpecialTokens(NamedTuple):
    """What an export's tokenizer marks images and padding with, and how many rows its model needs for that."""

    image: ImageToken
    pad: str
    added: dict[str, int]  # those that the tokenizer lacks
    rows: int


def choose_special_tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, index: int | None = None
) -> SpecialTokens:
    """The tokens of images and of padding. A padding token that is the unknown one counts as none.

    `index` is the id that the source's `config.json` names for images; one without a row is of no use. Raises UserError
    where the source's files contradict each other.
    """
    vocab = tokenizer.get_vocab()
    own = vocab.get(IMAGE_TOKEN)
    index = index if index is not None and index < vocab_size else None
    if None not in (own, index) and own != index:
        raise UserError(f"the source's image_token_index is {index}, but its tokenizer gives {IMAGE_TOKEN} id {own}")
    tokens = {id: token for token, id in vocab.items()}
    added = {}
    if own is None:
        id = max(tokens) + 1 if index is None else index
        image = ImageToken(id, tokens.get(id, IMAGE_TOKEN))
        if id not in tokens:
            added[image.text] = id
    else:
        image = ImageToken(own, IMAGE_TOKEN)
    pad = tokenizer.pad_token
    if pad is None or pad == tokenizer.unk_token:
        pad = PAD_TOKEN
        if pad not in vocab:
            added[pad] = max(*tokens, *added.values(), -1) + 1
    needed = 1 + max(image.id, added.get(pad, vocab.get(pad, 0)))
    rows = vocab_size if needed <= vocab_size else -(-needed // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return SpecialTokens(image, pad, added, rows)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers 4.51 ... 5.23 read alike.

    Written from the tokenizer in use and not copied: versions differ in what they make of a class name like
    `LlamaTokenizer`, while `PreTrainedTokenizerFast` does what tokenizer.json says. Raises UserError where tokens
    cannot be added.
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
        "padding_side": "left",  # a batch of prompts is continued at the right
    }
    if tokenizer.model_max_length < 10**9:  # a huge number stands for none
        config["model_max_length"] = tokenizer.model_max_length
    write_json(directory / "tokenizer_config.json", config)


def _add(values: Json, tokens: dict[str, int]) -> None:
    """Makes these special tokens of a tokenizer.json, whether it has them as pieces or not at all."""
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
    # Tokens outside the vocabulary are numbered anew when read; inside it they keep their ids.
    vocab |= {token["content"]: token["id"] for token in added}
