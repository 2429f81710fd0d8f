"""What the values of a run's configuration may be; configs/common.py says what they mean."""

import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.data.conversation import IMAGE_POSITIONS
from llava_jax.data.images import ASPECTS
from llava_jax.models.attention import BACKENDS
from llava_jax.models.execution import REMAT_POLICIES
from llava_jax.training.optim import STAGES

DTYPES = ("", "float32", "bfloat16")
CHOICES = {
    "stage": tuple(STAGES),
    "data.on_bad_sample": ("error", "skip"),
    "image_position": IMAGE_POSITIONS,
    "image_aspect": ("", *ASPECTS),
    "compute_dtype": DTYPES,
    "frozen_dtype": DTYPES,
    "remat": tuple(REMAT_POLICIES),
    "attention": ("", *BACKENDS),
}
AT_LEAST_1 = (
    "max_length", "batch_rows", "rows_per_group", "log_every", "save_every", "keep", "profile.start", "evaluate.limit"
)  # fmt: skip
AT_LEAST_0 = (
    "data.holdout", "data.workers", "data.max_bad_share", "row_length", "label_slots", "max_rows_per_device", "steps",
    "epochs", "learning_rate", "projector_learning_rate", "weight_decay", "epsilon", "clip_norm", "eval_every",
    "profile.steps", "evaluate.every", "warmup_ratio", "beta1", "beta2",
)  # fmt: skip
AT_MOST_1 = ("warmup_ratio", "data.max_bad_share")
BELOW_1 = ("beta1", "beta2")


def check(config: ConfigDict) -> None:
    """Raises UserError that lists every value that makes no sense."""
    try:
        problems = list(_problems(config))
    except (AttributeError, KeyError) as error:
        missing = re.search(r"\w+", str(error).rpartition("attribute")[2] or str(error))
        raise UserError(f"the config has no key {missing[0]!r}: a recipe begins with common.get_config()") from None
    if problems:
        raise UserError("; ".join(f"config.{problem}" for problem in problems))


def row_length(config: ConfigDict) -> int:
    """Positions of a row."""
    return config.row_length or config.max_length


def _problems(config: ConfigDict) -> Iterator[str]:
    for key, choices in CHOICES.items():
        if _get(config, key) not in choices:
            yield f"{key} is {_get(config, key)!r}, not one of {', '.join(repr(choice) for choice in choices)}"
    for keys, least in ((AT_LEAST_1, 1), (AT_LEAST_0, 0), (("image_slots",), -1)):
        for key in keys:
            value = _get(config, key)
            if not least <= value < math.inf:
                yield f"{key} is {value}: it has to be {least} or more"
    yield from (f"{key} is {_get(config, key)}: it has to be 1 or less" for key in AT_MOST_1 if _get(config, key) > 1)
    yield from (f"{key} is {config[key]}: it has to be below 1" for key in BELOW_1 if config[key] >= 1)
    if not (config.steps or config.epochs):
        yield f"epochs is {config.epochs}, and so is steps: there is nothing to train"
    if config.group_by_modality and config.pack:
        yield "group_by_modality is for rows of one sample, and pack is set: packed rows are full because they mix"
    if config.row_length and not config.pack:
        yield f"row_length is {config.row_length}, which is for packed rows: set pack, or max_length instead"
    elif config.row_length and config.row_length < config.max_length:
        yield f"row_length is {config.row_length}: samples of up to max_length={config.max_length} have to fit"
    if config.evaluate.benchmark:
        for key in ("questions", "labels", "images"):
            if not config.evaluate[key]:
                yield f"evaluate.{key} is not set, and evaluate.benchmark is: give --config.evaluate.{key}=..."
    if config.wandb.project and not importlib.util.find_spec("wandb"):
        yield f"wandb.project is {config.wandb.project!r}, which needs pip install 'llava_jax[wandb]'"


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
