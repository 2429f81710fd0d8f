"""Stages, groups and the schedule."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
import transformers

from configs import common
from llava_jax.cli import UserError
from llava_jax.models.llava import abstract_params
from llava_jax.training import optim


@pytest.mark.parametrize("steps,ratio", [(50, 0.1), (5198, 0.03), (7, 0.0), (1, 0.03)])
def test_the_schedule_is_that_of_transformers(steps, ratio):
    ours = optim.learning_rate(2e-5, steps, ratio)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-5)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, int(np.ceil(steps * ratio)), steps)
    for step in range(steps):
        np.testing.assert_allclose(float(ours(step)), theirs.get_last_lr()[0], rtol=1e-4, atol=1e-11)
        optimizer.step()
        theirs.step()


def test_each_stage_trains_its_parts():
    names = abstract_params(tiny.config())
    parts = {stage: {name.split(".")[0] for name in optim.trainable_names(names, stage)} for stage in optim.STAGES}
    assert parts == {"pretrain": {"projector"}, "finetune": {"projector", "llm"}}
    with pytest.raises(UserError, match="'stage_3', not one of pretrain, finetune"):
        optim.trainable_names(names, "stage_3")


def make(stage="finetune", **changes):
    config = common.get_config()
    config.stage = stage
    config.warmup_ratio = 0.0
    config.update(changes)
    params = {name: jnp.ones(leaf.shape) for name, leaf in abstract_params(tiny.config()).items()}
    params = {name: params[name] for name in optim.trainable_names(params, stage)}
    return optim.make_optimizer(config, params, 10), params


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
