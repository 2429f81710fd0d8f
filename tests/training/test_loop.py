"""The train step against torch, and the loop from start to resume."""

import collections
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
import torch_reference as reference
import transformers
from etils import epath

from configs import common
from llava_jax import plot
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.data import build
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import measure
from llava_jax.data.packing import PackedOrder, Room
from llava_jax.data.pipeline import Batches, ImageDecoder
from llava_jax.data.plan import Layout, Order, plan_layout
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.files import lock
from llava_jax.files.lock import hold
from llava_jax.models.execution import REMAT_POLICIES
from llava_jax.models.llava import abstract_params
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, goodput, loop, optim, summary
from llava_jax.training import step as training_step
from llava_jax.training.profiling import Profile

# ------------------------------------------------------------------------------------------------- the step


def make_config(stage: str = "finetune", **changes):
    config = common.get_config()
    config.stage = stage
    config.remat = "none"
    config.update(changes)
    return config


def random_batches(model, count: int, rows: int = 4, length: int = 40, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Rows of different lengths, each with a picture at a different place and a few learned tokens."""
    rng = np.random.default_rng(seed)
    size, P = model.vision.image_size, model.image_tokens
    batches = []
    for _ in range(count):
        batch = {
            "tokens": np.zeros((rows, length), np.int32),
            "labels": np.full((rows, length), -100, np.int32),
            "positions": np.zeros((rows, length), np.int32),
            "segment_ids": np.zeros((rows, length), np.int32),
            "images": rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8),
            "image_feature_index": np.full((rows, length), -1, np.int32),
        }
        for row in range(rows):
            used, start = rng.integers(length - 10, length + 1), rng.integers(1, 5)
            batch["tokens"][row, :used] = rng.integers(1, model.text.vocab_size - 1, used)
            batch["tokens"][row, start : start + P] = 0
            batch["image_feature_index"][row, start : start + P] = np.arange(P)
            batch["positions"][row, :used] = np.arange(used)
            batch["segment_ids"][row, :used] = 1
            learned = rng.integers(start + P + 1, used, 6)
            batch["labels"][row, learned] = batch["tokens"][row, learned]
        batches.append(batch)
    return batches


def settings_for(model, batch, mesh=None, **changes) -> training_step.StepSettings:
    rows, length = batch["tokens"].shape
    slots = batch["images"].shape[1]
    groups = batch["images"].shape[0]
    layout = Layout(
        rows, rows // groups, length, slots, 6 * rows // groups, model.image_tokens, model.vision.image_size
    )
    return training_step.StepSettings(model, layout, mesh or make_mesh({"fsdp": -1}), **changes)


def split_params(params, stage):
    names = optim.trained(params, make_config(stage))
    trainable = {name: jnp.array(params[name]) for name in names}  # copies, since a step donates them
    return trainable, {name: jnp.asarray(value) for name, value in params.items() if name not in trainable}


def torch_losses(module, batches, model, config, steps: int) -> list[float]:
    """Hugging Face's model, torch's AdamW, transformers' cosine schedule, token-weighted loss."""
    module.requires_grad_(False)
    module.model.multi_modal_projector.requires_grad_(True)
    if config.stage == "finetune":
        module.model.language_model.requires_grad_(True)
        module.lm_head.requires_grad_(True)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for projector in (True, False):
        for decayed in (True, False):
            groups.append(
                {
                    "params": [
                        p
                        for name, p in named
                        if ("multi_modal_projector" in name) == projector and (p.ndim > 1) == decayed
                    ],
                    "lr": config.projector_learning_rate if projector else config.learning_rate,
                    "weight_decay": config.weight_decay if decayed else 0.0,
                }
            )
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(config.beta1, config.beta2), eps=1e-8)
    warmup = int(np.ceil(steps * config.warmup_ratio))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    mean, std = torch.tensor(model.image_mean), torch.tensor(model.image_std)
    losses = []
    for batch in batches:
        input_ids = torch.tensor(batch["tokens"], dtype=torch.long)
        input_ids[torch.tensor(batch["image_feature_index"]) >= 0] = module.config.image_token_id
        pixels = ((torch.tensor(batch["images"][:, 0]) / 255 - mean) / std).permute(0, 3, 1, 2)
        mask = torch.tensor(batch["segment_ids"], dtype=torch.long)
        logits = module(input_ids=input_ids, pixel_values=pixels, attention_mask=mask).logits
        labels = torch.tensor(batch["labels"], dtype=torch.long)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_([p for _, p in named], config.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


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
    optimizer = optim.make_optimizer(config, trainable, steps)
    state = builder.init_state(optimizer, trainable, make_mesh({"fsdp": -1}))
    step = jax.jit(lambda state, batch: training_step.train_step(settings, optimizer, state, frozen, batch))
    ours = []
    for batch in batches:
        state, metrics = step(state, batch)
        ours.append(float(metrics["loss"]))
    theirs = torch_losses(module, batches, model, config, steps)
    assert theirs[-1] < theirs[0] - 0.05, "the reference did not learn: equal losses would say little"
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_accumulated_gradients_are_those_of_the_large_batch(stage):
    model = tiny.config()
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


def test_stage_1_computes_no_weight_gradients_of_the_frozen_and_keeps_no_optimizer_state_for_them():
    model = tiny.config(
        text=tiny.TextConfig(tiny.VOCAB, 64, 256, 4, 4, 4, 16), vision=tiny.VisionConfig(64, 256, 4, 4, 16, 8)
    )
    (batch,) = random_batches(model, 1, length=128)
    settings = settings_for(model, batch)
    flops, optimizer_bytes, names = {}, {}, {}
    for stage in ("pretrain", "finetune"):
        trainable, frozen = split_params(tiny.params(model), stage)
        optimizer = optim.make_optimizer(make_config(stage), trainable, 10)
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


def test_remat_changes_nothing():
    model = tiny.config()
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
    model, params = tiny.config(), tiny.params(tiny.config())
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
    assert max(map(len, packed.rows(0))) >= 3 and packed.epoch_rows(0).sums(lengths.images).max() >= 2
    (loss, gradients, losses), (packed_loss, packed_gradients, packed_losses) = found
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for index in range(rows):
        np.testing.assert_allclose(packed_losses[index], losses[index], rtol=1e-5, err_msg=str(index))
    for name, gradient in gradients.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5 * largest, err_msg=name)


