"""For the examples of docs/extending.md: a tiny model with something new in it, trained, exported, imported again."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tiny

from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.convert.__main__ import main as convert
from llava_jax.models.config import LlavaConfig
from llava_jax.recipes import common
from llava_jax.training.loop import train


def train_a_step(model: LlavaConfig, directory: Path) -> Checkpoint:
    """One step of stage 2 from fresh parameters, on four samples with and without images."""
    data, images = tiny.data(directory, samples=4)
    config = common.get_config()
    config.update(stage="finetune", init=str(tiny.checkpoint(directory, model)), steps=1, batch_rows=4, max_length=128)
    config.data.update(json=str(data), images=str(images))
    config.mesh.fsdp = jax.device_count()
    train(config, str(directory / "run"))
    return open_checkpoint(directory / "run")


def export_and_import(checkpoint: Checkpoint, directory: Path, *flags: str) -> Checkpoint:
    """Through transformers' files; asserts that configuration and weights come back the same, bit for bit."""
    convert(["export", "--checkpoint", str(checkpoint.root), "--output", str(directory / "hf")])
    convert(["import", "--llava", str(directory / "hf"), "--output", str(directory / "again"), *flags])
    again = open_checkpoint(directory / "again")
    rows = again.config.text.vocab_size  # an export has rows for <image> and <pad>
    text = dataclasses.replace(checkpoint.config.text, vocab_size=rows)
    assert again.config == dataclasses.replace(checkpoint.config, text=text)
    weights, expected = again.load(), checkpoint.load()
    for name, value in expected.items():
        found = np.asarray(weights[name])
        if name == "llm.lm_head.kernel":
            found = found[:, : value.shape[1]]
        elif name == "llm.embed_tokens.embedding":
            found = found[: value.shape[0]]
        np.testing.assert_array_equal(found, np.asarray(value), err_msg=name)
    return again
