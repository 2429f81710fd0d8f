"""Training with adapters: PEFT's losses, what is trained, runs that are stopped, mistakes that are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import peft_reference
import pytest
import torch_reference as reference
from training_runs import (
    assert_same_run,
    make_config,
    random_batches,
    run_config,
    settings_for,
    stop_at,
)

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.models.config import LoraConfig
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, loop, optim
from llava_jax.training import step as training_step

TARGETS = (r"llm\.layers\..*_proj",)


def with_lora(config, **options):
    """A configuration with options of `config.lora`."""
    config.lora.update({"rank": 4} | options)
    return config


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "alpha": 8.0},
        {"rank": 3, "alpha": 6.0, "rslora": True, "dora": True, "targets": ("q_proj", "v_proj", "down_proj")},
    ],
    ids=["lora", "dora"],
)
def test_fifty_steps_have_the_losses_of_peft(options):
    """Adapters of the language model, and the whole projector (`modules_to_save`) with a rate of its own."""
    config = with_lora(
        make_config(
            learning_rate=3e-3, projector_learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0, warmup_ratio=0.1
        ),
        **options,
    )
    lora = LoraConfig(**{"targets": tuple(config.lora.targets)} | options)
    module, model = peft_reference.adapted(reference.LLAVA, lora, modules_to_save=["multi_modal_projector"])
    params = {name: jnp.array(value) for name, value in peft_reference.params(module, model).items()}
    names = optim.trained(params, config)
    trainable = {name: params.pop(name) for name in names}
    optimizer = optim.make_optimizer(config, names, 50)
    state = builder.init_state(optimizer, trainable, make_mesh({"fsdp": -1}))
    batches = random_batches(model, 50)
    settings = settings_for(model, batches[0])
    step = jax.jit(lambda state, batch: training_step.train_step(settings, optimizer, state, params, batch))
    ours = []
    for batch in batches:
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))

    groups = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = config.projector_learning_rate if "multi_modal_projector" in name else config.learning_rate
            groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.1 if parameter.ndim > 1 else 0.0})
    theirs = reference.train(module, groups, batches, model, config)
    assert theirs[-1] < theirs[0] - 0.05, "the reference did not learn: equal losses would say little"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    trained = peft_reference.params(module, model)
    assert {name.split(".")[0] for name in names} == {"projector", "llm"}
    for name in names:
        off = np.linalg.norm(state.trainable[name] - trained[name]) / np.linalg.norm(trained[name])
        assert off < 1e-3, name


def lora_run(world, **options):
    config = run_config(world).copy_and_resolve_references().unlock()
    config.lora.update({"rank": 4, "dropout": 0.1} | options)
    return config.lock()


def test_a_run_with_dropout_and_dora_resumes_bit_exactly_and_says_what_it_trains(world, tmp_path, capsys):
    config = lora_run(world, dora=True)
    loop.train(config, str(tmp_path / "whole"))
    said = capsys.readouterr().err
    assert re.search(r"lora +LoRA of rank 4, DoRA +[\d,]+ +[\d.]+ MiB +rate", said), said
    assert re.search(r"llm +frozen +[\d,]+", said) and re.search(r"projector +whole +[\d,]+", said)
    stop_at(3, config, tmp_path / "stopped")
    loop.train(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    stored = open_checkpoint(tmp_path / "whole").stored
    assert stored and all(".lora." in name or name.startswith("projector.") for name in stored)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"targets": ("q_prj",)}, {}, "no linear layer is named 'q_prj'; the nearest is 'q_proj'"),
        ({"targets": ("q_proj(",)}, {}, "'q_proj\\(' is no regular expression"),
        ({"rank": 1000}, {}, "config.lora.rank is 1000, more than the width 24 of llm.layers.attention.k_proj"),
        ({}, {"trainable": ((r"projector\.", "projector"),)}, "no pattern trains the adapter llm.layers"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(options, changes, message, world, tmp_path):
    config = lora_run(world, **options)
    config.update(changes)
    with pytest.raises(UserError, match=message) as raised:
        loop.train(config, str(tmp_path / "run"))
    assert "\n" not in str(raised.value) and not (tmp_path / "run" / "config.json").exists()
