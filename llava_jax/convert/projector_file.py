"""Files of a projector: with names of transformers, or `mm_projector.bin` of the original LLaVA's stage 1.

Some of the first LLaVAs have tokens around the image, whose embeddings stage 1 trained, too: its file then holds all
embeddings, or those of the new tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llava_jax.cli import UserError
from llava_jax.convert.adapter import without_peft
from llava_jax.convert.language_model import LanguageModel
from llava_jax.convert.stored_tensor import StoredTensor, Tensors, concatenated, with_rows
from llava_jax.convert.tensors import open_files
from llava_jax.data.templates import IM_END_TOKEN, IM_START_TOKEN
from llava_jax.data.tokenization import load_tokenizer

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tokens in the order in which the original adds those that a model needs.
NEW_TOKENS = ("[PAD]", "<im_patch>", IM_START_TOKEN, IM_END_TOKEN)


class ProjectorFile(NamedTuple):
    """The tensors of a projector, and the embeddings of tokens in its file, if there are any."""

    path: Path
    projector: Tensors
    embeddings: StoredTensor | None


def open_projector(path: Path) -> ProjectorFile:
    tensors = without_peft(open_files([path]))
    embeddings = tensors.pop(EMBEDDINGS, None)
    return ProjectorFile(path, tensors, embeddings)


def with_new_tokens(model: LanguageModel, file: ProjectorFile) -> LanguageModel:
    """The model with the file's embeddings and their tokens, which the tokenizer gets if it lacks them.

    The file has no rows of the head for them: these become the mean of the others. Raises UserError if the file's
    embeddings are not those of this model with up to four more.
    """
    if file.embeddings is None:
        return model
    if EMBEDDINGS not in model.tensors:
        raise UserError(f"{file.path}: has embeddings, but {model.where} is of a model without {EMBEDDINGS}")
    old, new = model.tensors[EMBEDDINGS], file.embeddings
    matrices = len(new.shape) == len(old.shape) == 2
    whole = matrices and new.shape[0] >= old.shape[0]
    added = new.shape[0] - old.shape[0] if whole else new.shape[0] if matrices else None
    if not matrices or new.shape[1:] != old.shape[1:] or added not in (0, 2, 3, 4):
        raise UserError(
            f"{file.path}: its embeddings are {new.shape}, those of {model.where} {old.shape}: it is for another model"
        )
    rows = old.shape[0] + added
    tensors = {EMBEDDINGS: new if whole else concatenated(old, new)}
    if HEAD in model.tensors:
        tensors[HEAD] = with_rows(model.tensors[HEAD], rows)

    def write_tokenizer(directory: Path) -> None:
        model.write_tokenizer(directory)
        _add_tokens(directory, NEW_TOKENS[len(NEW_TOKENS) - added :], old.shape[0], file.path)

    return model._replace(
        config=model.config | {"vocab_size": rows}, tensors=model.tensors | tensors, write_tokenizer=write_tokenizer
    )


def _add_tokens(directory: Path, tokens: Sequence[str], first: int, where: Path) -> None:
    """Adds tokens with the ids from `first` on, unless the tokenizer has them."""
    tokenizer = load_tokenizer(directory)
    absent = [token for token in tokens if token not in tokenizer.get_vocab()]
    if absent:
        tokenizer.add_tokens(absent, special_tokens=True)
        tokenizer.save_pretrained(directory)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    if ids != list(range(first, first + len(tokens))):
        raise UserError(
            f"{where}: has embeddings of {', '.join(tokens)} from id {first} on, but to the tokenizer these are "
            f"{', '.join(map(str, ids))}: it is for another model"
        )
