"""How an option of a run is declared: its default, the values it may have, and whether a resumed run may change it."""

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """One option. `minimum` and `maximum` are allowed values; values have to be less than `below`."""

    default: Any
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None
    # Whether a run may resume with another value, since the parameters that it trains do not depend on it.
    changeable: bool = False

    def problem(self, value: Any) -> str:
        """What is wrong with a value, "" if nothing is."""
        if value is None and self.default is not None:
            return "is None"
        if self.choices and value not in self.choices:
            return f"is {value!r}, not one of {', '.join(map(repr, self.choices))}"
        if self.minimum is not None and not self.minimum <= value < math.inf:
            return f"is {value}: it has to be {self.minimum} or more"
        if self.maximum is not None and value > self.maximum:
            return f"is {value}: it has to be {self.maximum} or less"
        if self.below is not None and value >= self.below:
            return f"is {value}: it has to be below {self.below}"
        return ""


class Section(types.SimpleNamespace):
    """Options and sections by name, in the order of their declaration."""


def flatten(values: Mapping[str, Any] | Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every option of a configuration or of a section."""
    for key, value in (vars(values) if isinstance(values, Section) else values).items():
        if isinstance(value, Mapping | Section):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
