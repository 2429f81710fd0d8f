"""The directory of a run: its configuration and the fingerprint of its data, which a resume must match."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from llava_jax.checkpoint.format import DESCRIPTION, FROZEN, STEPS, finished_steps
from llava_jax.cli import UserError, say
from llava_jax.data.plan import Lengths
from llava_jax.data.sources import Source
from llava_jax.files.lock import entries
from llava_jax.files.reading import read_json, read_object, require_regular
from llava_jax.files.writing import atomic_file, write_json
from llava_jax.recipes.common import OPTIONS, get_config
from llava_jax.recipes.options import flatten
from llava_jax.training.metrics import BAD_SAMPLES, METRICS, step_of

# What a run writes about its model and its steps, also before its first step.
LEFTOVERS = (STEPS, "tokenizer", DESCRIPTION, FROZEN, METRICS, BAD_SAMPLES, "tensorboard", "evaluations")


def claim(workdir: epath.Path, config: ConfigDict, data: Mapping[str, Any]) -> None:
    """Writes `config.json` and `data.json` (the fingerprint `data`) or, on a resume, compares with them.

    Files of a run that failed before its first step are removed, so that its configuration can be corrected. Raises
    UserError that names the differing keys, or if the run was started with other data.
    """
    files = {"data.json": dict(data), "config.json": config.to_dict()}
    if not entries(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    elif not _is_workdir(workdir):
        raise UserError(f"{workdir}: exists and is not a training workdir; choose another")
    elif _has_trained(workdir):
        _compare(workdir, config, dict(data))
        return
    else:
        _remove_leftovers(workdir)
    for name, values in files.items():
        write_json(workdir / name, values)


def resumes(workdir: epath.Path) -> bool:
    """Whether a run in `workdir` resumes from a checkpoint there."""
    return bool(finished_steps(workdir / STEPS)) and _is_workdir(workdir) and _has_trained(workdir)


def start_step(workdir: epath.Path, resume_from: int | None, verbose: bool = True) -> int:
    """The step to resume from: `resume_from` the first time that it is asked for, else the newest.

    Launchers repeat a command after a preemption, which must not go back a second time. With `verbose` that is printed.
    """
    newest = finished_steps(workdir / STEPS)[-1]
    if resume_from is None:
        return newest
    if (_aside(workdir, resume_from) / METRICS).exists():
        if verbose:
            say(
                f"--resume-from {resume_from} was followed by an earlier start: resumes from the newest step, {newest} "
                f"(to go back once more, move {_aside(workdir, resume_from)} elsewhere)",
                file=sys.stderr,
            )
        return newest
    return resume_from


def set_aside(workdir: epath.Path, step: int) -> None:
    """Moves the checkpoints after `step` to `set_aside/after_STEP`, with a copy of the logs."""
    newer, aside = [each for each in finished_steps(workdir / STEPS) if each > step], _aside(workdir, step)
    if not newer and not aside.exists() or (aside / METRICS).exists():
        return
    aside.mkdir(parents=True, exist_ok=True)
    _copy_log(workdir / BAD_SAMPLES, aside)
    for each in reversed(newer):  # the newest first, so that a crash leaves no gap
        (workdir / STEPS / str(each)).rename(aside / str(each))
    _copy_log(workdir / METRICS, aside)  # last: it marks the end
    moved = f"step{'s' * (len(newer) > 1)} {', '.join(map(str, newer))}"
    say(f"resumes from step {step}: moved {moved} to {aside}; delete them when you don't need them", file=sys.stderr)


def _copy_log(file: epath.Path, directory: epath.Path) -> None:
    with atomic_file(directory / file.name) as copy:
        copy.write(file.read_bytes() if file.exists() else b"")


def _aside(workdir: epath.Path, step: int) -> epath.Path:
    return workdir / "set_aside" / f"after_{step}"


def _is_workdir(workdir: epath.Path) -> bool:
    """Whether a run created it: its first file is `data.json`, while many directories have a `config.json`."""
    if all(entry.match("data.json.*partial") for entry in entries(workdir)):
        return True  # a run was interrupted while it wrote that file
    if not (workdir / "data.json").exists():
        return False
    data = _read(workdir / "data.json")
    return isinstance(data, dict) and data.keys() == {"samples", "sha256"}


def _has_trained(workdir: epath.Path) -> bool:
    """Whether a run has done a step; it may have saved and evaluated step 0 before."""
    metrics = workdir / METRICS
    if any(finished_steps(workdir / STEPS)):
        return True
    if not metrics.exists():
        return False
    require_regular(metrics)
    return any(1 <= step_of(line) < math.inf for line in metrics.read_bytes().splitlines())


def _remove_leftovers(workdir: epath.Path) -> None:
    """Removes what a run wrote that failed before its first step: its model and data may be others now."""
    for name in LEFTOVERS:
        path = workdir / name
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


def _compare(workdir: epath.Path, config: ConfigDict, data: dict[str, Any]) -> None:
    written = dict(flatten(_read(workdir / "config.json", read_object)))
    found = _as_json(get_config()) | written  # options newer than the run: it did what is now the default
    wanted = _as_json(config)
    differing = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    differing = [key for key in differing if key not in OPTIONS or not OPTIONS[key].changeable]
    if differing:
        changes = ", ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
        raise UserError(f"{workdir} belongs to a run of another configuration ({changes}); choose another workdir")
    if _read(workdir / "data.json") != data:
        raise UserError(
            f"{config.data.json or config.data.built or 'config.data.mixture'}: not the data that {workdir} was "
            "started with (other samples, lengths or labels); put it back or choose another workdir"
        )


def _read(file: epath.Path, read: Callable[..., Any] = read_json) -> Any:
    try:
        return read(file, strict=False)
    except (OSError, UserError) as error:
        raise UserError(f"{file}: damaged ({str(error).removeprefix(f'{file}: ')}); choose another workdir") from None


def _as_json(config: ConfigDict) -> dict[str, Any]:
    """The options by dotted key, as `config.json` has them: a list for a tuple."""
    return dict(flatten(json.loads(json.dumps(config.to_dict()))))


def fingerprint(source: Source, lengths: Lengths) -> dict[str, Any]:
    """Identifies the data and its tokenization: number of samples and a hash."""
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part, np.int64).tobytes() for part in lengths[:3]))
    digest.update(source.digest.encode())
    return {"samples": len(lengths.tokens), "sha256": digest.hexdigest()}
