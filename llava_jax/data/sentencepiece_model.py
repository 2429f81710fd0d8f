"""Makes fast tokenizers give the ids of the SentencePiece model that they were made of.

transformers 5 converts a `tokenizer.model` without the scores of its pieces and ranks merges by id. Pieces of several
spaces, which LLaMA's model merges last, then come first: "Hello  World" and all indented code get other ids. It also
adds no space before a text that begins with one. Here both are as in SentencePiece. Between special tokens the
tokenizer's `legacy` decides, which SentencePiece does not have.
"""

from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Metaspace, Sequence
from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError

SPACE = "\u2581"  # SentencePiece's character for a space
# Texts on which conversions of a SentencePiece model have differed from it.
_PROBES = (
    "Hello  World",
    "  two   three    four ",
    "def f(x):\n    if x:\n        return  1\n",
    "1234 e\u0301t\u00e9 \ufb01ne \u2460 \uff57ide 日本語 \u200b🧑‍🚀\ttab \r\n\n end",
)


def read_model(file: Path) -> ModelProto:
    """Reads a `tokenizer.model`. Raises UserError if it is no SentencePiece model."""
    try:
        model = ModelProto.FromString(file.read_bytes())
    except DecodeError:
        model = ModelProto()
    if not model.pieces:
        raise UserError(f"{file}: is no SentencePiece model")
    return model


def fits(model: ModelProto, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a fast tokenizer has the pieces of the model with the same ids."""
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return all(vocab.get(piece.piece) == id for id, piece in enumerate(model.pieces))


def follow(model: ModelProto, tokenizer: PreTrainedTokenizerBase, where: Path) -> None:
    """Makes a fast tokenizer of LLaMA's kind give the ids of the model that it was made of.

    Raises UserError if it cannot: the model is no BPE, has other pieces, or normalizes text.
    """
    if model.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
        raise UserError(
            f"{where}: a SentencePiece model of type {kind}; only BPE is supported without a tokenizer.json"
        )
    if not fits(model, tokenizer):
        raise UserError(f"{where}: the tokenizer made of it has other pieces; save a tokenizer.json beside it")
    backend = tokenizer.backend_tokenizer
    vocab = backend.get_vocab(with_added_tokens=False)
    backend.model = BPE(vocab, _merges(model, vocab), fuse_unk=True, byte_fallback=True)
    begin_with_space(tokenizer, model.normalizer_spec.add_dummy_prefix)
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in _PROBES:
        if tokenizer.encode(text, add_special_tokens=False) != processor.encode(text):
            raise UserError(
                f"{where}: no fast tokenizer gives the ids of this SentencePiece model for {text!r}, since it "
                "normalizes text in a way that is not supported: save a tokenizer.json beside it"
            )


def begin_with_space(tokenizer: PreTrainedTokenizerBase, begin: bool = True) -> None:
    """Makes a tokenizer of LLaMA's kind add a space before a text, also before one that begins with a space.

    Metaspace adds its character unless the text begins with it. After `Replace` no text begins with a space, so the
    first Metaspace always adds one, which the second one converts to the character of the pieces.
    """
    prepend = ("always" if tokenizer.legacy else "first") if begin else "never"
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Replace(" ", SPACE)
    backend.pre_tokenizer = Sequence(
        [Metaspace(" ", prepend_scheme=prepend, split=False), Metaspace(SPACE, prepend_scheme="never", split=False)]
    )


def begins_every_part(values: dict) -> bool:
    """Whether a tokenizer.json adds a space to each text between special tokens, as a `legacy` tokenizer does."""
    steps = [values.get("normalizer") or {}, values.get("pre_tokenizer") or {}]
    steps += [step for outer in steps for step in outer.get("normalizers", outer.get("pretokenizers", []))]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme") == "always" for step in steps)


def has_wrong_merges(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a fast tokenizer with LLaMA's or Mistral's pieces ranks the merge of two spaces first.

    Their models have it as the first piece after the bytes, but merge it last.
    """
    vocab = tokenizer.get_vocab()
    published = vocab.get("<0xFF>") == 258 and vocab.get(2 * SPACE) == 259
    return published and 2 * SPACE in tokenizer.tokenize("Hello  World")


def _merges(model: ModelProto, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that form a piece, by descending score.

    SentencePiece compares only scores and takes the leftmost pair of equal ones: the one whose left side is longer.
    """
    pairs = [
        (piece.score, left, right)
        for piece in model.pieces
        if piece.type == ModelProto.SentencePiece.NORMAL
        for cut in range(1, len(piece.piece))
        if (left := piece.piece[:cut]) in vocab and (right := piece.piece[cut:]) in vocab
    ]
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1]), -len(pair[2])))
    return [(left, right) for _, left, right in pairs]