# ------------------------------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """A checkpoint and a data set: config.init, config.data.json, config.data.images."""
    directory = tmp_path_factory.mktemp("world")
    model = tiny.checkpoint(directory)
    file, images = tiny.data(directory)
    return {"init": str(model), "json": str(file), "images": str(images)}


def run_config(world, stage: str = "finetune", **changes):
    config = make_config(stage, init=world["init"], max_length=64, batch_rows=4, steps=6, learning_rate=1e-3)
    config.data.json, config.data.images = world["json"], world["images"]
    config.update(changes)
    return config.lock()


def final(workdir) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in open_checkpoint(workdir).load().items()}


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    loop.train(run_config(world), str(workdir))
    return workdir


def assert_same_run(workdir: Path, other: Path) -> None:
    expected = final(other)
    for name, value in final(workdir).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    losses, others = (
        [(m["step"], m.get("loss", m.get("validation_loss"))) for m in metrics(d)] for d in (workdir, other)
    )
    assert losses == others


def test_two_stages_learn_and_describe_themselves(world, tmp_path, capsys):
    stage_1, stage_2 = tmp_path / "stage_1", tmp_path / "stage_2"
    loop.train(run_config(world, "pretrain", template="plain", learning_rate=1e-2), str(stage_1))
    told = capsys.readouterr().err
    assert "trainable  projector 3,936 parameters" in told and "frozen     llm 80,112, vision 32,096" in told
    assert "⟦" in told and "step 6/6" in told
    config = run_config(world, steps=12, init=str(stage_1), eval_every=6)
    with config.unlocked():
        config.data.holdout = 2
    loop.train(config, str(stage_2))
    history = metrics(stage_2)
    losses = [m["loss"] for m in history if "loss" in m]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert [m["step"] for m in history if "validation_loss" in m] == [6, 12]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "images_per_second"} <= history[0].keys()
    assert 0 < history[0]["learned_share"] < 1 and 0 < history[0]["padding_share"] < 1
    assert list((stage_2 / "tensorboard").iterdir())

    source, projector, both = open_checkpoint(world["init"]).load(), final(stage_1), final(stage_2)
    for name, value in source.items():
        part = name.split(".")[0]
        assert np.array_equal(projector[name], value) == (part != "projector"), name
        if part == "vision":
            np.testing.assert_array_equal(both[name], value)
    checkpoint = open_checkpoint(stage_2)
    assert (checkpoint.template, checkpoint.description.stage, checkpoint.step) == ("v1", "finetune", 12)
    # The frozen tower is referred to where it really is, not by way of stage 1.
    assert [source.path for source in checkpoint.description.sources] == [world["init"]]


