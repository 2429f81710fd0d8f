"""Shared by tests of training: configurations, random batches, torch's losses, runs that are stopped and compared."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.data.plan import Layout
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import loop, optim
from llava_jax.training import step as training_step


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


def run_config(world, stage: str = "finetune", **changes):
    config = make_config(stage, init=world["init"], max_length=64, batch_rows=4, steps=6, learning_rate=1e-3)
    config.data.json, config.data.images = world["json"], world["images"]
    config.update(changes)
    return config.lock()


def final(workdir) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in open_checkpoint(workdir).load().items()}


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(workdir: Path, other: Path) -> None:
    expected = final(other)
    for name, value in final(workdir).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    losses, others = (
        [(m["step"], m.get("loss", m.get("validation_loss"))) for m in metrics(d)] for d in (workdir, other)
    )
    assert losses == others


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


def copied(workdir: Path, target: Path) -> Path:
    return Path(shutil.copytree(workdir, target))
