"""A recipe's own table of what is trained: gradients reach it, wherever it is, and nothing else changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_reference as reference
from training_runs import (
    assert_same_run,
    final,
    make_config,
    metrics,
    random_batches,
    run_config,
    settings_for,
    stop_at,
)

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.copy import copy, copy_frozen
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, loop, optim
from llava_jax.training import step as training_step

NORMS_AND_TOWER = (
    {"parameters": r"llm\..*norm"},
    {"parameters": r"vision\.", "learning_rate": 2e-4},
)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_trained_tower_has_the_losses_of_torch(remat):
    model, steps = reference.LLAVA, 30
    config = make_config(learning_rate=1e-3, warmup_ratio=0.1, trainable=NORMS_AND_TOWER)
    module = reference.llava(model)
    params = reference.llava_params(module, model)
    batches = random_batches(model, steps)
    chosen = optim.trained(params, config)
    trainable = {name: jnp.array(params[name]) for name in chosen}
    frozen = {name: jnp.asarray(value) for name, value in params.items() if name not in chosen}
    optimizer = optim.make_optimizer(config, chosen, steps)
    state = builder.init_state(optimizer, trainable, make_mesh({"fsdp": -1}))
    settings = settings_for(model, batches[0], remat=remat)
    step = jax.jit(lambda state, batch: training_step.train_step(settings, optimizer, state, frozen, batch))
    ours = []
    for batch in batches:
        state, values = step(state, batch)
        ours.append(float(values["loss"]))

    groups = [
        {"params": [parameter for name, parameter in module.named_parameters() if belongs(name)], "lr": rate}
        for rate, belongs in (
            (1e-3, lambda name: "language_model" in name and "norm" in name),
            (2e-4, lambda name: "vision_tower" in name),
        )
    ]
    theirs = reference.train(module, groups, batches, model, config)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    moved = {name for name in chosen if not np.array_equal(state.trainable[name], params[name])}
    unused = {name for name in chosen if name.startswith("vision.post_layernorm")}  # of CLIP's own head
    assert moved == set(chosen) - unused and any(name.startswith("vision.layers") for name in moved)


def test_a_run_trains_its_table_and_resumes(world, tmp_path, capsys):
    config = run_config(world, steps=4, trainable=NORMS_AND_TOWER, weight_decay=0.0)
    loop.train(config, str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert re.search(r"vision\\\. +whole +23,488 +0.1 MiB  rate 0.0002, weight decay 0\n", said), said
    before, after = final(world["init"]), final(tmp_path / "run")
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert {name.split(".")[0] for name in changed} == {"vision", "llm"}
    assert all(name.startswith("vision.") or "norm" in name for name in changed)
    line = metrics(tmp_path / "run")[0]
    assert line["learning_rate_2"] == pytest.approx(0.2 * line["learning_rate"])
    stop_at(2, config, tmp_path / "stopped")
    loop.train(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "run")
    with pytest.raises(UserError, match=r"another configuration \(trainable: \[.*\] there, \[\] now\)"):
        loop.train(run_config(world, steps=4), str(tmp_path / "run"))


def test_a_pattern_of_no_parameter_ends_a_run_before_its_workdir(world, tmp_path):
    config = run_config(world, trainable=({"parameters": "lm_head"},))
    with pytest.raises(UserError, match="the pattern lm_head trains nothing: it matches no parameter"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_trains_some_layers_resumes_and_opens_whole(world, tmp_path):
    """Its steps hold the trained layers; the others come from the checkpoint that it started from."""
    table = ((r"vision\.", {"learning_rate": 2e-4, "layers": "1:"}), (r"llm\.", {"layers": "-1:", "layer_decay": 0.5}))
    config = run_config(world, steps=4, trainable=table)
    loop.train(config, str(tmp_path / "run"))
    kernel = "llm.layers.1:2.mlp.up_proj.kernel"
    assert open_checkpoint(tmp_path / "run").stored[kernel].shape == (1, 48, 96)
    before, after = final(world["init"]), final(tmp_path / "run")
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    moved = {name: [i for i in range(len(v)) if (v[i] != before[name][i]).any()] for name, v in after.items()}
    assert moved["llm.layers.mlp.up_proj.kernel"] == [1]
    assert moved["vision.layers.mlp.fc1.kernel"] == [1]  # of three, whose last one no feature depends on
    assert {name for name, rows in moved.items() if rows} == {name for name in after if ".layers." in name}
    stop_at(2, config, tmp_path / "stopped")
    copy_frozen(tmp_path / "stopped")
    loop.train(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "run")
    copy(tmp_path / "run", tmp_path / "copy")
    for name, value in final(tmp_path / "copy").items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
