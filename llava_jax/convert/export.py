"""A checkpoint to a directory that `LlavaForConditionalGeneration` and `AutoProcessor` of transformers load.

The processor renders our text, and with byte-level tokenizers gives our ids. A SentencePiece tokenizer begins the text
after an image with `▁` when that is tokenized by itself, as the published code does and ours; Hugging Face's
processor, to which the image is a token inside one text, gives no `▁` there (unless the tokenizer is a `legacy` one).
The model is the same: equal ids, equal logits.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.checkpoint import Checkpoint, absolute, new_directory, open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert import hf_config, hf_processor
from llava_jax.convert.chat_template import chat_template
from llava_jax.convert.hf_tokenizer import SpecialTokens, choose_special_tokens, write_tokenizer
from llava_jax.convert.layouts import EXPORT_PREFIXES, entries_of
from llava_jax.convert.names import Entry, to_hf_tensor
from llava_jax.convert.shards import Tensor, write_shards
from llava_jax.convert.tensors import write_json
from llava_jax.data.conversation import Template, get_template, stop_strings, with_im_start_end
from llava_jax.data.tokenization import default_system, load_tokenizer
from llava_jax.models.config import LlavaConfig

DTYPES = ("float32", "bfloat16", "float16")
_ROWS = ("llm.embed_tokens.embedding", "llm.lm_head.kernel")  # those with a row for each token


def export(checkpoint_path: str, output: str, dtype: str | None = None) -> None:
    """Writes weights, configs, tokenizer, processor and chat template, in `dtype` or in the types stored.

    Tensors are those of the checkpoint: with `dtype` None bit for bit, with rows added where `<image>` or `<pad>` have
    none. Raises UserError where Hugging Face has no such model.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    checkpoint.check()
    if checkpoint.config.projector_type not in ("linear", "mlp2x_gelu"):
        raise UserError(
            f"{checkpoint_path}: Hugging Face has no projector {checkpoint.config.projector_type}, only linear and "
            "mlp2x_gelu: it cannot be exported"
        )
    if "://" in os.fspath(output):
        raise UserError(f"{output}: exports are written to a local disk only; copy it from there")
    try:
        with new_directory(absolute(output)) as partial:
            special = write_settings(checkpoint, Path(partial), dtype)
            write_shards(Path(partial), list(hf_tensors(checkpoint, dtype, special.rows)))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); nothing is left of it") from error


def special_tokens(tokenizer: PreTrainedTokenizerBase, config: LlavaConfig, source: dict[str, Any]) -> SpecialTokens:
    """What marks images and padding in an export; `source` is the `config.json` imported."""
    return choose_special_tokens(tokenizer, config.text.vocab_size, source.get("image_token_index"))


def write_settings(checkpoint: Checkpoint, directory: Path, dtype: str | None) -> SpecialTokens:
    """All but the weights."""
    config, hf = checkpoint.config, checkpoint.description.hf
    source = hf.get("config", {})
    template = with_im_start_end(get_template(checkpoint.template), config.im_start_end)
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    special = special_tokens(tokenizer, config, source)
    write_tokenizer(tokenizer, special, directory)
    written = load_tokenizer(directory)
    special_ids = {f"{kind}_token_id": getattr(written, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    ends = [tokenizer.encode(text, add_special_tokens=False) for text in stop_strings(template)]
    end_ids = [ids[0] for ids in ends if len(ids) == 1]

    dtype = dtype or _common(checkpoint)
    write_json(directory / "config.json", hf_config.write_llava(config, source, special, written.pad_token_id, dtype))
    generation = hf_processor.write_generation(hf.get("generation_config", {}), special_ids, end_ids)
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "preprocessor_config.json", hf_processor.write_image_processor(config))
    write_json(directory / "processor_config.json", hf_processor.write_processor(config, special.image.text))
    (directory / "chat_template.jinja").write_text(_jinja(template, tokenizer, special.image.text), encoding="utf-8")
    return special


def _jinja(template: Template, tokenizer: PreTrainedTokenizerBase, image: str) -> str:
    system = default_system(tokenizer) if template.system is None else template.system
    return chat_template(template, system, image)


def hf_tensors(checkpoint: Checkpoint, dtype: str | None, rows: int) -> Iterator[Tensor]:
    """The tensors of the export, none of them read yet."""
    stored = checkpoint.abstract()
    for part, entries in entries_of(checkpoint.config).items():
        for entry in entries:
            there = jnp.dtype(dtype or stored[entry.name].dtype)
            shape = entry.hf_shape(stored[entry.name].shape)
            if entry.name in _ROWS:
                shape = (rows, *shape[1:])
            for layer, leaf in enumerate(entry.leaves()):
                read = functools.partial(_read, checkpoint, entry, layer, there, shape)
                yield Tensor(EXPORT_PREFIXES[part] + leaf, shape, there, read)
    if checkpoint.config.projector_type == "linear":
        yield from _identity(jnp.dtype(dtype or stored["projector.linear_1.kernel"].dtype), checkpoint.config)


def _read(checkpoint: Checkpoint, entry: Entry, layer: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    tensor = to_hf_tensor(entry, checkpoint.read(entry.name, None if entry.layers is None else layer))
    if tensor.shape != shape:
        mean = tensor.mean(axis=0, keepdims=True, dtype=np.float32).astype(tensor.dtype)
        tensor = np.concatenate([tensor, np.repeat(mean, shape[0] - len(tensor), axis=0)])
    return cast(tensor, dtype, entry.name)


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The tensor in another type. Raises UserError where a number is beyond that."""
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(dtype)
    if dtype == np.float16 and (np.isinf(cast) & np.isfinite(tensor)).any():
        raise UserError(f"{name} has values beyond 65504, the largest of float16: take --dtype bfloat16")
    return cast


def _identity(dtype: np.dtype, config: LlavaConfig) -> Iterator[Tensor]:
    """Hugging Face's projector has two layers: the second of a linear one is the identity."""
    width, prefix = config.text.hidden_size, EXPORT_PREFIXES["projector"]
    yield Tensor(f"{prefix}linear_2.weight", (width, width), dtype, lambda: np.eye(width, dtype=dtype))
    yield Tensor(f"{prefix}linear_2.bias", (width,), dtype, lambda: np.zeros(width, dtype))


def _common(checkpoint: Checkpoint) -> str:
    """The type that holds all stored values, since transformers loads every tensor in the one that it is told."""
    return jnp.result_type(*{leaf.dtype for leaf in checkpoint.abstract().values()}).name
