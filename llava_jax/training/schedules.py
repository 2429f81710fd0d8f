"""Learning rate schedules by name (`config.schedule`). All begin with a linear warmup over ceil(warmup_ratio x steps)
steps, and are those of transformers."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from llava_jax.registry import Registry

# Shape -> a decay from `peak` to `floor` x `peak` in some steps.
DECAYS: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "cosine": lambda peak, floor, steps: optax.cosine_decay_schedule(peak, steps, floor),
    "linear": lambda peak, floor, steps: optax.linear_schedule(peak, peak * floor, steps),
    "1-sqrt": lambda peak, floor, steps: lambda step: peak * (1 - (1 - floor) * jnp.sqrt(jnp.clip(step / steps, 0, 1))),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule. `make(config, peak, warmup, steps)` gives the learning rate of each step, counted from 0."""

    name: str
    options: tuple[str, ...]  # that it uses, of those that not all do: how their names begin
    make: Callable[[ConfigDict, float, int, int], optax.Schedule]


SCHEDULES: Registry[Schedule] = Registry("schedule")


def learning_rate(config: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps` steps."""
    return SCHEDULES.find(config.schedule).make(config, peak, math.ceil(steps * config.warmup_ratio), steps)


def _warmed_up(peak: float, warmup: int, rest: optax.Schedule, start: float = 0.0) -> optax.Schedule:
    return optax.join_schedules([optax.linear_schedule(start, peak, warmup), rest], [warmup]) if warmup else rest


def _decaying(shape: str) -> Callable[[ConfigDict, float, int, int], optax.Schedule]:
    """A schedule that decays from the end of the warmup on."""

    def make(config: ConfigDict, peak: float, warmup: int, steps: int) -> optax.Schedule:
        floor = config.min_learning_rate_ratio
        return _warmed_up(peak, warmup, DECAYS[shape](peak, floor, max(steps - warmup, 1)))

    return make


def _constant(config: ConfigDict, peak: float, warmup: int, steps: int) -> optax.Schedule:
    return _warmed_up(peak, warmup, optax.constant_schedule(peak))


def _wsd(config: ConfigDict, peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Warmup, stable, decay (Hu et al. 2024, MiniCPM, section 4.2). The warmup, too, begins at the minimum."""
    floor, decay = config.min_learning_rate_ratio, min(math.ceil(steps * config.decay_ratio), steps - warmup)
    rest = optax.constant_schedule(peak)
    if decay:
        falling = DECAYS[config.decay_shape](peak, floor, decay)
        rest = optax.join_schedules([rest, falling], [steps - decay - warmup])
    return _warmed_up(peak, warmup, rest, peak * floor)


for _schedule in (
    Schedule("cosine", ("min_learning_rate_ratio",), _decaying("cosine")),
    Schedule("linear", ("min_learning_rate_ratio",), _decaying("linear")),
    Schedule("constant", (), _constant),
    Schedule("wsd", ("min_learning_rate_ratio", "decay_ratio", "decay_shape"), _wsd),
):
    SCHEDULES.add(_schedule)
