"""Reads fields of transformers' JSON files; unsupported values are refused by name."""

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from llava_jax.cli import UserError, shown

Json = dict[str, Any]

IMAGE_POSITION = "image_position"  # a field of this project only: position of images in training, "first" if absent

# Fields that describe the file, not the model.
_NOT_KEPT = ("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


def get(config: Json, field: str, default: Any, where: str) -> Any:
    """The field, which must have the default's type (or int for float); the default if it is absent or null."""
    value = config.get(field)
    if value is None:
        return default
    if isinstance(default, float) and type(value) is int:
        return float(value)  # which `loads` bounds
    if type(value) is not type(default):
        raise UserError(f"{where}: {field} is {shown(value)}; only one {type(default).__name__} is supported")
    return value


def get_all(config: Json, defaults: Json, where: str) -> Json:
    """Several fields as `get`, by the names and with the defaults of `defaults`, which are those of our classes."""
    return {name: get(config, _WORDS.get(name, name), default, where) for name, default in defaults.items()}


def in_hf(config: Any, names: Iterable[str]) -> Json:
    """Fields of one of our configurations as transformers calls them: the inverse of `get_all`."""
    return {_WORDS.get(name, name): getattr(config, name) for name in names}


def require(config: Json, fixed: Json, where: str) -> None:
    """Raises UserError if one of these fields is present with another value."""
    for field, value in fixed.items():
        if config.get(field) not in (None, value):
            raise UserError(f"{where}: {field} is {shown(config[field])}; only {value!r} is supported")


def part(config: Json, field: str, where: str) -> Json:
    """An object within the object; an empty one if absent or null."""
    return get(config, field, {}, where)


def one_of(config: Json, field: str, supported: Collection[str], where: str) -> str:
    """A required field, with one of these values."""
    value = config.get(field)
    if not isinstance(value, str) or value not in supported:
        raise UserError(f"{where}: {field} is {shown(value)}; supported are {', '.join(supported)}")
    return value


@contextlib.contextmanager
def in_words_of_hf(where: str) -> Iterator[None]:
    """Turns ValueErrors of our configuration classes into `UserError`s with transformers' field names."""
    try:
        yield
    except ValueError as error:
        words = re.sub(r"\b(?:" + "|".join(_WORDS) + r")\b", lambda found: _WORDS[found[0]], str(error))
        raise UserError(f"{where}: {words}") from None


_WORDS = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}


def check_generation(values: Json, where: str) -> Json:
    """Returns a `generation_config.json`. Raises UserError if a field that is used has a wrong type."""
    ends = values.get("eos_token_id")
    for id in ends if isinstance(ends, list) else [0 if ends is None else ends]:
        if type(id) is not int or not 0 <= id < 2**31:
            raise UserError(f"{where}: eos_token_id is {shown(ends)}, not an id or a list of ids")
    return values


def kept(config: Json) -> Json:
    """The fields of a source that an export keeps."""
    return {field: value for field, value in config.items() if field not in _NOT_KEPT}
