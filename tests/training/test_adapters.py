"""Training with adapters: PEFT's losses, what is trained, runs that are stopped, mistakes that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import peft_reference
import pytest
import torch_reference as reference
from training_runs import (
    make_config,
    random_batches,
    settings_for,
)

from llava_jax.models.config import LoraConfig
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, optim
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
