"""Fields of Hugging Face's JSON, read so that what is not understood is refused by name."""

from typing import Any

from llava_jax.cli import UserError

Json = dict[str, Any]

IMAGE_POSITION = "image_position"  # of no other project: where images stood in training, "first" where it is absent

# Fields about the file and not about the model.
_NOT_KEPT = ("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype")


def get(config: Json, field: str, default: Any, where: str) -> Any:
    """The field, which is of the default's type (an integer will do for a float), or the default if absent or null."""
    value = config.get(field)
    if value is None:
        return default
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{where}: {field} is {value!r}; only one {type(default).__name__} is supported")
    return value


def require(config: Json, fixed: Json, where: str) -> None:
    """Raises UserError unless each of these fields, if it is there, has the value given."""
    for field, value in fixed.items():
        if config.get(field) not in (None, value):
            raise UserError(f"{where}: {field} is {config[field]!r}; only {value!r} is supported")


def require_multiple(where: str, name: str, value: int, of_name: str, of: int) -> None:
    if of <= 0 or value % of:
        raise UserError(f"{where}: {name} {value} is not a multiple of {of_name} {of}")


def kept(config: Json) -> Json:
    """What an export takes over of its source."""
    return {field: value for field, value in config.items() if field not in _NOT_KEPT}
