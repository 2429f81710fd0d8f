"""Saves and restores the steps of a training run."""

from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from llava_jax.checkpoint.array_store import layer_by_layer
from llava_jax.checkpoint.errors import in_one_line, readable
from llava_jax.checkpoint.format import DIGEST, EMA, PARAMS, STEPS, Description, absolute, digest, finished_steps
from llava_jax.models.llava import Params


class TrainingCheckpoints:
    """The steps of a run, saved asynchronously; the newest `keep` of them are kept."""

    def __init__(self, workdir: epath.Path, description: Description, keep: int):
        self.description = description
        self.directory = absolute(workdir) / STEPS
        self.directory.mkdir(parents=True, exist_ok=True)
        self.checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # does not read the metadata of all steps, which may be damaged
            context=layer_by_layer(),
        )
        self.latest = max(finished_steps(self.directory), default=None)

    def save(
        self, step: int, trainable: Params, optimizer: Any, ema: Params | None = None, *, wait: bool = False
    ) -> None:
        """Blocks until the arrays are copied to the host; with `wait`, until they are on disk."""
        with in_one_line(self.directory, "cannot be written"):
            if self.latest == step:
                self.checkpointer.wait()
                return
            state = _named(trainable, optimizer, ema)
            metadata = self.description.to_json()
            metadata[DIGEST] = digest(metadata)
            self.checkpointer.save_checkpointables_async(step, state, custom_metadata=metadata, force=True)
            self.latest = step
            if wait:
                self.checkpointer.wait()

    def restore(self, step: int, trainable: Any, optimizer: Any, ema: Any = None) -> tuple[Params, Any, Params | None]:
        """Loads a step into trees of ShapeDtypeStructs (with shardings) or arrays of the same structure."""
        self.checkpointer.wait()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None)),
            _named(trainable, optimizer, ema),
        )
        with readable(self.directory / str(step)):
            loaded = ocp.load_checkpointables(self.directory / str(step), abstract)
        return loaded[PARAMS], loaded["optimizer"], loaded.get(EMA)

    def reload(self) -> None:
        """Reads again which steps there are."""
        self.checkpointer.reload()
        self.latest = max(finished_steps(self.directory), default=None)

    def close(self) -> None:
        with in_one_line(self.directory, "cannot be written"):
            self.checkpointer.close()


def _named(trainable: Any, optimizer: Any, ema: Any) -> dict[str, Any]:
    """What a step holds."""
    return {PARAMS: trainable, "optimizer": optimizer} | ({} if ema is None else {EMA: ema})
