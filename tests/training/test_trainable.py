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
from llava_jax.models import pieces
from llava_jax.models.llava import used_params
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, config_check, loop, optim
from llava_jax.training import step as training_step

NORMS_AND_TOWER = (
    {"parameters": r"llm\..*norm"},
    {"parameters": r"vision\.", "learning_rate": 2e-4},
)


def layer_of(name: str) -> tuple[str, int | None]:
    """(part of the model, layer or, before the first one, -1; None after the last) of a parameter of transformers."""
    part = next(part for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head") if part in name)
    if found := re.search(r"\.layers\.(\d+)\.", name):
        return part, int(found[1])
    before = "embed" in name or "pre_layrnorm" in name
    return part, -1 if before else None


# What is trained -> the table, and the learning rate of a layer of transformers' model by the same rule, 0 if frozen.
TABLES = {
    "norms and tower": (NORMS_AND_TOWER, lambda part, layer, norm: {"vision_tower": 2e-4}.get(part, 1e-3 * norm)),
    "projector and last layers of the decoder": (
        ((r"projector\.", "projector"), (r"llm\.layers", {"layers": "1:"})),
        lambda part, layer, norm: {
            "multi_modal_projector": 3e-3,
            "language_model": 1e-3 * (layer is not None and layer >= 1),
        }.get(part, 0),
    ),
    "projector and last layers of the tower": (
        ((r"vision\.", {"layers": "1:", "learning_rate": 2e-4}), (r"projector\.", "projector")),
        lambda part, layer, norm: {
            "multi_modal_projector": 3e-3,
            "vision_tower": 2e-4 * (layer is not None and layer >= 1),
        }.get(part, 0),
    ),
    "rates that decay by layer": (
        ((r"llm\.", {"layer_decay": 0.6}), (r"vision\.", {"layer_decay": 0.5, "learning_rate": 2e-4})),
        # Layers above: of the decoder's three, and of the three of the tower's four whose features are used.
        lambda part, layer, norm: {
            "vision_tower": 2e-4 * 0.5 ** (0 if layer is None else 2 - layer),
            "language_model": 1e-3 * 0.6 ** (0 if layer is None else 2 - layer),
            "lm_head": 1e-3,
        }.get(part, 0),
    ),
}


@pytest.mark.parametrize(
    ("table", "remat"), [("norms and tower", "full"), *((table, "none") for table in TABLES)], ids=lambda value: value
)
def test_a_table_has_the_losses_and_the_weights_of_torch(table, remat):
    model, steps = reference.LLAVA, 30
    entries, rate_of = TABLES[table]
    config = make_config(learning_rate=1e-3, warmup_ratio=0.1, trainable=entries, weight_decay=0.1)
    if "projector" in table:
        config.projector_learning_rate = 3e-3
    config_check.check(config)
    module = reference.llava(model)
    params = {name: value.copy() for name, value in reference.llava_params(module, model).items()}
    batches = random_batches(model, steps)
    chosen = optim.trained(used_params(model, params), config)
    start = {name: jnp.asarray(pieces.take(params, name)) for name in pieces.split(params, pieces.cuts(chosen))}
    frozen = {name: value for name, value in start.items() if name not in chosen}
    optimizer = optim.make_optimizer(config, chosen, steps, optim.layer_scales(chosen, model))
    state = builder.init_state(optimizer, {name: start[name] for name in chosen}, make_mesh({"fsdp": -1}))
    settings = settings_for(model, batches[0], remat=remat)
    step = jax.jit(lambda state, batch: training_step.train_step(settings, optimizer, state, frozen, batch))
    ours = []
    for batch in batches:
        state, values = step(state, batch)
        ours.append(float(values["loss"]))

    groups = []
    for name, parameter in module.named_parameters():
        norm = "norm" in name or "layrnorm" in name
        if rate := rate_of(*layer_of(name), norm):
            decay = 0.0 if norm or name.endswith("bias") else config.weight_decay
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    theirs = reference.train(module, groups, batches, model, config)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    after, expected = pieces.joined(state.trainable | frozen), reference.llava_params(module, model)
    for name, value in expected.items():
        moved = distances(name, value, params[name])
        np.testing.assert_array_equal(distances(name, after[name], params[name]) > 0, moved > 0, name)
        # Scores do not depend on the biases of keys: their gradients are rounding errors, which Adam scales up.
        if name != "vision.layers.attention.k_proj.bias":
            assert (distances(name, after[name], value) <= 2e-3 * moved).all(), name


def distances(name: str, one, other) -> np.ndarray:
    """How far two values of a parameter are apart; of a stack, those of each layer."""
    difference = np.asarray(one) - other
    return np.linalg.norm(difference.reshape(len(difference) if pieces.stack_of(name) else 1, -1), axis=1)


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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"parameters": "lm_head"},
            "the pattern lm_head trains nothing: it matches no parameter; the nearest is llm.lm_",
        ),
        (("llm", {"layers": "2:"}), "the pattern llm has layers '2:', and llm.layers has 2 that are used: 0:2 is all"),
        (("llm", "decoder"), r"config.trainable\[0\] has the group 'decoder', not one of projector, vision, llm, lora"),
    ],
)
def test_a_table_that_fits_no_model_ends_a_run_before_its_workdir(entry, message, world, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.train(run_config(world, trainable=(entry,)), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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
