"""Checks the configuration of a run: every option by its declaration in llava_jax/recipes/common.py, then the rules for
several options together."""

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.recipes.common import OPTIONS
from llava_jax.recipes.options import flatten
from llava_jax.training.optimizers import OPTIMIZERS
from llava_jax.training.schedules import SCHEDULES


def check(config: ConfigDict) -> None:
    """Raises UserError that lists every value that makes no sense."""
    values = dict(flatten(config.to_dict()))
    if missing := [key for key in OPTIONS if key not in values]:
        raise UserError(f"the config has no key {missing[0]!r}: a recipe begins with common.get_config()")
    problems = [f"{key} {problem}" for key, option in OPTIONS.items() if (problem := option.problem(values[key]))]
    problems += [problem for rule in RULES for problem in rule(config)]
    if problems:
        raise UserError("; ".join(f"config.{problem}" for problem in problems))


def row_length(config: ConfigDict) -> int:
    """Positions of a row."""
    return config.row_length or config.max_length


# --------------------------------------------------------------------------------- rules for several options together


def _steps(config: ConfigDict) -> Iterator[str]:
    if not (config.steps or config.epochs):
        yield f"epochs is {config.epochs}, and so is steps: there is nothing to train"


def _packing(config: ConfigDict) -> Iterator[str]:
    if config.group_by_modality and config.pack:
        yield "group_by_modality is for rows of one sample, and pack is set: packed rows are full because they mix"
    if config.row_length and not config.pack:
        yield f"row_length is {config.row_length}, which is for packed rows: set pack, or max_length instead"
    elif config.row_length and config.row_length < config.max_length:
        yield f"row_length is {config.row_length}: samples of up to max_length={config.max_length} have to fit"


def _trainable(config: ConfigDict) -> Iterator[str]:
    if not isinstance(config.trainable, list | tuple):
        yield f"trainable is {config.trainable!r}: it has to be a tuple of patterns"
        return
    for index, entry in enumerate(config.trainable):
        yield from (f"trainable[{index}] {problem}" for problem in _pattern_problems(entry))
    if config.trainable and config.projector_learning_rate:
        yield (
            f"projector_learning_rate is {config.projector_learning_rate}, and trainable is set: give the projector's "
            "pattern its learning_rate there"
        )


def _pattern_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, Mapping | ConfigDict) or not isinstance(entry.get("parameters"), str):
        yield f'is {entry!r}: it has to be like {{"parameters": r"llm\\..*norm", "learning_rate": 1e-5}}'
        return
    try:
        re.compile(entry["parameters"])
    except re.error as error:
        yield f"has parameters {entry['parameters']!r}, which is no regular expression: {error}"
    for key, value in entry.items():
        if key in ("learning_rate", "weight_decay"):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                yield f"has {key} {value!r}: it has to be 0 or more"
        elif key != "parameters":
            yield f"has {key!r}, which is none of 'parameters', 'learning_rate', 'weight_decay'"


def _update_rules(config: ConfigDict) -> Iterator[str]:
    """The optimizer and the schedule have such names, and no option is set that they do not use."""
    values = dict(flatten(config.to_dict()))
    for key, registry in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        chosen = registry.get(config[key])
        if chosen is None:
            yield f"{key}={registry.unknown(config[key])}"
            continue
        for name, option in OPTIONS.items():
            users = [other.name for other in registry.values() if name.startswith(other.options)]
            if users and chosen.name not in users and values[name] != option.default:
                yield f"{name} is {values[name]!r}, which is for {key} {' or '.join(users)}, not {chosen.name}"
    if config.schedule == "wsd" and config.warmup_ratio + config.decay_ratio > 1:
        yield f"decay_ratio is {config.decay_ratio}, and warmup_ratio {config.warmup_ratio}: together more than 1"


def _benchmark(config: ConfigDict) -> Iterator[str]:
    if config.evaluate.benchmark:
        for key in ("questions", "labels", "images"):
            if not config.evaluate[key]:
                yield f"evaluate.{key} is not set, and evaluate.benchmark is: give --config.evaluate.{key}=..."


def _tracking(config: ConfigDict) -> Iterator[str]:
    if config.wandb.project and not importlib.util.find_spec("wandb"):
        yield f"wandb.project is {config.wandb.project!r}, which needs pip install 'llava_jax[wandb]'"


RULES = (_steps, _packing, _trainable, _update_rules, _benchmark, _tracking)
