"""Searches for the largest batch and the smallest target that fit, and for the fastest configuration."""

import dataclasses
import math
import sys
import time
from typing import Any

from ml_collections import ConfigDict

from llava_jax.cli import UserError, say, time_left
from llava_jax.parallel import sharding
from llava_jax.preflight import targets
from llava_jax.preflight.compile import available_memory, build, state_bytes
from llava_jax.preflight.rates import rates_of
from llava_jax.preflight.report import Report, report
from llava_jax.training import flops

# Remat policies: the ones that keep more for the backward pass, and compute less again, first.
POLICIES = ("none", "save_qkv", "full", "offload")
AXES = ("data", "tensor")  # of the mesh, of which two are tried, too


class Tries:
    """Compiles configurations one after another, and says before each how long the search may still take."""

    def __init__(self, memory_fraction: float | None):
        self.memory_fraction = memory_fraction
        self.done, self.began = 0, time.monotonic()

    def report(self, config: ConfigDict, name: str, what: str, left: int | None) -> Report:
        """The report of a configuration, in which `what` is tried, on the target `name`. At most `left` are compiled
        from here on, None if that isn't known."""
        line = f"try {self.done + 1}" + (f" of at most {self.done + left}" if left else "")
        if left and self.done:
            line += f", at most {time_left((time.monotonic() - self.began) / self.done * left)} left"
        say(f"{line}: {what}", file=sys.stderr, flush=True)
        self.done += 1
        return report(config, name, self.memory_fraction)


def largest_batch(config: ConfigDict, name: str, memory_fraction: float | None = None) -> Report:
    """The report of the largest number of rows on a device at once that fits, or of the smallest if none does.
    `batch_rows` is rounded up to a multiple of the rows of all devices."""
    tried: dict[int, Report] = {}
    tries = Tries(memory_fraction)

    def fits(groups: int, left: int | None) -> bool:
        rows = groups * config.rows_per_group
        tried[groups] = tries.report(with_rows(config, name, rows), name, f"{rows} rows on a device", left)
        return tried[groups].fits

    good, bad = 0, 1
    while fits(bad, None):
        good, bad = bad, bad * 2
    while bad - good > 1:
        middle, left = (good + bad) // 2, (bad - good - 1).bit_length()
        good, bad = (middle, bad) if fits(middle, left) else (good, middle)
    rows = {groups * config.rows_per_group: found.fits for groups, found in sorted(tried.items())}
    return dataclasses.replace(tried[good or 1], search="batch", tried=rows)


def smallest_slice(config: ConfigDict, kind: str, memory_fraction: float | None = None) -> Report:
    """The report of the smallest slice or group of GPUs of a kind that fits, or of the largest if none does. Rows on a
    device at once are those of the configuration; `batch_rows` is rounded up to a multiple."""
    rows = max(config.max_rows_per_device, config.rows_per_group)
    tried: dict[str, bool] = {}
    names = targets.family(kind.partition(":")[0])
    tries, result = Tries(memory_fraction), None
    for number, name in enumerate(names):
        target = targets.parse(name)
        try:
            larger = with_rows(config, name, rows)
            state = state_bytes(build(larger, target))
        except UserError:  # its devices do not make the mesh, or share the rows
            if not result and name == names[-1]:
                raise
            continue
        tried[name] = state < available_memory(target, memory_fraction)  # else it need not be compiled
        if tried[name] or name == names[-1]:
            result = tries.report(larger, name, name, len(names) - number)
            tried[name] = result.fits
        if tried[name]:
            break
    return dataclasses.replace(result, search="slice", tried=tried)


def fastest(config: ConfigDict, name: str, memory_fraction: float | None = None) -> Report:
    """The report of the configuration with the shortest predicted step of `batch_rows` rows. `tried` has the predicted
    seconds of those that were compiled, None where they do not fit.

    Rows on a device at once go up from the fewest as long as they fit, first with the remat policy that computes least.
    The next policy keeps less for the backward pass and goes on from there: with as many rows it would be slower.
    Policies whose products alone would take longer than the best step so far are not compiled. Then other meshes with
    what won.
    """
    target = targets.parse(name)
    if target.machine is None:
        raise UserError("--search=fastest: times are predicted for TPUs and GPUs, not for cpu")
    found: dict[tuple[str, ...], Report] = {}
    tries = Tries(memory_fraction)
    axes = [axis for axis in AXES if config.mesh[axis] == 1]

    def attempt(left: int, **changes: Any) -> bool:
        """Whether it fits."""
        overrides = tuple(f"--config.{key}={value}" for key, value in changes.items())
        try:
            found[overrides] = tries.report(changed(config, changes), name, " ".join(overrides), left)
        except UserError as error:  # such as a mesh that the devices do not make
            if not found:
                raise
            say(f"not possible: {error}", file=sys.stderr)
            return False
        return found[overrides].fits

    choices = row_choices(config, name)
    for number, remat in enumerate(POLICIES):
        so_far = min(map(_seconds, found.values()), default=math.inf)
        if least_seconds(changed(config, {"remat": remat}), target) < so_far:
            others = len(POLICIES) - number - 1 + len(axes)
            while choices and attempt(len(choices) + others, remat=remat, max_rows_per_device=choices[0]):
                choices = choices[1:]
    best = min(found, key=lambda names: _seconds(found[names]))
    for number, axis in enumerate(axes if found[best].fits and found[best].devices % 2 == 0 else ()):
        changes = {"remat": found[best].remat, "max_rows_per_device": found[best].rows_per_device}
        attempt(len(axes) - number, **changes, **{f"mesh.{axis}": 2})
    best = min(found, key=lambda names: _seconds(found[names]))
    tried = {" ".join(names): one.prediction.seconds if one.fits else None for names, one in found.items()}
    return dataclasses.replace(found[best], search="fastest", tried=tried, overrides=best)


def _seconds(one: Report) -> float:
    """Predicted; more than any if it does not fit, and then by the memory needed."""
    return one.prediction.seconds if one.fits else 1e9 + (one.memory.needed or math.inf)


def row_choices(config: ConfigDict, name: str) -> list[int]:
    """Rows on a device at once that divide those of a step, the fewest first."""
    rows, group = config.batch_rows // _batch_shards(config, name), config.rows_per_group
    return [count for count in range(group, rows + 1, group) if rows % count == 0]


def least_seconds(config: ConfigDict, target: targets.Target) -> float:
    """Seconds of the products of a step, by formula: no prediction is less. Nothing is compiled."""
    program = build(config, target)
    parts = program.training.flops
    causal = 0.5 * flops.executed_flops({"llm attention": parts["llm attention"]})
    products = flops.executed_flops(parts, without=("llm attention",)) + causal
    return products / program.mesh.size / (target.machine.flops * rates_of(target.machine).product)


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of the configuration with other values."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(changes)
    return copy


def with_rows(config: ConfigDict, name: str, rows: int) -> ConfigDict:
    """The configuration with `rows` rows on a device at once and, if needed, more rows in a step."""
    at_once = rows * _batch_shards(config, name)
    batch_rows = math.ceil(config.batch_rows / at_once) * at_once
    return changed(config, {"max_rows_per_device": rows, "batch_rows": batch_rows})


def _batch_shards(config: ConfigDict, name: str) -> int:
    return sharding.batch_shards(sharding.make_mesh(config.mesh.to_dict(), targets.devices(targets.parse(name))))
