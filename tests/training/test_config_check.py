"""Values of a configuration that make no sense are refused by name."""

import pytest

from configs import common, finetune, pretrain, quickstart
from llava_jax.cli import UserError
from llava_jax.training import config_check


@pytest.mark.parametrize(
    "config",
    [
        common.get_config(),
        *(recipe.get_config(arg) for recipe in (pretrain, finetune) for arg in ("", "13b,v0")),
        *(quickstart.get_config(stage) for stage in ("pretrain", "finetune")),
    ],
)
def test_recipes_pass(config):
    config_check.check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, 0)
            for key in (
                "max_length",
                "batch_rows",
                "rows_per_group",
                "log_every",
                "save_every",
                "keep",
                "profile.start",
            )
        ),
        *((key, -1) for key in ("steps", "eval_every", "max_rows_per_device", "data.workers", "profile.steps")),
        ("image_slots", -2),
        *((key, -0.1) for key in ("epochs", "learning_rate", "warmup_ratio", "clip_norm", "beta1")),
        *(("learning_rate", value) for value in (float("nan"), float("inf"))),
        *(
            (key, "foo")
            for key in ("stage", "image_position", "image_aspect", "compute_dtype", "frozen_dtype", "remat")
        ),
        *(("beta2", 1.0), ("warmup_ratio", 1.5), ("epochs", 0.0)),
    ],
)
def test_nonsense_is_refused_by_name(key, value):
    config = common.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key} is {value!r}"):
        config_check.check(config)


@pytest.mark.parametrize(("pack", "length", "message"), [(False, 4096, "set pack"), (True, 1024, "have to fit")])
def test_longer_rows_are_for_packing(pack, length, message):
    config = common.get_config()
    config.pack, config.row_length = pack, length
    with pytest.raises(UserError, match=f"config.row_length is {length}.*{message}"):
        config_check.check(config)


def test_packed_rows_are_not_grouped_by_modality():
    config = common.get_config()
    config.pack = config.group_by_modality = True
    with pytest.raises(UserError, match="config.group_by_modality is for rows of one sample"):
        config_check.check(config)


def test_all_problems_are_listed():
    config = common.get_config()
    config.keep, config.remat = 0, "half"
    with pytest.raises(UserError, match=r"remat is 'half', not one of 'none', .*; config.keep is 0"):
        config_check.check(config)
