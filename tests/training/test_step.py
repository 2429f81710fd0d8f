"""The train step against torch: losses, gradients, accumulation, rematerialization, packing."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny
import torch_reference as reference
from training_runs import make_config, random_batches, settings_for, split_params

from llava_jax.cli import UserError
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import measure
from llava_jax.data.packing import PackedOrder, Room
from llava_jax.data.pipeline import Batches, ImageDecoder
from llava_jax.data.plan import Layout, Order, plan_layout
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.models.config import LoraConfig
from llava_jax.models.execution import REMAT_POLICIES
from llava_jax.models.llava import abstract_params
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, optim
from llava_jax.training import step as training_step

# Adapters, which are trained together with the weights that they adapt.
ADAPTED = tiny.config(lora=LoraConfig(4, 8.0, (r".*_proj", r"vision\.layers\..*"), dora=True))
DROPPING = dataclasses.replace(ADAPTED, lora=dataclasses.replace(ADAPTED.lora, dropout=0.25))


def torch_losses(module, batches, model, config) -> list[float]:
    """The losses of a stage, whose weight decay spares vectors."""
    groups = []
    for name, parameter in module.named_parameters():
        projector = "multi_modal_projector" in name
        if projector or config.stage == "finetune" and "vision_tower" not in name:
            rate = config.projector_learning_rate if projector else config.learning_rate
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return reference.train(module, groups, batches, model, config)


@pytest.mark.parametrize("stage,clip", [("pretrain", 0.0), ("finetune", 1.0)])
def test_fifty_steps_have_the_losses_of_torch(stage, clip):
    model, steps = reference.LLAVA, 50
    config = make_config(
        stage,
        learning_rate=1e-3,
        projector_learning_rate=2e-3,
        weight_decay=0.1,
        clip_norm=clip,
        warmup_ratio=0.1,
    )
    module = reference.llava(model)
    params = reference.llava_params(module, model)
    batches = random_batches(model, steps)
    settings = settings_for(model, batches[0])
    trainable, frozen = split_params(params, stage)
    optimizer = optim.make_optimizer(config, optim.trained(trainable, config), steps)
    state = builder.init_state(optimizer, trainable, make_mesh({"fsdp": -1}))
    step = jax.jit(lambda state, batch: training_step.train_step(settings, optimizer, state, frozen, batch))
    ours = []
    for batch in batches:
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))
    theirs = torch_losses(module, batches, model, config)
    assert theirs[-1] < theirs[0] - 0.05, "the reference did not learn: equal losses would say little"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage,model", [("pretrain", tiny.config()), ("finetune", DROPPING)])
def test_accumulated_gradients_are_those_of_the_large_batch(stage, model):
    (batch,) = random_batches(model, 1, rows=8)
    batch["labels"][0] = -100  # microbatches weigh by their tokens, not equally
    trainable, frozen = split_params(tiny.params(model), stage)
    results = [
        jax.jit(training_step.loss_and_gradients, static_argnums=0)(
            settings_for(model, batch, accumulation=accumulation), trainable, frozen, batch
        )
        for accumulation in (1, 2, 4)
    ]
    for loss, gradients in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, results[0][1][name], atol=1e-6, err_msg=name)


def test_validation_computes_as_many_rows_at_once_as_training():
    model = tiny.config()
    (batch,) = random_batches(model, 1, rows=8)
    trainable, frozen = split_params(tiny.params(model), "finetune")
    results, peaks = [], []
    for accumulation in (1, 4):
        settings = settings_for(model, batch, accumulation=accumulation)
        compiled = (
            jax.jit(training_step.eval_step, static_argnums=0).lower(settings, trainable, frozen, batch).compile()
        )
        results.append(compiled(trainable, frozen, batch))
        peaks.append(compiled.memory_analysis().temp_size_in_bytes)
    np.testing.assert_allclose(*(loss for loss, _ in results), rtol=1e-6)
    assert results[0][1] == results[1][1] and peaks[1] < 0.5 * peaks[0]


def test_stage_1_computes_no_weight_gradients_of_the_frozen_and_keeps_no_optimizer_state_for_them():
    model = tiny.config(
        text=tiny.TextConfig(tiny.VOCAB, 64, 256, 4, 4, 4, 16), vision=tiny.VisionConfig(64, 256, 4, 4, 16, 8)
    )
    (batch,) = random_batches(model, 1, length=128)
    settings = settings_for(model, batch)
    flops, optimizer_bytes, names = {}, {}, {}
    for stage in ("pretrain", "finetune"):
        trainable, frozen = split_params(tiny.params(model), stage)
        config = make_config(stage)
        optimizer = optim.make_optimizer(config, optim.trained(trainable, config), 10)
        state = builder.init_state(optimizer, trainable, make_mesh({"fsdp": -1}))

        def step(state, frozen, batch, optimizer=optimizer):
            return training_step.train_step(settings, optimizer, state, frozen, batch)

        compiled = jax.jit(step).lower(state, frozen, batch).compile()
        flops[stage] = compiled.cost_analysis()["flops"]
        optimizer_bytes[stage] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
        names[stage] = set(trainable)
    # XLA counts the body of a scan once. Per token of a layer: forward 2N, activations 2N, weights 2N.
    D, F = model.text.hidden_size, model.text.intermediate_size
    weight_gradients = 2 * batch["tokens"].size * (4 * D * D + 3 * D * F)
    assert flops["finetune"] - flops["pretrain"] >= weight_gradients
    projector = sum(leaf.size for name, leaf in abstract_params(model).items() if name.startswith("projector."))
    assert all(name.startswith("projector.") for name in names["pretrain"])
    assert optimizer_bytes["pretrain"] <= 2 * 4 * projector + 64  # two moments, and counters


def test_the_vision_tower_gets_no_gradient_in_either_stage():
    assert {name.split(".")[0] for name in optim.trained(abstract_params(tiny.config()), make_config("finetune"))} == {
        "projector",
        "llm",
    }


def test_a_text_only_batch_leaves_the_projector_alone():
    model = tiny.config()
    (batch,) = random_batches(model, 1)
    batch["image_feature_index"][:] = -1
    trainable, frozen = split_params(tiny.params(model), "finetune")
    _, gradients = jax.jit(training_step.loss_and_gradients, static_argnums=0)(
        settings_for(model, batch), trainable, frozen, batch
    )
    for name, gradient in gradients.items():
        if name.startswith("projector."):
            np.testing.assert_array_equal(gradient, 0, err_msg=name)
    assert float(optax.global_norm(gradients)) > 0


@pytest.mark.parametrize("model", [tiny.config(), DROPPING], ids=["plain", "adapted"])
def test_remat_changes_nothing(model):
    (batch,) = random_batches(model, 1)
    trainable, frozen = split_params(tiny.params(model), "finetune")
    results = [
        jax.jit(training_step.loss_and_gradients, static_argnums=0)(
            settings_for(model, batch, remat=remat), trainable, frozen, batch
        )
        for remat in REMAT_POLICIES
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, gradient in results[0][1].items():
        np.testing.assert_allclose(gradient, results[1][1][name], atol=1e-6, err_msg=name)


def test_packed_samples_have_the_losses_and_gradients_of_unpacked_ones(tmp_path):
    """Of each sample, and of all: pictures in several samples of a row, and several rows in a group."""
    model, params = ADAPTED, tiny.params(ADAPTED)
    source = LlavaJson(*tiny.data(tmp_path))
    encode = TextEncoder(get_template("v1"), tiny.tokenizer(), model.image_tokens, 96)
    encoded = EncodedSource(source, encode)
    lengths = measure(encoded)
    length, rows = int(3.3 * lengths.tokens.max()), len(source)
    unpacked = Order(np.arange(rows), rows, 0)
    packed = PackedOrder(np.arange(rows), 4, 0, lengths=lengths, room=Room(length, 2, 5))
    trainable, frozen = split_params(params, "finetune")
    found = []
    for order, group, row_length in ((unpacked, 3, 96), (packed, 2, length)):
        assert order.epoch_steps(0) == 1
        shapes = {"max_length": row_length, "image_tokens": model.image_tokens, "image_size": 16}
        layout = plan_layout([(order, 1)], lengths, rows_per_group=group, **shapes)
        batch = Batches(encoded, ImageDecoder(16, "pad", (0.5, 0.5, 0.5)), order, layout)[0]
        settings = training_step.StepSettings(model, layout, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
        loss, gradients = jax.jit(functools.partial(training_step.loss_and_gradients, settings))(
            trainable, frozen, batch
        )
        eval_fn = jax.jit(functools.partial(training_step.eval_step, settings))
        losses = {}
        for row, samples in enumerate(order.rows(0)):
            for segment, index in enumerate(samples, 1):
                here = (batch["segment_ids"] == segment) & (np.arange(len(batch["tokens"])) == row)[:, None]
                alone = batch | {"labels": np.where(here, batch["labels"], -100)}
                losses[index] = [float(value) for value in eval_fn(trainable, frozen, alone)]
        found.append((loss, gradients, losses))
    assert max(map(len, packed.rows(0))) >= 3 and packed.epoch_rows(0).sums(lengths.tiles).max() >= 2
    (loss, gradients, losses), (packed_loss, packed_gradients, packed_losses) = found
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for index in range(rows):
        np.testing.assert_allclose(packed_losses[index], losses[index], rtol=1e-5, err_msg=str(index))
    for name, gradient in gradients.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5 * largest, err_msg=name)


def test_rows_that_do_not_split_are_refused():
    config = make_config(batch_rows=6, max_rows_per_device=2)
    layout = Layout(6, 3, 8, image_slots=1, label_slots=1, image_tokens=1, image_size=1)
    with pytest.raises(UserError, match="2 groups, not a multiple of 1 devices x 3 accumulated"):
        builder.accumulation_steps(config, layout, make_mesh({"fsdp": -1}))


def test_packed_rows_have_an_attention_that_knows_segments():
    layout = Layout(4, 1, 8, image_slots=1, label_slots=1, image_tokens=1, image_size=1)
    mesh = make_mesh({"fsdp": 1, "data": 1, "tensor": 1})
    assert builder.step_settings(make_config(pack=True), tiny.config(), layout, mesh).packed
    assert not builder.step_settings(make_config(), tiny.config(), layout, mesh).packed
    with pytest.raises(UserError, match="cudnn attends across the samples of packed rows"):
        builder.step_settings(make_config(pack=True, attention="cudnn"), tiny.config(), layout, mesh)
