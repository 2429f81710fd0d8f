"""The directory of a run: its configuration, which later starts must match, and its data's fingerprint."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from llava_jax.checkpoint import DESCRIPTION, FROZEN, finished_steps
from llava_jax.cli import UserError
from llava_jax.data.plan import Lengths
from llava_jax.data.sources import Source
from llava_jax.metrics import BAD_SAMPLES, METRICS, step_of

# What may differ when a run is resumed, since it cannot change the mathematics.
NEUTRAL = (
    "mesh",
    "model",  # only checked against the checkpoint
    "default_model",
    "data.workers",
    "data.allow_absolute_images",
    "data.on_bad_sample",  # changes nothing of a run that came so far without
    "data.max_bad_share",
    "max_rows_per_device",
    "remat",
    "attention",
    "log_every",
    "eval_every",
    "evaluate.",
    "save_every",
    "keep",
    "profile.",
    "compilation_cache",
    "wandb.",
)
# What a run writes about its model and its steps, before it has done any.
LEFTOVERS = ("checkpoints", "tokenizer", DESCRIPTION, FROZEN, METRICS, BAD_SAMPLES, "tensorboard", "evaluations")


def claim(workdir: epath.Path, config: ConfigDict, data: Mapping[str, Any]) -> None:
    """Makes `workdir` this run's: writes `config.json` and `data.json`, or compares with those that are there.

    `data` is the fingerprint of the data. What a run left that failed before it had done a step is removed, so that the
    configuration can be corrected. Raises UserError naming the differing keys, or if the data is not the data that the
    run was started with.
    """
    files = {"data.json": dict(data), "config.json": config.to_dict()}
    if not workdir.exists() or not any(workdir.iterdir()):
        workdir.mkdir(parents=True, exist_ok=True)
    elif not _is_workdir(workdir):
        raise UserError(f"{workdir}: exists and is not a training workdir; choose another")
    elif _has_trained(workdir):
        _compare(workdir, config, dict(data))
        return
    else:
        _remove_leftovers(workdir)
    for name, values in files.items():
        partial = workdir / f"{name}.partial"
        partial.write_text(json.dumps(values, indent=2) + "\n")
        partial.replace(workdir / name)


def resumes(workdir: epath.Path) -> bool:
    """Whether a run in `workdir` continues from a checkpoint there, which `claim` leaves in its place."""
    checkpoints = workdir / "checkpoints"
    return checkpoints.exists() and bool(finished_steps(checkpoints)) and _is_workdir(workdir) and _has_trained(workdir)


def _is_workdir(workdir: epath.Path) -> bool:
    """Whether a run made it, by `data.json`, the first file that it writes: many directories have a `config.json`."""
    if [entry.name for entry in workdir.iterdir()] == ["data.json.partial"]:
        return True
    if not (workdir / "data.json").exists():
        return False
    data = _read(workdir / "data.json")
    return isinstance(data, dict) and data.keys() == {"samples", "sha256"}


def _has_trained(workdir: epath.Path) -> bool:
    """Whether a step was ever done. Step 0, with its checkpoint and its evaluation, is where a run begins."""
    checkpoints, metrics = workdir / "checkpoints", workdir / METRICS
    if checkpoints.exists() and any(finished_steps(checkpoints)):
        return True
    return metrics.exists() and any(1 <= step_of(line) < math.inf for line in metrics.read_bytes().splitlines())


def _remove_leftovers(workdir: epath.Path) -> None:
    """What a run that has trained nothing wrote about its model and data, which may be others now."""
    for name in LEFTOVERS:
        path = workdir / name
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _compare(workdir: epath.Path, config: ConfigDict, data: dict[str, Any]) -> None:
    wanted = _flat(json.loads(json.dumps(config.to_dict())))  # as the file has it: a list for a tuple
    found = _flat(_read(workdir / "config.json"))
    differing = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    differing = [key for key in differing if not key.startswith(NEUTRAL)]
    if differing:
        changes = ", ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
        raise UserError(f"{workdir} belongs to a run of another configuration ({changes}); choose another workdir")
    if _read(workdir / "data.json") != data:
        raise UserError(
            f"{config.data.json or config.data.built or 'config.data.mixture'}: not the data that {workdir} was "
            "started with (other samples, lengths or labels); put it back or choose another workdir"
        )


def _read(file: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); choose another workdir") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def fingerprint(source: Source, lengths: Lengths) -> dict[str, Any]:
    """What tells this data, as it is tokenized, from other data."""
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part, np.int64).tobytes() for part in lengths))
    digest.update(source.digest.encode())
    return {"samples": len(lengths.tokens), "sha256": digest.hexdigest()}
