"""Values of a configuration that make no sense are refused by name."""

import re

import pytest

from configs import common, finetune, pretrain, quickstart
from llava_jax.cli import UserError, warn_once
from llava_jax.data.conversation import IMAGE_POSITIONS
from llava_jax.models.attention import BACKENDS
from llava_jax.models.config import ASPECTS
from llava_jax.models.execution import REMAT_POLICIES
from llava_jax.recipes.common import OPTIONS
from llava_jax.training import config_check, optim


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


@pytest.mark.parametrize(("key", "value", "message"), [("batch_rows", None, "is None"), ("seed", -1, "0 or more")])
def test_no_number_and_no_seed_are_told(key, value, message):
    config = common.get_config()
    config[key] = value
    with pytest.raises(UserError, match=message):
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


def test_the_choices_are_those_that_are_implemented():
    """Declared as text, so that a recipe imports no JAX."""
    implemented = {
        "stage": optim.STAGES,
        "image_position": IMAGE_POSITIONS,
        "image_aspect": ("", *ASPECTS),
        "remat": REMAT_POLICIES,
        "attention": ("", *BACKENDS),
    }
    for key, names in implemented.items():
        assert set(OPTIONS[key].choices) == set(names), key


def test_every_default_is_allowed():
    assert not [key for key, option in OPTIONS.items() if option.problem(option.default)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("llm", "config.trainable[0] is 'llm': it has to be like"),
        ({"learning_rate": 1.0}, "it has to be like"),
        ({"parameters": "llm("}, "'llm(', which is no regular expression: missing )"),
        (
            {"parameters": "llm", "learning_rate": -1e-3},
            "config.trainable[0] has learning_rate -0.001: it has to be 0 or",
        ),
        ({"parameters": "llm", "weight_decay": "x"}, "has weight_decay 'x'"),
        (("projector", "projektor"), "has the group 'projektor', not one of projector, vision, llm, lora"),
        *(
            (("llm", {"layers": value}), f'trainable[0] has layers {value!r}: it has to be a slice like "16:"')
            for value in (2, "2", ":", "1:3:2", "a:")
        ),
        (("llm", {"layer_decay": 0.0}), "has layer_decay 0.0: it has to be above 0 and at most 1"),
        (("llm", {"layer_decay": 1.5}), "has layer_decay 1.5: it has to be above 0 and at most 1"),
        ({"parameters": "llm", "lr": 1.0}, "has 'lr', which is none of 'learning_rate', 'weight_decay', 'layers'"),
    ],
)
def test_a_table_of_what_is_trained_is_checked(entry, message):
    config = common.get_config()
    config.trainable = (entry,)
    with pytest.raises(UserError, match=re.escape(message)):
        config_check.check(config)


def test_a_learning_rate_that_a_table_replaces_is_refused():
    config = common.get_config()
    config.trainable, config.projector_learning_rate = ({"parameters": "projector"},), 1e-3
    with pytest.raises(UserError, match="projector_learning_rate is 0.001, and trainable is set"):
        config_check.check(config)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"eval_every": 5}, "data.holdout"),
        ({"evaluate.every": 5}, "evaluate.benchmark"),
        ({"evaluate.questions": "q.json"}, "evaluate.benchmark"),
        ({"profile.start": 5}, "profile.steps"),
        ({"wandb.entity": "us"}, "wandb.project"),
    ],
)
def test_options_without_effect_are_told(changes, needed, capsys):
    warn_once.cache_clear()
    config = common.get_config()
    config.update_from_flattened_dict(changes)
    for _ in range(2):
        config_check.check(config)
    (key,) = changes
    assert capsys.readouterr().err == f"warning: config.{key} has no effect without config.{needed}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "targets": "q_proj"}, "config.lora.targets is 'q_proj': it has to be a tuple"),
        ({"rank": 8, "targets": ()}, r"config.lora.targets is \(\): it has to be a tuple"),
        ({"dora": True}, "config.lora.dora is True, and lora.rank is 0, which is no LoRA: set lora.rank"),
        ({"rank": 8, "stage": "pretrain"}, "config.lora.rank is 8, and stage pretrain trains the projector alone"),
    ],
)
def test_adapters_that_would_not_be_trained_are_refused(options, message):
    config = finetune.get_config()
    config.stage = options.pop("stage", "finetune")
    with config.unlocked():
        config.lora = dict(config.lora.to_dict()) | options
    with pytest.raises(UserError, match=message):
        config_check.check(config)
