"""Checks the files of a tokenizer before libraries read them without limits."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from llava_jax.cli import UserError
from llava_jax.files.reading import parse_json, read_bytes, refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes seconds to import

# The files of a directory that transformers may read to make a tokenizer.
PATTERNS = ("*token*", "vocab.*", "merges.txt", "config.json", "chat_template*", "additional_chat_templates/*")
MAX_BYTES = 64 * 2**20  # of a file; Gemma's tokenizer.json, one of the largest, has half of it
MAX_LAYERS = 10_000  # transformers makes a list of them
MAX_GROWTH = 1000  # factor by which replacements may lengthen a text; published tokenizers replace by one character

Json = dict[str, Any]


def read_tokenizer_files(directory: Path, name: epath.PathLike) -> dict[str, Json]:
    """Reads the JSON files of a local directory by name, and checks all files that transformers may read.

    Raises:
      UserError: naming a file in `name` that is no regular file, too large, no JSON object, names files in other
        directories, or describes what takes unbounded memory.
    """
    found: dict[str, Json] = {}
    for file in sorted({file for pattern in PATTERNS for file in directory.glob(pattern) if not file.is_dir()}):
        where = epath.Path(name) / file.relative_to(directory)
        data = read_bytes(file, MAX_BYTES)
        refuse_pointer(data, where)
        if file.suffix == ".json":
            value = parse_json(data, where, strict=False)
            if not isinstance(value, dict):
                raise UserError(f"{where}: is not a JSON object")
            found[file.name] = value
    _check(found, name)
    return found


def _check(found: dict[str, Json], name: epath.PathLike) -> None:
    files = found.get("tokenizer_config.json", {}).get("fast_tokenizer_files") or []
    if not isinstance(files, list) or any(not isinstance(file, str) or "/" in file for file in files):
        raise UserError(f"{name}/tokenizer_config.json: fast_tokenizer_files are no names of files beside it")
    if any("layers" in key and isinstance(value, int) and value > MAX_LAYERS
           for key, value in found.get("config.json", {}).items()):  # fmt: skip
        raise UserError(f"{name}/config.json: is of more than {MAX_LAYERS} layers")
    pipeline = found.get("tokenizer.json", {})
    if sum(_growth(pipeline.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder")) > math.log(MAX_GROWTH):
        raise UserError(f"{name}/tokenizer.json: its replacements make a text more than {MAX_GROWTH} times as long")


def _growth(step: Any) -> float:
    """The logarithm of the factor by which all replacements in a part of a tokenizer.json lengthen a text."""
    if isinstance(step, list):
        return sum(map(_growth, step))
    if not isinstance(step, dict):
        return 0.0
    own = 0.0
    if step.get("type") == "Replace" and isinstance(content := step.get("content"), str):
        pattern = step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else None
        own = math.log(max(1, len(content)) / (len(replaced) if isinstance(replaced, str) and replaced else 1))
    return max(0.0, own) + sum(map(_growth, step.values()))
