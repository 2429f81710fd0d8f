"""Weights & Biases, for runs that ask for it."""

import hashlib
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict


def start(config: ConfigDict, workdir: epath.Path) -> Any | None:
    """The `wandb.Run` of this workdir, which a resume continues; None if `config.wandb.project` is empty.

    W&B's environment variables work: with WANDB_MODE=offline everything stays on disk, for `wandb sync`.
    """
    if not config.wandb.project or jax.process_index() != 0:
        return None
    import wandb  # an extra, and slow to import

    place = str(workdir) if "://" in str(workdir) else str(workdir.resolve())
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity or None,
        name=config.wandb.name or workdir.name,
        id=hashlib.sha256(place.encode()).hexdigest()[:16],
        resume="allow",
        config=config.to_dict(),
        dir=None if "://" in place else place,
    )
