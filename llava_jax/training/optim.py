"""What each stage trains, and how: tables of parameter names, AdamW and the published schedule."""

import math
import re
from collections.abc import Iterable

import optax
from ml_collections import ConfigDict

from llava_jax.cli import UserError

# Stage -> (pattern of names, optimizer group). What matches nothing is frozen.
STAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "pretrain": ((r"projector\.", "projector"),),
    "finetune": ((r"projector\.", "projector"), (r"llm\.", "llm")),
}
# Never decayed.
NO_DECAY = re.compile(r"(bias|scale)$")


def group_of(name: str, stage: str) -> str | None:
    """The optimizer group of a parameter, None if the stage freezes it."""
    if stage not in STAGES:
        raise UserError(f"config.stage is {stage!r}, not one of {', '.join(STAGES)}")
    return next((group for pattern, group in STAGES[stage] if re.match(pattern, name)), None)


def trainable_names(names: Iterable[str], stage: str) -> list[str]:
    return [name for name in names if group_of(name, stage)]


def learning_rate(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear from 0 over ceil(ratio * steps), then half a cosine to 0: the schedule of the published recipes."""
    warmup = math.ceil(steps * warmup_ratio)
    cosine = optax.cosine_decay_schedule(peak, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), cosine], [warmup]) if warmup else cosine


def schedules(config: ConfigDict, steps: int) -> dict[str, optax.Schedule]:
    """Learning rate by optimizer group."""
    peaks = {"llm": config.learning_rate, "projector": config.projector_learning_rate or config.learning_rate}
    return {group: learning_rate(peak, steps, config.warmup_ratio) for group, peak in peaks.items()}


def make_optimizer(config: ConfigDict, trainable: Iterable[str], steps: int) -> optax.GradientTransformation:
    """AdamW by group, for a flat dict of exactly the trainable parameters, clipped by their common norm."""
    labels = {name: group_of(name, config.stage) for name in trainable}
    adamw = {
        group: optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: {name: not NO_DECAY.search(name) for name in params},
        )
        for group, schedule in schedules(config, steps).items()
        if group in labels.values()
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(adamw, labels))
