"""Exports a checkpoint to a directory that `LlavaForConditionalGeneration` and `AutoProcessor` of transformers load.

The processor renders the same text and, with byte-level tokenizers, gives the same ids. The original LLaVA and this
project tokenize the text after an image by itself, which a SentencePiece tokenizer begins with `▁`; for transformers'
processor the image is a token inside one text, without `▁` after it (unless the tokenizer is a `legacy` one). The
model is the same: equal ids give equal logits.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llava_jax.checkpoint.merged import merged
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.cli import UserError, say, warn
from llava_jax.convert import hf_config, hf_processor
from llava_jax.convert.chat_template import chat_template
from llava_jax.convert.fused import joined
from llava_jax.convert.hf_tokenizer import SpecialTokens, choose_special_tokens, write_tokenizer
from llava_jax.convert.layouts import EXPORT_PREFIXES
from llava_jax.convert.outgoing import PARTS, Tensor, common_dtype, new_export, tensors_of, write_shards
from llava_jax.convert.tensors import write_json
from llava_jax.data.template_fit import end_of_answer, missing_marks
from llava_jax.data.templates import get_template, stop_strings, with_im_start_end
from llava_jax.data.tokenization import default_system, load_tokenizer
from llava_jax.models.config import LlavaConfig
from llava_jax.models.registry import TOWERS


def export(checkpoint_path: str, output: str, dtype: str | None = None) -> None:
    """Writes weights, with adapters added to them, configuration, tokenizer, processor and chat template.

    With `dtype` None, tensors have the types and bits of the checkpoint, with rows added if `<image>` or `<pad>` have
    none. Raises UserError if transformers has no such model.
    """
    export_model(merged(open_checkpoint(checkpoint_path)), output, dtype)


def export_model(checkpoint: Checkpoint, output: str, dtype: str | None = None) -> None:
    checkpoint.check()
    supported = sorted(hf_config.hf_projectors().values())
    if checkpoint.config.projector_type not in supported:
        raise UserError(
            f"{checkpoint.root}: Hugging Face has no projector {checkpoint.config.projector_type}, only "
            f"{' and '.join(supported)}: it cannot be exported"
        )
    if checkpoint.rounded:
        say(f"{checkpoint.root}: is {checkpoint.rounded}; the export has its dequantized weights", file=sys.stderr)
    with new_export(output) as directory:
        special = write_settings(checkpoint, directory, dtype)
        write_shards(directory, list(hf_tensors(checkpoint, dtype, special.rows)))


def write_settings(checkpoint: Checkpoint, directory: Path, dtype: str | None) -> SpecialTokens:
    """Writes everything but the weights."""
    config, hf = checkpoint.config, checkpoint.description.hf
    source = hf.get("config", {})
    template = with_im_start_end(get_template(checkpoint.template), config.im_start_end)
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    special = choose_special_tokens(tokenizer, config.text.vocab_size, source.get("image_token_index"))
    write_tokenizer(tokenizer, special, directory)
    written = load_tokenizer(directory)
    if problem := missing_marks(template, tokenizer):
        warn(problem)
    ends = end_of_answer(template, tokenizer), stop_strings(template)

    dtype = dtype or common_dtype(checkpoint)
    write_json(directory / "config.json", hf_config.write_llava(config, source, special, written.pad_token_id, dtype))
    generation = hf_processor.write_generation(hf.get("generation_config", {}), written, *ends)
    write_json(directory / "generation_config.json", generation)
    write_json(directory / "preprocessor_config.json", hf_processor.write_image_processor(config))
    write_json(directory / "processor_config.json", hf_processor.write_processor(config, special.image.text))
    system = default_system(tokenizer) if template.system is None else template.system
    jinja = chat_template(template, system, special.image.text, config.image_position)
    (directory / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return special


def hf_tensors(checkpoint: Checkpoint, dtype: str | None, rows: int) -> Iterator[Tensor]:
    """The tensors of the export, not read yet."""
    prefixes = EXPORT_PREFIXES | {"vision": TOWERS[checkpoint.config.vision.kind].hf_prefix}
    for part in PARTS:
        tensors = tensors_of(checkpoint, dtype, lambda part, leaf: prefixes[part] + leaf, (part,), rows)
        yield from joined(tensors, checkpoint.config.text) if part == "llm" else tensors
    if checkpoint.config.projector_type == "linear":
        stored = checkpoint.abstract()["projector.linear_1.kernel"].dtype
        yield from identity(dtype or stored, checkpoint.config, EXPORT_PREFIXES["projector"])


def identity(dtype: str | np.dtype, config: LlavaConfig, prefix: str) -> Iterator[Tensor]:
    """The second layer of a linear projector, since transformers' has two: the identity."""
    width, dtype = config.text.hidden_size, jnp.dtype(dtype)
    yield Tensor(f"{prefix}linear_2.weight", (width, width), dtype, lambda: np.eye(width, dtype=dtype))
    yield Tensor(f"{prefix}linear_2.bias", (width,), dtype, lambda: np.zeros(width, dtype))
