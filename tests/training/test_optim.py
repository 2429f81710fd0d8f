"""Stages and groups."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from configs import common
from llava_jax.cli import UserError
from llava_jax.models.config import LoraConfig
from llava_jax.models.llava import abstract_params, used_params
from llava_jax.training import optim


def test_each_stage_trains_its_parts():
    names, config, parts = abstract_params(tiny.config()), common.get_config(), {}
    for stage in optim.STAGES:
        config.stage = stage
        parts[stage] = {name.split(".")[0] for name in optim.trained(names, config)}
    assert parts == {"pretrain": {"projector"}, "finetune": {"projector", "llm"}}
    config.stage = "stage_3"
    with pytest.raises(UserError, match="'stage_3', not one of pretrain, finetune"):
        optim.trained(names, config)


def table(*entries, **changes):
    config = common.get_config()
    config.update(learning_rate=1e-3, weight_decay=0.5, **changes)
    config.trainable = entries
    return config


def test_the_first_pattern_of_a_table_counts_and_what_none_matches_is_frozen():
    entries = {"parameters": r"llm\..*norm", "learning_rate": 1e-4}, {"parameters": r"llm\.layers", "weight_decay": 0.1}
    groups = optim.trained(abstract_params(tiny.config()), table(*entries))
    assert {name.split(".")[0] for name in groups} == {"llm"} and "llm.lm_head.kernel" not in groups
    assert groups["llm.norm.scale"] == groups["llm.layers.input_layernorm.scale"]
    assert groups["llm.norm.scale"][2:4] == (1e-4, 0.5)
    assert groups["llm.layers.mlp.up_proj.kernel"][2:4] == (1e-3, 0.1)


def test_a_pattern_that_trains_nothing_is_an_error():
    names = abstract_params(tiny.config())
    message = (
        r"the pattern lm trains nothing: it matches no parameter; the nearest is llm.norm.scale, "
        r"their names are like .*projector\.linear_1\.bias, vis"
    )
    with pytest.raises(UserError, match=message):
        optim.trained(names, table({"parameters": "llm"}, {"parameters": "lm"}))
    with pytest.raises(
        UserError, match="pattern llm.norm trains nothing: all 1 parameters that it matches are those of ear"
    ):
        optim.trained(names, table({"parameters": "llm"}, {"parameters": "llm.norm"}))


def test_weights_are_not_trained_beside_their_adapters():
    names = abstract_params(tiny.config(lora=LoraConfig(rank=2, alpha=4.0, targets=("q_proj",))))
    message = r"the pattern llm\\\. trains llm.layers.attention.q_proj.kernel itself, beside its adapter"
    with pytest.raises(UserError, match=message):
        optim.trained(names, table((r"projector\.", "projector"), (r"llm\.", "llm")))
    groups = optim.trained(names, table((r".+\.lora\.", "lora"), (r"llm\..*norm", "llm")))
    assert "llm.layers.attention.q_proj.lora.a" in groups and "llm.norm.scale" in groups


@pytest.mark.parametrize("layers", ["2:", "1:1", "2:1", "-3:", ":3", ":-2"])
def test_layers_that_no_stack_has_are_an_error_with_those_that_are(layers):
    message = (
        f"the pattern llm has layers {layers!r}, and llm.layers has 2 that are used: 0:2 is all of them, -1: the la"
    )
    with pytest.raises(UserError, match=message):
        optim.trained(abstract_params(tiny.config()), table(("llm", {"layers": layers})))


def test_layers_of_what_is_no_stack_are_an_error():
    message = (
        r"pattern projector trains nothing: it has layers '1:', and it matches no layers; the nearest is \w+\.layers"
    )
    with pytest.raises(UserError, match=message):
        optim.trained(abstract_params(tiny.config()), table(("projector", {"layers": "1:"})))


def test_the_last_layers_of_the_tower_are_the_last_that_are_used():
    """The features are those before its last layer, which cannot be trained."""
    shapes = used_params(tiny.config(), abstract_params(tiny.config()))
    chosen = optim.trained(shapes, table((r"vision\.", {"layers": "-1:"})))
    assert {name.removeprefix("vision.layers.").partition(".")[0] for name in chosen} == {"1:2"}
    with pytest.raises(UserError, match="vision.layers has 2 that are used: 0:2 is all"):
        optim.trained(shapes, table((r"vision\.", {"layers": "2:"})))


def test_a_table_sets_rates_and_decay_of_its_groups_and_reports_them():
    entries = (
        {"parameters": r"vision\.", "learning_rate": 2e-6, "weight_decay": 0.0},
        {"parameters": "llm"},
    )
    config = table(*entries, warmup_ratio=0.0)
    params = {name: jnp.ones(leaf.shape) for name, leaf in abstract_params(tiny.config()).items()}
    chosen = optim.trained(params, config)
    params = {name: params[name] for name in chosen}
    optimizer = optim.make_optimizer(config, chosen, 10)
    gradients = {name: jnp.zeros_like(value) for name, value in params.items()}
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    for name, update in updates.items():
        decayed = name.startswith("llm.") and not name.endswith(("bias", "scale"))
        np.testing.assert_allclose(update, -0.5 * 1e-3 * decayed, rtol=1e-6, err_msg=name)
    rates = {name: float(rate(0)) for name, rate in optim.reported_rates(config, 10).items()}
    assert rates == pytest.approx({"learning_rate": 2e-6, "learning_rate_2": 1e-3})


def test_the_stages_report_the_rates_that_they_always_did():
    config = common.get_config()
    config.update(stage="finetune", learning_rate=1e-3, warmup_ratio=0.0)
    assert {name: float(rate(0)) for name, rate in optim.reported_rates(config, 9).items()} == pytest.approx(
        {"learning_rate": 1e-3}
    )
    config.projector_learning_rate = 1e-2
    assert {name: float(rate(0)) for name, rate in optim.reported_rates(config, 9).items()} == pytest.approx(
        {"learning_rate": 1e-3, "projector_learning_rate": 1e-2}
    )


def make(stage="finetune", **changes):
    config = common.get_config()
    config.stage = stage
    config.warmup_ratio = 0.0
    config.update(changes)
    params = {name: jnp.ones(leaf.shape) for name, leaf in abstract_params(tiny.config()).items()}
    chosen = optim.trained(params, config)
    return optim.make_optimizer(config, chosen, 10), {name: params[name] for name in chosen}


def test_groups_have_their_learning_rates_and_only_matrices_decay():
    optimizer, params = make(learning_rate=1e-3, projector_learning_rate=1e-2, weight_decay=0.5)
    gradients = {name: jnp.zeros_like(value) for name, value in params.items()}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for name, update in updates.items():
        decayed = not name.endswith(("bias", "scale"))
        rate = 1e-2 if name.startswith("projector.") else 1e-3
        np.testing.assert_allclose(update, -0.5 * rate * decayed, rtol=1e-6, err_msg=name)


def test_clipping_is_by_the_norm_of_all_that_is_trained():
    optimizer, params = make(clip_norm=1.0, beta1=0.0)
    gradients = {name: jnp.full_like(value, 3.0) for name, value in params.items()}
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    squares = optax.tree_utils.tree_get_all_with_path(state, "nu")
    total = sum(
        float(jnp.sum(value)) for _, moments in squares for value in moments.values() if isinstance(value, jnp.ndarray)
    )
    np.testing.assert_allclose(total, (1 - 0.999) * 1.0, rtol=1e-3)
