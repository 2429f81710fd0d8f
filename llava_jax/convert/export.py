"""A checkpoint to a directory that `LlavaForConditionalGeneration` and `AutoProcessor` of transformers load.

The processor renders our text, and with byte-level tokenizers gives our ids. A SentencePiece tokenizer begins the text
after an image with `▁` when that is tokenized by itself, as the published code does and ours; Hugging Face's
processor, to which the image is a token inside one text, gives no `▁` there (unless the tokenizer is a `legacy` one).
The model is the same: equal ids, equal logits.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.checkpoint import Checkpoint, absolute, new_directory, open_checkpoint
from llava_jax.cli import UserError, track
from llava_jax.convert import hf_config, hf_processor
from llava_jax.convert.chat_template import chat_template
from llava_jax.convert.hf_tokenizer import ImageToken, choose_image_token, write_tokenizer
from llava_jax.convert.layouts import EXPORT_PREFIXES, entries_of
from llava_jax.convert.names import to_hf
from llava_jax.convert.tensors import ShardWriter, write_json
from llava_jax.data.conversation import IMAGE_TOKEN, Template, get_template, stop_strings, with_im_start_end
from llava_jax.data.tokenization import default_system, load_tokenizer
from llava_jax.models.config import LlavaConfig

DTYPES = ("float32", "bfloat16", "float16")


def export(checkpoint_path: str, output: str, dtype: str | None = None) -> None:
    """Writes weights, configs, tokenizer, processor and chat template, in `dtype` or in the types stored.

    Tensors are those of the checkpoint: with `dtype` None bit for bit, and with no row more or less. Raises UserError
    where Hugging Face has no such model.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    if checkpoint.config.projector_type not in ("linear", "mlp2x_gelu"):
        raise UserError(
            f"{checkpoint_path}: Hugging Face has no projector {checkpoint.config.projector_type}, only linear and "
            "mlp2x_gelu: it cannot be exported"
        )
    if "://" in os.fspath(output):
        raise UserError(f"{output}: exports are written to a local disk only; copy it from there")
    with new_directory(absolute(output)) as partial:
        directory = Path(partial)
        _write_settings(checkpoint, directory, dtype)
        writer = ShardWriter(directory)
        for name, tensor in _tensors(checkpoint, dtype):
            writer.add(name, tensor)
        writer.close()


def image_token(
    tokenizer: PreTrainedTokenizerBase, config: LlavaConfig, template: Template, source: dict[str, Any]
) -> ImageToken:
    """What marks an image in an export; `source` is the `config.json` imported. Raises UserError where nothing can."""
    in_use = _jinja(template, tokenizer, IMAGE_TOKEN)
    return choose_image_token(tokenizer, config.text.vocab_size, source.get("image_token_index"), in_use)


def _jinja(template: Template, tokenizer: PreTrainedTokenizerBase, image: str) -> str:
    system = default_system(tokenizer) if template.system is None else template.system
    return chat_template(template, system, image)


def _write_settings(checkpoint: Checkpoint, directory: Path, dtype: str | None) -> None:
    """All but the weights."""
    config, hf = checkpoint.config, checkpoint.description.hf
    source = hf.get("config", {})
    template = with_im_start_end(get_template(checkpoint.template), config.im_start_end)
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    image = image_token(tokenizer, config, template, source)
    special_ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    ends = [tokenizer.encode(text, add_special_tokens=False) for text in stop_strings(template)]
    end_ids = [ids[0] for ids in ends if len(ids) == 1]

    write_json(directory / "config.json", hf_config.write_llava(config, source, image.id, dtype or _common(checkpoint)))
    generation = hf_processor.write_generation(hf.get("generation_config", {}), special_ids, end_ids)
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "preprocessor_config.json", hf_processor.write_image_processor(config))
    write_json(directory / "processor_config.json", hf_processor.write_processor(config, image.text))
    (directory / "chat_template.jinja").write_text(_jinja(template, tokenizer, image.text), encoding="utf-8")
    write_tokenizer(tokenizer, image, directory)


def _tensors(checkpoint: Checkpoint, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's names and tensors, read one of our parameters at a time."""
    cast = _keep if dtype is None else lambda name, stored: jnp.dtype(dtype)
    entries = [(part, entry) for part, entries in entries_of(checkpoint.config).items() for entry in entries]
    for part, entry in track(entries, "writing weights"):
        array = np.asarray(checkpoint.load([entry.name], dtype=cast)[entry.name])
        for leaf, tensor in to_hf(entry, array):
            yield EXPORT_PREFIXES[part] + leaf, tensor
    if checkpoint.config.projector_type == "linear":
        yield from _identity(checkpoint, cast)


def _identity(checkpoint: Checkpoint, cast: Callable) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's projector has two layers: the second of a linear one is the identity."""
    name = "projector.linear_1.kernel"
    dtype = cast(name, checkpoint.abstract()[name].dtype)
    width = checkpoint.config.text.hidden_size
    yield EXPORT_PREFIXES["projector"] + "linear_2.weight", np.eye(width, dtype=dtype)
    yield EXPORT_PREFIXES["projector"] + "linear_2.bias", np.zeros(width, dtype=dtype)


def _common(checkpoint: Checkpoint) -> str:
    """The type that holds all stored values, since transformers loads every tensor in the one that it is told."""
    return jnp.result_type(*{leaf.dtype for leaf in checkpoint.abstract().values()}).name


def _keep(name: str, stored: jnp.dtype) -> jnp.dtype:
    return stored
