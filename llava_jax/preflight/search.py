"""Searches for the largest batch and the smallest target that fit."""

import dataclasses
import math

from ml_collections import ConfigDict

from llava_jax.parallel import sharding
from llava_jax.preflight import targets
from llava_jax.preflight.compile import available_memory, build, state_bytes
from llava_jax.preflight.report import Report, report


def largest_batch(config: ConfigDict, name: str, memory_fraction: float | None = None) -> Report:
    """The report of the largest number of rows on a device at once that fits, or of the smallest if none does.
    `batch_rows` is rounded up to a multiple of the rows of all devices."""
    tried: dict[int, Report] = {}

    def fits(groups: int) -> bool:
        tried[groups] = report(with_rows(config, name, groups * config.rows_per_group), name, memory_fraction)
        return tried[groups].fits

    good, bad = 0, 1
    while fits(bad):
        good, bad = bad, bad * 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    rows = {groups * config.rows_per_group: found.fits for groups, found in sorted(tried.items())}
    return dataclasses.replace(tried[good or 1], search="batch", tried=rows)


def smallest_slice(config: ConfigDict, kind: str, memory_fraction: float | None = None) -> Report:
    """The report of the smallest slice or group of GPUs of a kind that fits, or of the largest if none does. Rows on a
    device at once are those of the configuration; `batch_rows` is rounded up to a multiple."""
    rows = max(config.max_rows_per_device, config.rows_per_group)
    tried: dict[str, bool] = {}
    names = targets.family(kind.partition(":")[0])
    for name in names:
        changed, target = with_rows(config, name, rows), targets.parse(name)
        state = state_bytes(build(changed, target))
        tried[name] = state < available_memory(target, memory_fraction)  # else it need not be compiled
        if tried[name] or name == names[-1]:
            result = report(changed, name, memory_fraction)
            tried[name] = result.fits
        if tried[name]:
            break
    return dataclasses.replace(result, search="slice", tried=tried)


def with_rows(config: ConfigDict, name: str, rows: int) -> ConfigDict:
    """The configuration with `rows` rows on a device at once and, if needed, more rows in a step."""
    shards = sharding.batch_shards(sharding.make_mesh(config.mesh.to_dict(), targets.devices(targets.parse(name))))
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.max_rows_per_device = rows
        changed.batch_rows = math.ceil(config.batch_rows / (rows * shards)) * rows * shards
    return changed
