"""Checks the configuration of a run: every option by its declaration in llava_jax/recipes/common.py, then the rules for
several options together."""

import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from llava_jax.cli import UserError, warn_once
from llava_jax.recipes.common import OPTIONS
from llava_jax.recipes.options import flatten
from llava_jax.training import optim
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
    for needed, keys in _without_effect(values).items():
        names = " and ".join(f"config.{key}" for key in keys)
        warn_once(f"{names} {'has' if len(keys) == 1 else 'have'} no effect without config.{needed}")


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
        yield from (f"trainable[{index}] {problem}" for problem in _entry_problems(entry))
    named = [optim.entry(entry)[1] for entry in config.trainable if _is_entry(entry)]
    for group, rate in optim.RATES.items():
        if rate and config[rate] and group not in named and (config.trainable or group == "vision"):
            table = "trainable is set" if config.trainable else f"the stage does not train {group}"
            yield (
                f"{rate} is {config[rate]}, and {table}: put the pattern there with this group, "
                f"({optim.PATTERNS[group]!r}, {group!r}), or with its own learning_rate"
            )


def _is_entry(entry: Any) -> bool:
    """Whether it is (pattern, group or options), or options with the pattern as "parameters"."""
    if isinstance(entry, Mapping):
        return isinstance(entry.get("parameters"), str)
    pair = isinstance(entry, list | tuple) and len(entry) == 2
    return pair and isinstance(entry[0], str) and isinstance(entry[1], str | Mapping)


def _entry_problems(entry: Any) -> Iterator[str]:
    if not _is_entry(entry):
        yield f'is {entry!r}: it has to be like (r"llm\\..*norm", {{"learning_rate": 1e-5}}) or (r"llm\\.", "llm")'
        return
    pattern, options = optim.entry(entry)
    try:
        re.compile(pattern)
    except re.error as error:
        yield f"has the pattern {pattern!r}, which is no regular expression: {error}"
    if isinstance(options, str):
        if options not in optim.RATES:
            yield f"has the group {options!r}, not one of {', '.join(optim.RATES)}"
        return
    for key, value in options.items():
        if key not in ENTRY:
            yield f"has {key!r}, which is none of {', '.join(map(repr, ENTRY))}"
        elif not ENTRY[key][0](value):
            yield f"has {key} {value!r}: it has to be {ENTRY[key][1]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


# Option of an entry of `config.trainable` -> a test of its value, and what that has to be.
ENTRY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (_is_number, "0 or more"),
    "weight_decay": (_is_number, "0 or more"),
    "layers": (
        lambda value: isinstance(value, str) and re.fullmatch(r"(-?\d+)?:(-?\d+)?", value) and value != ":",
        'a slice like "16:", ":16", "8:16" or "-4:"',
    ),
    "layer_decay": (lambda value: _is_number(value) and 0 < value <= 1, "above 0 and at most 1"),
}


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


def _lora(config: ConfigDict) -> Iterator[str]:
    targets = config.lora.targets
    if isinstance(targets, str) or not targets or not all(isinstance(target, str) for target in targets):
        yield f"lora.targets is {targets!r}: it has to be a tuple of patterns, such as ('q_proj', 'v_proj')"
    if not config.lora.rank:
        values = dict(flatten(config.lora.to_dict()))
        changed = [name for name, value in values.items() if _as_tuple(value) != OPTIONS[f"lora.{name}"].default]
        if changed:
            yield f"lora.{changed[0]} is {values[changed[0]]!r}, and lora.rank is 0, which is no LoRA: set lora.rank"
    elif config.stage == "pretrain" and not config.trainable:
        yield f"lora.rank is {config.lora.rank}, and stage pretrain trains the projector alone: set stage to finetune"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _benchmark(config: ConfigDict) -> Iterator[str]:
    if config.evaluate.benchmark:
        for key in ("questions", "labels"):
            if not config.evaluate[key]:
                yield f"evaluate.{key} is not set, and evaluate.benchmark is: give --config.evaluate.{key}=..."


def _tracking(config: ConfigDict) -> Iterator[str]:
    if config.wandb.project and not importlib.util.find_spec("wandb"):
        yield f"wandb.project is {config.wandb.project!r}, which needs pip install 'llava_jax[wandb]'"


RULES = (_steps, _packing, _trainable, _lora, _update_rules, _benchmark, _tracking)

# ------------------------------------------------------------------------------------------- options without effect

# Beginning of the names of options -> the option without which they have no effect, which may be off for a while.
NEEDED = {"eval_every": "data.holdout", "evaluate.": "evaluate.benchmark", "profile.": "profile.steps"}
NEEDED |= {"wandb.": "wandb.project"}


def _without_effect(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """The options that are set, by the one that is not and without which they do nothing."""
    found: dict[str, list[str]] = {}
    for prefix, needed in NEEDED.items():
        keys = [key for key in OPTIONS if key.startswith(prefix) and key != needed]
        set_ones = [key for key in keys if values[key] != OPTIONS[key].default]
        if set_ones and not values[needed]:
            found[needed] = set_ones
    return found
