"""A small training run's checkpoints."""

import optax
from etils import epath

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints


def trained(tmp_path, model_dir, steps=(0, 2, 4), keep=2):
    source = open_checkpoint(model_dir)
    workdir = epath.Path(tmp_path / "run")
    trainable = {name: value + 1 for name, value in source.load().items() if name.startswith("projector.")}
    frozen = [name for name in source.abstract() if name not in trainable]
    description = Description(source.config, "plain", sources=source.sources_of(frozen, workdir), stage="pretrain")
    checkpoints = TrainingCheckpoints(workdir, description, keep)
    optimizer = optax.adamw(1e-3).init(trainable)
    for step in steps:
        checkpoints.save(step, trainable, optimizer)
    return checkpoints, workdir, trainable, optimizer