def test_sigterm_saves_and_leaves_and_the_same_command_resumes_bit_equal(world, uninterrupted, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    count_tokens, calls = loop.count_tokens, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_tokens(*args)

    monkeypatch.setattr(loop, "count_tokens", interrupt)
    with pytest.raises(SystemExit) as left:
        loop.train(run_config(world), str(workdir))
    assert left.value.code == 128 + signal.SIGTERM
    assert open_checkpoint(workdir).step == 3
    monkeypatch.undo()
    loop.train(run_config(world), str(workdir))
    assert_same_run(workdir, uninterrupted)


def test_a_packed_run_reports_its_plan_and_resumes_bit_equal(world, tmp_path, capsys):
    """Stopped in its second epoch."""
    changes = {"pack": True, "row_length": 200, "rows_per_group": 2, "batch_rows": 2, "steps": 0, "epochs": 2.0}
    changes["data"] = {"holdout": 2}
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    loop.train(run_config(world, **changes), str(whole))
    told = capsys.readouterr().err
    assert re.search(r"packing +[2-9]\.\d+ samples a row, \d+ a step; used are \d+\.\d% of positions", told), told
    steps = sum("loss" in m for m in metrics(whole))
    assert f"{steps} steps done" in told and 2 <= steps < 12
    stop_at(steps - 1, run_config(world, **changes), workdir)
    loop.train(run_config(world, **changes), str(workdir))
    assert_same_run(workdir, whole)


def test_a_run_grouped_by_modality_has_steps_without_pictures(world, tmp_path):
    """Three of twelve samples have none: one step of two of them, and the third with what is left of the others."""
    changes = {"group_by_modality": True, "batch_rows": 2, "steps": 6}
    loop.train(run_config(world, **changes), str(tmp_path / "run"))
    images = [m["images_per_second"] for m in metrics(tmp_path / "run")]
    assert len(images) == 6 and images[:5].count(0) == 1 and images[5] > 0


def broken_data(world, directory: Path) -> tuple[str, str]:
    """The data with a damaged and a missing picture, a record that is no sample, and an answer that is cut off."""
    records = json.loads(Path(world["json"]).read_text())
    records[7]["conversations"][0]["value"] = "Say white. " * 40
    del records[3]["conversations"]
    images = Path(shutil.copytree(world["images"], directory / "images"))
    (images / "0.png").write_bytes(b"no picture")
    (images / "5.png").unlink()
    (directory / "data.json").write_text(json.dumps(records))
    return str(directory / "data.json"), str(images)


def test_bad_samples_are_skipped_told_and_not_counted_twice(world, tmp_path, capsys):
    file, images = broken_data(world, tmp_path)
    data = {"on_bad_sample": "skip", "max_bad_share": 0.6, "json": file, "images": images, "holdout": 2}
    changes = {"data": data, "steps": 0, "epochs": 2.0}
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    loop.train(run_config(world, **changes), str(whole))
    told = capsys.readouterr().err
    assert "skipped    sample sample-7: nothing to learn" in told and "sample-0: image" in told
    found = [json.loads(line) for line in (whole / "bad_samples.jsonl").read_text().splitlines()]
    counts = collections.Counter((one["id"], one["part"]) for one in found)
    expected = {("sample-0", "training"): 2, ("sample-5", "training"): 2, ("sample-7", "text"): 1}
    expected[("3", "text")] = 1
    assert counts == expected, "none of them is held out"
    losses = [m for m in metrics(whole) if "loss" in m]
    assert losses[-1]["bad_samples"] == 8 and np.isfinite([m["loss"] for m in losses]).all()
    stop_at(len(losses) - 1, run_config(world, **changes), workdir)
    loop.train(run_config(world, **changes), str(workdir))
    assert_same_run(workdir, whole)
    again = [json.loads(line) for line in (workdir / "bad_samples.jsonl").read_text().splitlines()]
    assert again == found and metrics(workdir)[-2]["bad_samples"] == 8


def test_too_many_bad_samples_stop_a_run_which_can_go_on(world, tmp_path, capsys):
    file, images = broken_data(world, tmp_path)
    data = {"on_bad_sample": "skip", "max_bad_share": 0.2, "json": file, "images": images}
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        loop.train(run_config(world, data=data), str(workdir))
    told = capsys.readouterr().err
    assert left.value.code == 1 and "samples are bad, more than a share of 0.2 of 12; bad_samples.jsonl" in told
    assert isinstance(left.value.__cause__, UserError), "what `llava_jax.train` raises"
    assert 1 <= open_checkpoint(workdir).step < 6
    loop.train(run_config(world, data=data | {"max_bad_share": 0.9}), str(workdir))
    assert metrics(workdir)[-1]["step"] == 6
    data["max_bad_share"] = 0.1
    with pytest.raises(UserError, match="2 of 12 samples have texts with faults, more than data.max_bad_share=0.1"):
        loop.train(run_config(world, data=data), str(tmp_path / "texts"))
    with pytest.raises(UserError, match="no list of turns"):
        loop.train(run_config(world, data={"json": file, "images": images}), str(tmp_path / "strict"))


def test_sigkill_loses_only_what_was_not_saved(world, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    overrides = {
        "init": world["init"],
        "data.json": world["json"],
        "data.images": world["images"],
        "max_length": 64,
        "batch_rows": 4,
        "steps": 100_000,
        "learning_rate": 1e-3,
        "save_every": 2,
        "remat": "none",
        "stage": "finetune",
    }
    command = [sys.executable, "-m", "llava_jax.main", "--config=configs/common.py", f"--workdir={workdir}"]
    process = subprocess.Popen(command + [f"--config.{key}={value}" for key, value in overrides.items()])
    while process.poll() is None and not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = open_checkpoint(workdir).step
    assert step >= 2
    config = run_config(world, steps=100_000, save_every=2)
    killed = final(workdir)
    reference_run = tmp_path / "reference"
    stop_at(step, config, reference_run)
    for name, value in final(reference_run).items():
        np.testing.assert_array_equal(killed[name], value, err_msg=name)
    stop_at(step + 3, config, workdir)
    stop_at(step + 3, config, reference_run)
    assert_same_run(workdir, reference_run)


def test_a_signal_to_the_whole_group_leaves_the_readers_to_the_run(world, tmp_path):
    """As terminals and launchers send it."""
    workdir = tmp_path / "run"
    config = run_config(world, steps=100_000)
    overrides = {"max_length": 64, "batch_rows": 4, "steps": 100_000, "data.workers": 1, "stage": "finetune"}
    overrides |= {"init": config.init, "data.json": config.data.json, "data.images": config.data.images}
    command = [sys.executable, "-m", "llava_jax.main", "--config=configs/common.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "stopped by SIGTERM" in told and "Traceback" not in told
    assert open_checkpoint(workdir).step >= 1


def stop_at(step: int, config, workdir: Path) -> None:
    """Runs until `step` is done, as if a signal came then."""
    count_tokens = loop.count_tokens
    started = open_checkpoint(workdir).step if (workdir / "checkpoints").exists() else 0
    calls = []

    def interrupt(*args):
        calls.append(1)
        if started + len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_tokens(*args)

    loop.count_tokens = interrupt
    try:
        with pytest.raises(SystemExit):
            loop.train(config, str(workdir))
    finally:
        loop.count_tokens = count_tokens


def test_an_evaluation_that_was_cut_off_is_made_up_for(world, tmp_path):
    """By a signal at step 2, which is saved first, and by a crash after the last step was saved."""
    config = run_config(world, steps=4, eval_every=2)
    config.data.holdout = 2
    for name in ("whole", "stopped"):
        if name == "stopped":
            stop_at(2, config, tmp_path / name)
            assert [line for line in metrics(tmp_path / name) if "validation_loss" in line] == []
        loop.train(config, str(tmp_path / name))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    file = tmp_path / "stopped" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert "validation_loss" in lines[-1]
    for kept in (lines[:-1], lines):  # written by the crash or not
        file.write_text("".join(kept))
        loop.train(config, str(tmp_path / "stopped"))
        assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(world, uninterrupted):
    before = final(uninterrupted)
    loop.train(run_config(world), str(uninterrupted))
    for name, value in final(uninterrupted).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_run_accounts_for_its_time_and_writes_a_profile(world, tmp_path, capsys):
    config = run_config(world)
    with config.unlocked():
        config.profile = {"start": 2, "steps": 2}
        config.data.holdout = 2
    stop_at(3, config, tmp_path / "run")
    loop.train(config, str(tmp_path / "run"))
    account = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert (account["starts"], account["step"], account["steps_done"], account["steps_repeated"]) == (2, 6, 6, 0)
    assert all(account["seconds"][kind] > 0 for kind in goodput.KINDS)
    assert "in 2 starts: " in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "profile" / "plugins" / "profile").iterdir())) == 1


