"""Weights & Biases offline: the real client writes its files, nothing is sent."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from wandb.proto import wandb_internal_pb2

from configs import common
from llava_jax.cli import UserError
from llava_jax.training import config_check
from llava_jax.training.metrics import MetricsWriter, start_tracking


@pytest.fixture
def config():
    config = common.get_config()
    config.wandb.project = "llava-test"
    return config


def logged(workdir: Path) -> list[dict]:
    """The metrics in the file that `wandb sync` would send, once W&B's own process has written all of it."""
    (file,) = workdir.glob("wandb/offline-run-*/run-*.wandb")
    while not (records := read_records(file.read_bytes())) or records[-1].WhichOneof("record_type") != "exit":
        time.sleep(0.1)
    history = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.nested_key[0]: json.loads(item.value_json) for item in items} for items in history]


def read_records(data: bytes) -> list[wandb_internal_pb2.Record]:
    """A header of 7 bytes, then records: checksum, length and type, then protobuf."""
    records, place = [], 7
    while place + 7 <= len(data):
        _, length, _ = struct.unpack_from("<IHB", data, place)
        place += 7 + length
        if place <= len(data):
            records.append(wandb_internal_pb2.Record.FromString(data[place - length : place]))
    return records


def test_metrics_go_to_the_run_too(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = start_tracking(config, epath.Path(tmp_path))
    assert run.name == tmp_path.name and run.config["learning_rate"] == config.learning_rate
    first_id = run.id
    writer = MetricsWriter(epath.Path(tmp_path), 0, run)
    writer.write(1, {"loss": 2.5})
    writer.write(2, {"loss": 1.5})
    writer.close()
    assert [(line["_step"], line["loss"]) for line in logged(tmp_path)] == [(1, 2.5), (2, 1.5)]
    again = start_tracking(config, epath.Path(tmp_path))
    again.finish()
    assert again.id == first_id  # a resume continues the run


def test_off_by_default_and_not_even_imported(tmp_path):
    program = (
        "import sys; from configs import common; from etils import epath; from llava_jax.training import metrics\n"
        f"assert metrics.start_tracking(common.get_config(), epath.Path({str(tmp_path)!r})) is None\n"
        "import llava_jax.training.loop; assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_package_is_told_at_once(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.wandb.project is 'llava-test', which needs pip install 'llava_jax\["):
        config_check.check(config)
