"""The tokenizer of an export, which needs a token for images.

Hugging Face marks the positions of an image by an id of its own, which the tokenizer has to give to `<image>`, and
looks its embedding up before it puts the features there: the id needs a row. Ours needs none. To add none (an export
has the rows of its source, bit for bit), `<image>` gets, in this order,

* the id that it has, or that the source's `config.json` has for it;
* the first row that no token uses: many vocabularies are padded to a round number;
* the row of a byte that UTF-8 never contains (0xFF, ...), which no text can ever produce. Most byte-level and
  byte-fallback vocabularies, LLaMA's among them, have such rows, and they are of no other use;
* the row of a special token that conversations do not use, as SmolLM2's `<empty_output>`. Written out in a text, that
  token is then read as any other text.
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
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_ROLES = ("bos", "eos", "unk", "pad")
_NOT_IN_UTF8 = (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)


class ImageToken(NamedTuple):
    """How the processor calls an image."""

    id: int
    text: str
    replaces: str | None = None  # the token that has the id until now, if that is to be another


def choose_image_token(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, index: int | None = None, in_use: str = ""
) -> ImageToken:
    """The id and text of the image token.

    Args:
      tokenizer: that of the model.
      vocab_size: rows of the model.
      index: the id that the source's `config.json` names, if any; one without a row is of no use.
      in_use: text of conversations, whose special tokens are in use.

    Raises:
      UserError: no row can be had.
    """
    vocab = tokenizer.get_vocab()
    tokens = {id: token for token, id in vocab.items()}
    own = vocab.get(IMAGE_TOKEN)
    if index is not None and index < vocab_size:
        if own not in (None, index):
            raise UserError(
                f"the source's image_token_index is {index}, but its tokenizer gives {IMAGE_TOKEN} id {own}"
            )
        return ImageToken(index, tokens.get(index, IMAGE_TOKEN))
    if own is not None and own < vocab_size:
        return ImageToken(own, IMAGE_TOKEN)
    if own is None:
        if max(tokens) + 1 < vocab_size:
            return ImageToken(max(tokens) + 1, IMAGE_TOKEN)
        for token in _unreachable(_read(tokenizer)) + _idle(tokenizer, in_use):
            if vocab[token] < vocab_size:
                return ImageToken(vocab[token], IMAGE_TOKEN, replaces=token)
    raise UserError(
        f"Hugging Face needs a row for {IMAGE_TOKEN}, and none of the model's {vocab_size} is free: add the token to "
        "the language model's tokenizer and resize its embeddings before the import"
    )


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, image: ImageToken, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers 4.51 ... 5.23 read alike.

    Written from the tokenizer in use and not copied: versions differ in what they make of a class name like
    `LlamaTokenizer`, while `PreTrainedTokenizerFast` does what tokenizer.json says.
    """
    values = _read(tokenizer)
    if image.text == IMAGE_TOKEN and IMAGE_TOKEN not in tokenizer.get_added_vocab():
        _add(values, image)
    write_json(directory / "tokenizer.json", values)
    roles = {f"{role}_token": getattr(tokenizer, f"{role}_token") for role in _ROLES}
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


def _read(tokenizer: PreTrainedTokenizerBase) -> Json:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _unreachable(values: Json) -> list[str]:
    """The tokens of single bytes that UTF-8 never contains and that are not part of a longer token."""
    model = values["model"]
    if model.get("byte_fallback"):
        bytes_ = [f"<0x{byte:02X}>" for byte in _NOT_IN_UTF8]
    elif '"ByteLevel"' in json.dumps([values["pre_tokenizer"], values["decoder"]]):
        bytes_ = [chr(byte) for byte in _NOT_IN_UTF8]  # a byte-level vocabulary writes these bytes as Latin-1
    else:
        return []
    merged = {part for merge in model.get("merges", ()) for part in merge}
    added = {token["content"] for token in values["added_tokens"]}
    return [token for token in bytes_ if token in model["vocab"] and token not in merged | added]


def _idle(tokenizer: PreTrainedTokenizerBase, in_use: str) -> list[str]:
    """The special tokens without a role, the last first."""
    roles = {getattr(tokenizer, f"{role}_token") for role in _ROLES}
    in_use += str(tokenizer.chat_template)
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    return [token for token in reversed(special) if token not in roles and token not in in_use]


def _add(values: Json, image: ImageToken) -> None:
    vocab = values["model"]["vocab"]
    if not isinstance(vocab, dict):
        kind = values["model"]["type"]
        raise UserError(f"{IMAGE_TOKEN} cannot be added to a {kind} tokenizer: add it before the import")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [token for token in values["added_tokens"] if token["content"] != image.replaces]
    added.append({"id": image.id, "content": image.text} | flags)
    values["added_tokens"] = sorted(added, key=lambda token: token["id"])
    # Tokens outside the vocabulary are numbered anew when read; inside it they keep their ids.
    vocab |= {token["content"]: token["id"] for token in added}
    vocab.pop(image.replaces, None)