def test_the_seconds_of_a_step_are_those_of_the_step(world, tmp_path, monkeypatch):
    """By a clock on which compiling, saving, evaluating and tracing take a thousand seconds each time."""
    late, clock = [], time.monotonic
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(monotonic=lambda: clock() + 1000 * len(late)))

    def delayed(owner, name: str) -> None:
        function = getattr(owner, name)

        def slow(*arguments, **options):
            late.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    delayed(loop.TrainingCheckpoints, "save")
    delayed(Profile, "close")
    delayed(jax.profiler, "start_trace")
    delayed(jax.stages.Lowered, "compile")
    delayed(builder, "eval_step")  # traced once
    config = run_config(world, save_every=2, eval_every=3)
    with config.unlocked():
        config.profile = {"start": 2, "steps": 1}
        config.data.holdout = 2
    loop.train(config, str(tmp_path / "run"))
    assert {"save", "close", "start_trace", "compile", "eval_step"} == set(late)
    seconds = [m["seconds"] for m in metrics(tmp_path / "run") if "seconds" in m]
    assert len(seconds) == 6 and all(0 < value < 1000 for value in seconds)
    account = json.loads((tmp_path / "run" / "goodput.json").read_text())["seconds"]
    assert account["step"] < 1000 and account["data"] < 1000 and account["profile"] >= 2000


