"""Opens a language model: a directory of transformers, or a GGUF file, which transformers (with torch) reads."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llava_jax.cli import UserError, shown
from llava_jax.convert.adapter import base_name, is_adapter
from llava_jax.convert.gguf_header import Header, read_header
from llava_jax.convert.hf_text import num_parameters, read_text
from llava_jax.convert.hf_tokenizer import TOKENIZER_FILES
from llava_jax.convert.stored_tensor import StoredTensor, Tensors
from llava_jax.convert.tensors import has_weights, open_directory
from llava_jax.data.tokenizer_files import MAX_BYTES
from llava_jax.files.reading import read_bytes, read_object, refuse_pointer_file
from llava_jax.models.hf_fields import Json, check_generation


class LanguageModel(NamedTuple):
    """A language model whose weights have not been read yet."""

    where: str  # path of its config.json, for messages
    config: Json
    generation: Json  # its generation_config.json; may be empty
    tensors: Tensors
    write_tokenizer: Callable[[Path], None]  # to a directory


def open_language_model(path: Path) -> LanguageModel:
    """Raises UserError if `path` is not a language model."""
    if path.is_file():
        return _open_gguf(path)
    if is_adapter(path) and not has_weights(path):
        raise UserError(f"{path}: is an adapter of PEFT{base_name(path)}: merge it first (merge_and_unload), or give "
                        "a LLaVA's with --llava and --base")  # fmt: skip
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not (path / "config.json").exists():
        raise UserError(f"{path}: holds {', '.join(file.name for file in ggufs)}: give one of these files itself")
    return LanguageModel(
        where=str(path / "config.json"),
        config=read_object(path / "config.json"),
        generation=read_generation(path),
        tensors=open_directory(path),
        write_tokenizer=functools.partial(copy_tokenizer, path),
    )


def read_if_there(path: Path) -> Json:
    return read_object(path) if path.exists() else {}


def read_generation(directory: Path) -> Json:
    """The `generation_config.json` of a directory; empty if there is none."""
    file = directory / "generation_config.json"
    return check_generation(read_if_there(file), str(file))


def has_tokenizer(directory: Path) -> bool:
    return any(directory.glob("tokenizer.*")) or (directory / "vocab.json").exists()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer. Raises UserError if there is none."""
    if not has_tokenizer(source):
        raise UserError(f"{source}: no tokenizer (tokenizer.json or tokenizer.model); copy the model's there")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            refuse_pointer_file(source / name)
            (target / name).write_bytes(read_bytes(source / name, MAX_BYTES))


def _open_gguf(path: Path) -> LanguageModel:
    """Reads the model into memory, as float32: the numbers of GGUF files are quantized."""
    refuse_pointer_file(path)
    header = read_header(path)
    try:
        import gguf  # noqa: F401  (transformers needs it, and its error is less clear if it is missing)
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f"{path}: GGUF needs {error.name}: pip install 'llava_jax[torch-import]'") from None
    options = {"gguf_file": path.name, "local_files_only": True}
    where = f"{path}, as transformers reads it"
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **options).to_dict()
        if (needed := num_parameters(read_text(config, where))) > header.numbers:
            raise UserError(f"{path}: describes a model of {needed} parameters, but holds {header.numbers} numbers")
        _refuse_lost(path, header, config)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, trust_remote_code=False, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:  # transformers raises any class for files that it cannot read
        raise UserError(f"{path}: transformers cannot read it ({type(error).__name__}: {error})") from None
    held = {
        name: StoredTensor(tuple(tensor.shape), "F32", tensor.detach().numpy)
        for name, tensor in model.state_dict().items()
    }
    numbers = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # tied weights once
    if (read := sum(numbers.values())) != header.numbers:
        raise UserError(f"{path}: holds {header.numbers} numbers, of which transformers reads {read}; {_NOT_GGUF}")
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # of the file; the tensors that were read are not quantized
    return LanguageModel(
        where=where,
        config=config,
        generation=model.generation_config.to_diff_dict(),
        tensors=held,
        write_tokenizer=tokenizer.save_pretrained,
    )


_NOT_GGUF = "import the model from its directory of safetensors files instead"


def _refuse_lost(path: Path, header: Header, config: Json) -> None:
    """Raises UserError for what the model computes, but transformers' reading of the file, `config`, does not say."""
    if factors := [name for name in header.tensors if name.startswith(("rope_freqs", "rope_factors"))]:
        raise UserError(f"{path}: {factors[0]} scales its RoPE, which transformers does not read; {_NOT_GGUF}")
    kind = header.of_model("rope.scaling.type", "none")
    if kind != "none" and read_text(config, str(path)).rope_scaling is None:
        raise UserError(f"{path}: rope.scaling.type is {shown(kind)}, which transformers does not read; {_NOT_GGUF}")
    window, read = header.of_model("attention.sliding_window"), config.get("sliding_window")
    if window != read:
        raise UserError(f"{path}: attention.sliding_window is {window}, transformers reads {read}; {_NOT_GGUF}")
