"""What a run trains, as a table of parameter names, and how: an optimizer and a schedule for each group of them.

`config.trainable` is that table or, if it is empty, the stage's own. Everything else follows from the names it matches:
what is frozen, the optimizer's groups, FLOPs, the run summary and preflight.
"""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.training.optimizers import OPTIMIZERS
from llava_jax.training.schedules import learning_rate

# Stage -> the parts of the model that it trains.
STAGES: dict[str, tuple[str, ...]] = {"pretrain": ("projector",), "finetune": ("projector", "llm")}
# The same with LoRA.
LORA_STAGES: dict[str, tuple[str, ...]] = {"finetune": ("projector", "lora")}
PATTERNS = {"projector": r"projector\.", "llm": r"llm\.", "lora": r".+\.lora\."}


class Group(NamedTuple):
    """Parameters that are trained alike. `label` is its key in the optimizer's state."""

    label: str
    pattern: str  # matches the beginning of a parameter's name
    learning_rate: float  # at its peak
    weight_decay: float


def groups(config: ConfigDict) -> tuple[Group, ...]:
    """The table of what a run trains, in order of precedence."""
    if config.trainable:
        return tuple(
            Group(
                f"group_{number}",
                entry["parameters"],
                entry.get("learning_rate", config.learning_rate),
                entry.get("weight_decay", config.weight_decay),
            )
            for number, entry in enumerate(config.trainable, 1)
        )
    stages = LORA_STAGES if config.lora.rank else STAGES
    if config.stage not in stages:
        raise UserError(f"config.stage is {config.stage!r}, not one of {', '.join(stages)}")
    peaks = {"projector": config.projector_learning_rate or config.learning_rate}
    return tuple(
        Group(part, PATTERNS[part], peaks.get(part, config.learning_rate), config.weight_decay)
        for part in stages[config.stage]
    )


def trained(names: Iterable[str], config: ConfigDict) -> dict[str, Group]:
    """The group of each trained parameter, of all parameters of a model: the first whose pattern matches.

    Raises UserError for a pattern that is the first to match no parameter.
    """
    names, table = list(names), groups(config)
    found = {name: next((group for group in table if re.match(group.pattern, name)), None) for name in names}
    for group in table:
        if group not in found.values():
            matches = sum(bool(re.match(group.pattern, name)) for name in names)
            if matches:
                reason = f"all {matches} parameters that it matches are those of earlier patterns"
            else:
                examples = [next(part) for _, part in itertools.groupby(names, key=lambda name: name.partition(".")[0])]
                reason = f"it matches no parameter; their names are like {', '.join(examples)}"
            raise UserError(f"config.trainable: the pattern {group.pattern} trains nothing: {reason}")
    return {name: group for name, group in found.items() if group}


def reported_rates(config: ConfigDict, steps: int) -> dict[str, optax.Schedule]:
    """The learning rates that are metrics, by name: of the stage's main part and, if it differs, of the projector; of
    `config.trainable` that of the first pattern as `learning_rate`, of the second as `learning_rate_2` and so on."""
    table = groups(config)
    if config.trainable:
        chosen = {f"learning_rate_{number}" if number > 1 else "learning_rate": g for number, g in enumerate(table, 1)}
    else:
        chosen = {"learning_rate": table[-1]}
        chosen |= {"projector_learning_rate": table[0]} if config.projector_learning_rate else {}
    return {name: learning_rate(config, group.learning_rate, steps) for name, group in chosen.items()}


def make_optimizer(
    config: ConfigDict, names: Iterable[str], steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """The optimizer of a run by group, for a flat dict of exactly the trained parameters, clipped by their common norm.

    `mesh` shards the parameters; None is for those of one device.
    """
    chosen, optimizer = trained(names, config), OPTIMIZERS.find(config.optimizer)
    by_group = {
        group.label: optimizer.make(config, learning_rate(config, group.learning_rate, steps), group.weight_decay, mesh)
        for group in groups(config)
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(by_group, {name: group.label for name, group in chosen.items()}))
