"""A whole run: `llava_jax.train`, and what it shares with the command."""

import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from llava_jax import plot, remote
from llava_jax.cli import UserError
from llava_jax.parallel import distributed
from llava_jax.recipes import get_config as get_config  # public, see llava_jax/__init__.py
from llava_jax.recipes import own_copy
from llava_jax.training import loop
from llava_jax.training.report import Callback


def train(
    config: ConfigDict | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    resume_from: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Trains one stage, as `llava train` does. Called again with the same arguments it resumes.

    ```python
    config = llava_jax.get_config("finetune:7b")
    config.init, config.data.json, config.data.images = "runs/pretrain", "data.json", "images"
    llava_jax.train(config, "runs/finetune", callbacks=[lambda step, metrics: print(step, metrics)])
    ```

    Runs on all devices of this process; for several hosts there is the command (docs/hosts.md).

    Args:
      config: see `get_config`, or the name or the file of a recipe.
      workdir: a directory, local or on an object store (gs://), for checkpoints, metrics, logs and `loss.png`.
      resume_from: the step to resume from; by default the newest one.
      callbacks: each is called with a step and its metrics, as `metrics.jsonl` has them: for every logged step, once
        its loss is known to be finite, and for every validation loss and benchmark score.

    Raises:
      UserError: options, data or checkpoint have a mistake, which is found before the first step wherever possible, or
        another process trains in that workdir.
      KeyboardInterrupt: the run was interrupted (Ctrl-C, or "interrupt the kernel"). The step that it had begun is done
        and saved.
    """
    config = own_copy(config)
    workdir = os.path.expanduser(os.fspath(workdir))
    remote.name(workdir, config.init)
    try:
        train_and_plot(config, workdir, resume_from, callbacks)
    except distributed.ExitTogether as exit_:
        if exit_.code > 128:
            raise KeyboardInterrupt(f"{workdir}: interrupted; called again, training resumes") from None
        raise exit_.__cause__ or UserError(f"{workdir}: training stopped") from None


def train_and_plot(
    config: ConfigDict, workdir: str, resume_from: int | None, callbacks: Sequence[Callback] = ()
) -> None:
    loop.train(config, workdir, resume_from, callbacks=callbacks)
    if distributed.is_first():
        plot.plot_own(workdir)