def test_a_resumed_run_takes_the_memory_of_a_fresh_one(tmp_path):
    """Of a hundred million parameters, in processes of their own: nothing but the state and what is frozen is alive,
    and at no time is there a second state, or the trainable weights of the source, beside it."""
    text = tiny.TextConfig(tiny.VOCAB, 1024, 4096, 6, 8, 8, 128)
    init = tiny.checkpoint(tmp_path, tiny.config(text=text))
    file, images = tiny.data(tmp_path)
    config = {"stage": "finetune", "init": str(init), "data.json": str(file), "data.images": str(images)}
    config |= {"max_length": 64, "batch_rows": 2, "steps": 2, "remat": "none", "keep": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = abstract_params(tiny.config(text=text))
    frozen = sum(4 * leaf.size for name, leaf in shapes.items() if name.startswith("vision."))
    trainable = sum(4 * leaf.size for leaf in shapes.values()) - frozen
    assert trainable > 4e8
    runs = []
    for stop in ("1", "0"):
        command = [
            sys.executable,
            "-m",
            "tests.support.run_memory",
            str(tmp_path / "config.json"),
            str(tmp_path / "run"),
            stop,
        ]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert run.returncode == 0, run.stderr
        runs.append(json.loads(run.stdout.splitlines()[-1]))
    fresh, resumed = runs
    assert resumed["live"] == fresh["live"] and len(fresh["live"]) == 1
    assert fresh["live"][0] == pytest.approx(3 * trainable + frozen, rel=1e-3)
    assert resumed["donated"] == fresh["donated"] == [1.0]
    # As the system counts it, which differed by up to 0.6 of the weights from run to run; a copy would be all of them.
    assert resumed["peak"] < fresh["peak"] + 0.75 * trainable


def test_another_config_is_refused_with_the_differing_keys(world, uninterrupted, tmp_path):
    with pytest.raises(UserError, match="learning_rate: 0.001 there, 0.002 now"):
        loop.train(run_config(world, learning_rate=2e-3), str(uninterrupted))
    neutral = run_config(world, save_every=7, log_every=3, compilation_cache=str(tmp_path / "cache"))
    with neutral.unlocked():
        neutral.profile.steps = 1
    loop.train(neutral, str(uninterrupted))  # changes no number


def test_other_data_is_refused(world, uninterrupted):
    samples = json.loads(Path(world["json"]).read_text())
    samples[0]["conversations"][1]["value"] += " It is very much so."
    original = Path(world["json"]).read_text()
    try:
        Path(world["json"]).write_text(json.dumps(samples))
        with pytest.raises(UserError, match="not the data that"):
            loop.train(run_config(world), str(uninterrupted))
    finally:
        Path(world["json"]).write_text(original)


def test_other_data_of_equal_lengths_is_refused(world, uninterrupted):
    original = Path(world["json"]).read_text()
    try:
        Path(world["json"]).write_text(original.replace('"sample-0"', '"sample-X"'))
        assert Path(world["json"]).read_text() != original
        with pytest.raises(UserError, match="not the data that"):
            loop.train(run_config(world), str(uninterrupted))
    finally:
        Path(world["json"]).write_text(original)


def test_built_shards_train_as_the_json_does_and_a_mixture_resumes(world, uninterrupted, tmp_path):
    built = str(tmp_path / "built")
    build.main(["--json", world["json"], "--images", world["images"], "--output", built, "--shards", "2"])
    config = run_config({**world, "json": "", "images": ""})
    with config.unlocked():
        config.data.built = built
    loop.train(config, str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)
    with config.unlocked():
        config.data.built = ""
        config.data.mixture = ({"json": world["json"], "images": world["images"]}, {"built": built, "weight": 0.5})
        config.save_every = 3
    loop.train(config, str(tmp_path / "mixture"))
    shutil.copytree(tmp_path / "mixture", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    loop.train(config, str(tmp_path / "resumed"))
    assert_same_run(tmp_path / "resumed", tmp_path / "mixture")
    with config.unlocked():
        config.data.mixture = config.data.mixture[:1]
    with pytest.raises(UserError, match="data.mixture: "):
        loop.train(config, str(tmp_path / "mixture"))


def test_a_run_that_failed_before_its_first_step_can_be_corrected(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="no such folder of images"):
        loop.train(run_config({**world, "images": str(tmp_path / "nowhere")}), str(workdir))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"sample sample-\d+: .*empty"):
        loop.train(run_config({**world, "images": str(tmp_path / "empty")}), str(workdir))
    loop.train(run_config(world, steps=1), str(workdir))
    assert open_checkpoint(workdir).step == 1


def test_a_run_that_failed_in_its_first_step_can_be_corrected(world, tmp_path, monkeypatch):
    """With another checkpoint, of which nothing of the first one is left; after a step it is too late for that."""
    workdir, other = tmp_path / "run", tmp_path / "other"
    tiny.checkpoint(other, template="plain")
    (other / "model" / "tokenizer" / "special.txt").write_text("")
    first = run_config(world, learning_rate=2e-3, init=str(other / "model"))
    with monkeypatch.context() as patch:
        poison(patch, 1)
        with pytest.raises(UserError, match="step 1: loss nan"):
            loop.train(first, str(workdir))
    assert (workdir / "tokenizer" / "special.txt").exists() and open_checkpoint(workdir).step == 0
    loop.train(run_config(world), str(tmp_path / "reference"))
    loop.train(run_config(world), str(workdir))
    assert_same_run(workdir, tmp_path / "reference")
    assert not (workdir / "tokenizer" / "special.txt").exists()
    assert open_checkpoint(workdir).description.sources[0].path == world["init"]
    with pytest.raises(UserError, match="belongs to a run of another configuration .*learning_rate"):
        loop.train(first, str(workdir))


def test_a_line_that_a_crash_cut_off_is_no_step(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 1)
        with pytest.raises(UserError, match="step 1: loss nan"):
            loop.train(run_config(world, learning_rate=2e-3), str(workdir))
    (workdir / "metrics.jsonl").write_text('{"step": 0, "pope/accuracy": 1.0}\n{"step": 1, "lo')
    loop.train(run_config(world), str(workdir))
    assert [m["step"] for m in metrics(workdir)] == list(range(1, 7))


def test_a_damaged_workdir_is_an_error_of_one_line(world, uninterrupted, tmp_path):
    workdir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: damaged"):
        loop.train(run_config(world), str(workdir))


def test_a_long_first_sample_is_shown_as_it_is_cut(world, capsys):
    tokenizer = load_tokenizer(open_checkpoint(world["init"]).tokenizer_dir)
    sample = LlavaJson(world["json"])[0]
    whole = TextEncoder(get_template("v1"), tokenizer, image_tokens=4, max_length=64)
    length = len(whole(sample).tokens)
    summary.show_first_sample(sample, dataclasses.replace(whole, max_length=length - 1))
    told = capsys.readouterr().err
    assert f"sample-0, cut to {length - 4} of {length - 3} tokens" in told and "⟦ It is red.⟧" in told
    summary.show_first_sample(sample, whole)
    told = capsys.readouterr().err
    assert "cut" not in told and "⟦ It is red.</s>⟧" in told


def test_a_run_renders_system_prompts_and_warns_of_moved_images(world, tmp_path, capsys):
    question = {"role": "user", "content": "Source: <image>\nTarget: <image>"}
    record = {"images": ["0.png", "1.png"], "system": "Be brief.", "messages": [question, {"role": "assistant"}]}
    record["messages"][1]["content"] = "red"
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": str(i)} | record for i in range(4)]), "utf-16")
    loop.train(run_config(world | {"json": str(data)}, steps=1), str(tmp_path / "run"))
    told = capsys.readouterr().err
    assert "warning: 4 samples, 0 the first, have text between the images of a turn" in told
    assert "<s>Be brief. USER: <image>\n<image>\nSource: \nTarget: ASSISTANT:" in told and "red</s>⟧" in told


def test_a_directory_of_something_else_is_refused(world, tmp_path):
    for name, text in (("thesis.tex", ""), ("config.json", '{"model_type": "llava"}'), ("data.json", "[]")):
        directory = tmp_path / name.partition(".")[0]
        directory.mkdir()
        (directory / name).write_text(text)
        with pytest.raises(UserError, match="not a training workdir"):
            loop.train(run_config(world), str(directory))
        assert (directory / name).read_text() == text


def poison(monkeypatch, step: int) -> None:
    """The loss of this step is NaN."""

    def poisoned(settings, optimizer, state, frozen, batch):
        state, values = train_step(settings, optimizer, state, frozen, batch)
        return state, values | {"loss": jnp.where(state.step == step, jnp.nan, values["loss"])}

    train_step = training_step.train_step
    monkeypatch.setattr(builder, "train_step", poisoned)


def test_nan_stops_with_the_step_and_its_samples_and_saves_nothing(world, tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with pytest.raises(UserError, match=r"step 3: loss nan.*sample-\d+, sample-\d+"):
        loop.train(run_config(world, save_every=3), str(tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").step == 0


def test_a_path_that_cannot_be_written_fails_before_the_first_step(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        loop.train(run_config(world), str(tmp_path / "file" / "run"))


def test_another_template_than_that_of_an_earlier_finetuning_warns(world, uninterrupted, tmp_path, capsys):
    for template, warns in (("llava_v1", True), ("v1", False)):
        loop.train(run_config(world, init=str(uninterrupted), template=template, steps=1), str(tmp_path / template))
        assert ("was made with template v1, not llava_v1" in capsys.readouterr().err) is warns


def test_where_images_stood_is_stored_and_told_where_it_changes(world, uninterrupted, tmp_path, capsys):
    assert open_checkpoint(uninterrupted).config.image_position == "first"
    loop.train(run_config(world, init=str(uninterrupted), image_position="as_is", steps=1), str(tmp_path / "a"))
    assert "was trained with image_position first, not as_is" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "a").config.image_position == "as_is"
    loop.train(run_config(world, init=str(tmp_path / "a"), image_position="as_is", steps=1), str(tmp_path / "b"))
    assert "image_position" not in capsys.readouterr().err


def test_a_preset_of_other_sizes_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"is not a llava-v1.5-7b .*hidden_size 48, not 4096.*give --config.model= to"):
        loop.train(run_config(world, model="llava-v1.5-7b"), str(tmp_path / "run"))


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


# -------------------------------------------------------------------------------------------- damage and going back


@pytest.fixture(scope="module")
def six_steps(world, tmp_path_factory) -> Path:
    """A run that kept every step."""
    workdir = tmp_path_factory.mktemp("six") / "run"
    loop.train(run_config(world, save_every=1, keep=9), str(workdir))
    return workdir


def copied(workdir: Path, target: Path) -> Path:
    return Path(shutil.copytree(workdir, target))


def flip_bits(file: Path, seed: int = 0) -> None:
    """Eight bits, anywhere."""
    data = bytearray(file.read_bytes())
    for place in np.random.default_rng(seed).choice(8 * len(data), 8, replace=False):
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def data_file(step: Path, part: str) -> Path:
    """The file with the arrays of a step's `params` or `optimizer`."""
    return max((step / part).glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


DAMAGES = {
    "metadata cut": (lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 200), "_CHECKPOINT_METADATA is cut off"),
    "metadata gone": (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is cut off"),
    "metadata of zeros": (lambda step: (step / "_CHECKPOINT_METADATA").write_bytes(bytes(99)), "is cut off"),
    "a list for metadata": (lambda step: (step / "_CHECKPOINT_METADATA").write_text("[1]"), "must be a dictionary"),
    "another model": (
        lambda step: (step / "_CHECKPOINT_METADATA").write_text(
            (step / "_CHECKPOINT_METADATA").read_text().replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0')
        ),
        "altered",
    ),
    "empty": (lambda step: [shutil.rmtree(step), step.mkdir()], "_CHECKPOINT_METADATA is cut off"),
    "no params": (lambda step: shutil.rmtree(step / "params"), "params"),
    "no optimizer": (lambda step: shutil.rmtree(step / "optimizer"), "optimizer"),
    "manifest cut": (lambda step: os.truncate(step / "optimizer" / "manifest.ocdbt", 20), "does not match actual"),
    "no manifest": (lambda step: (step / "optimizer" / "manifest.ocdbt").unlink(), "does not exist"),
    "no tree": (lambda step: (step / "optimizer" / "_METADATA").unlink(), "_METADATA"),
    "half a tree": (lambda step: os.truncate(step / "optimizer" / "_METADATA", 99), "JSONDecodeError"),
    "no data": (lambda step: os.truncate(data_file(step, "params"), 0), "is not valid for value of size 0"),
    "half the data": (
        lambda step: os.truncate(data_file(step, "optimizer"), 5000),
        "for value of size 5000",
    ),
    "data gone": (lambda step: data_file(step, "optimizer").unlink(), "projector|llm"),
    "bits of params": (lambda step: flip_bits(data_file(step, "params")), "(projector|llm)[.a-z_0-9]+: "),
    "bits of the optimizer": (lambda step: flip_bits(data_file(step, "optimizer")), "(projector|llm)[.a-z_0-9]+: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_is_named_with_the_one_before_it(damage, world, six_steps, tmp_path):
    workdir = copied(six_steps, tmp_path / "run")
    spoil, why = DAMAGES[damage]
    spoil(workdir / "checkpoints" / "6")
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as raised:
        loop.train(run_config(world, save_every=1, keep=9), str(workdir))
    said = str(raised.value)
    assert said.startswith(f"{workdir}/checkpoints/6: this step is damaged (") and re.search(why, said)
    assert said.endswith(f"with --resume-from 5, or give other commands {workdir}/checkpoints/5") and "\n" not in said
    assert {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()} == before


def test_a_run_goes_back_to_a_step_that_is_asked_for_once(world, six_steps, tmp_path, capsys):
    """Bit-equal, with every line once; what was newer is kept. Repeated, as launchers do, it does not go back again."""
    workdir = copied(six_steps, tmp_path / "run")
    os.truncate(workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA", 200)
    flip_bits(data_file(workdir / "checkpoints" / "5", "optimizer"))
    log = (workdir / "metrics.jsonl").read_bytes()
    config = run_config(world, save_every=1, keep=9)
    with pytest.raises(UserError, match="checkpoints/5: this step is damaged .* with --resume-from 4"):
        loop.train(config, str(workdir), 5)
    assert (workdir / "checkpoints" / "6").exists() and (workdir / "metrics.jsonl").read_bytes() == log
    loop.train(config, str(workdir), 4)
    told = capsys.readouterr().err
    assert f"resumes from step 4: moved steps 5, 6 to {workdir}/set_aside/after_4" in told
    assert "resuming after step 4" in told
    assert_same_run(workdir, six_steps)
    aside = workdir / "set_aside" / "after_4"
    assert (aside / "metrics.jsonl").read_bytes() == log and (aside / "6" / "params").exists()
    longer = run_config(world, save_every=1, keep=9)
    loop.train(longer, str(workdir), 4)
    assert "was followed by an earlier start: resumes from the newest step, 6" in capsys.readouterr().err
    assert_same_run(workdir, six_steps)


def test_a_run_goes_back_from_whole_steps_too(world, six_steps, tmp_path):
    workdir = copied(six_steps, tmp_path / "run")
    loop.train(run_config(world, save_every=1, keep=2), str(workdir), 2)
    assert_same_run(workdir, six_steps)
    assert sorted(step.name for step in (workdir / "checkpoints").iterdir()) == ["5", "6"]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(world, six_steps, tmp_path):
    config = run_config(world, save_every=1, keep=9)
    with pytest.raises(UserError, match="has no step 7: the steps there are 0, 1, 2, 3, 4, 5, 6$"):
        loop.train(config, str(six_steps), 7)
    with pytest.raises(UserError, match="has no step to resume from: leave --resume-from out"):
        loop.train(config, str(tmp_path / "new"), 1)
    with pytest.raises(UserError, match="no such checkpoint: the steps there are 0, 1"):
        open_checkpoint(six_steps / "checkpoints" / "7")


def test_any_eight_bits_of_a_data_file_are_an_error_or_change_nothing(six_steps, tmp_path):
    """Nothing else: bytes that no array needs are left where a step was written."""
    workdir = copied(six_steps, tmp_path / "run")
    expected, errors = final(six_steps), 0
    file = data_file(workdir / "checkpoints" / "6", "params")
    whole = file.read_bytes()
    for seed in range(30):
        flip_bits(file, seed)
        try:
            for name, value in final(workdir).items():
                np.testing.assert_array_equal(value, expected[name], err_msg=name)
        except UserError:
            errors += 1
        file.write_bytes(whole)
    assert errors >= 29


def test_a_second_start_in_a_workdir_is_refused_and_leaves_all_as_it_is(world, six_steps, tmp_path):
    workdir = copied(six_steps, tmp_path / "run")
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    with hold(epath.Path(workdir)):
        with pytest.raises(UserError, match=f"{workdir}: is in use by another process .{os.getpid()} on "):
            loop.train(run_config(world, save_every=1, keep=9, steps=6), str(workdir))
        open_checkpoint(workdir).load()  # whoever only reads does
        plot.plot([str(workdir)], tmp_path / "loss.png")
    assert {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()} == before


def test_a_run_that_was_frozen_until_another_took_its_workdir_writes_nothing_more(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    count_tokens, seen, before = loop.count_tokens, [], {}

    def freeze(*args):
        if len(seen) == 2:
            text = lock._describe("another boot") | {"host": "elsewhere", "pid": 7}
            (workdir / lock.LOCK).write_text(json.dumps(text))
            before.update({file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()})
            monkeypatch.setattr(lock, "EXPIRY", -1)  # as if all of that time had gone by
        seen.append(1)
        return count_tokens(*args)

    monkeypatch.setattr(loop, "count_tokens", freeze)
    with pytest.raises(UserError, match="was taken over by another process .7 on elsewhere .*writes nothing more"):
        loop.train(run_config(world), str(workdir))
    for file in workdir.rglob("*"):
        if file.is_file() and "tensorboard" not in file.parts:
            assert before.pop(file) == file.read_bytes(), file
    assert all("tensorboard" in file.parts for file in before)
    assert [m["step"] for m in metrics(workdir)] == [1, 2]


def test_callbacks_get_the_metrics_of_every_logged_step_in_a_thread_too(world, tmp_path):
    """As a notebook may call it. What they get is what `metrics.jsonl` gets."""
    config = run_config(world, steps=5, log_every=2, eval_every=4)
    config.data.holdout = 2
    workdir, called = tmp_path / "run", []
    callbacks = [lambda step, values: called.append({"step": step} | values)] * 2
    thread = threading.Thread(target=loop.train, args=(config, str(workdir)), kwargs={"callbacks": callbacks})
    thread.start()
    thread.join()
    assert called[::2] == called[1::2] == metrics(workdir)
    assert [(line["step"], "loss" in line) for line in called[::2]] == [
        (2, True), (4, True), (4, False), (5, True), (5, False)
    ]  # fmt: skip


def test_an_error_of_a_callback_ends_the_run_which_resumes(world, uninterrupted, tmp_path):
    def fail(step, values):
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        loop.train(run_config(world), str(tmp_path / "run"), callbacks=[fail])
    loop.train(run_config(world), str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)
