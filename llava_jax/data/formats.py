"""Formats of samples other than LLaVA's, registered by name: each rewrites a record into LLaVA's format.

`conversations` and `messages`, and what else `samples` reads, need no object here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_jax.cli import UserError
from llava_jax.registry import Registry


@dataclass(frozen=True)
class DataFormat:
    """A format of samples. Its functions lie in a module, so that processes that read data can import them.

    Attributes:
      name: a name of its own.
      matches: whether a JSON object is a sample in this format.
      convert: rewrites such an object as LLaVA's `{"id": ..., "image": ..., "conversations": [...]}`.
      version: raise it when `convert` makes other samples of the same objects: caches of files are then made anew.
    """

    name: str
    matches: Callable[[dict[str, Any]], bool]
    convert: Callable[[dict[str, Any]], dict[str, Any]]
    version: int = 1


FORMATS: Registry[DataFormat] = Registry("data format")  # tried in their order
register = FORMATS.add  # the module that calls it has to be imported before data is opened


def to_llava(value: Any, where: str) -> Any:
    """The JSON value of a record in LLaVA's format; one in no registered format is returned as it is.

    Raises UserError naming `where` if it cannot be converted.
    """
    if isinstance(value, dict):
        for data_format in FORMATS.values():
            if data_format.matches(value):
                try:
                    return data_format.convert(value)
                except Exception as error:  # of a user's own function, on the data of others
                    raise UserError(
                        f"{where}: is no sample of format {data_format.name}: {type(error).__name__}: {error}"
                    ) from error
    return value
