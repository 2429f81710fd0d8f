"""Data and runs that several tests of training start from."""

from pathlib import Path

import pytest
import tiny
from training_runs import run_config

from llava_jax.training import loop


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """A checkpoint and a data set: config.init, config.data.json, config.data.images."""
    directory = tmp_path_factory.mktemp("world")
    model = tiny.checkpoint(directory)
    file, images = tiny.data(directory)
    return {"init": str(model), "json": str(file), "images": str(images)}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    loop.train(run_config(world), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def six_steps(world, tmp_path_factory) -> Path:
    """A run that kept every step."""
    workdir = tmp_path_factory.mktemp("six") / "run"
    loop.train(run_config(world, save_every=1, keep=9), str(workdir))
    return workdir
