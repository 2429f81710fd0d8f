"""The directory of a run: its configuration, which later starts must match, and its data's fingerprint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.data.plan import Lengths

# What may differ when a run is resumed, since it cannot change the mathematics.
NEUTRAL = ("mesh", "data.workers", "max_rows_per_device", "remat", "log_every", "eval_every", "save_every", "keep")


def claim(workdir: epath.Path, config: ConfigDict, lengths: Lengths) -> None:
    """Makes `workdir` this run's: writes `config.json` and `data.json`, or compares with those that are there.

    Raises UserError naming the differing keys, or if the data is not the data that the run was started with.
    """
    wanted = _flat(config.to_dict())
    data = {"samples": len(lengths.tokens), "sha256": _fingerprint(lengths)}
    if (workdir / "config.json").exists():
        found = _flat(json.loads((workdir / "config.json").read_text()))
        differing = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
        differing = [key for key in differing if not key.startswith(NEUTRAL)]
        if differing:
            changes = ", ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differing)
            raise UserError(f"{workdir} belongs to a run of another configuration ({changes}); choose another workdir")
        if json.loads((workdir / "data.json").read_text()) != data:
            raise UserError(
                f"{config.data.json}: not the data that {workdir} was started with (other samples or lengths); "
                "put it back or choose another workdir"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"{workdir}: exists and is not a training workdir; choose another")
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "data.json").write_text(json.dumps(data) + "\n")
        (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _fingerprint(lengths: Lengths) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(part, np.int64).tobytes() for part in lengths)).hexdigest()
