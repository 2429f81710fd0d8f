"""Whose a workdir is."""

import json
import os

import pytest
from etils import epath

from configs import finetune
from llava_jax.cli import UserError
from llava_jax.files.lock import LOCK
from llava_jax.plot import read_losses
from llava_jax.training import workdir
from llava_jax.training.metrics import METRICS, keep_lines


def test_a_workdir_of_a_recipe_that_named_its_model_still_resumes(tmp_path):
    """Recipes without a size named a model of 7B once, and there was no default_model."""
    data = {"samples": 1, "sha256": "0"}
    (tmp_path / "data.json").write_text(json.dumps(data))
    then = finetune.get_config("7b").to_dict()
    del then["default_model"]
    (tmp_path / "config.json").write_text(json.dumps(then))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    workdir.claim(epath.Path(tmp_path), finetune.get_config(), data)
    with pytest.raises(UserError, match="belongs to a run of another configuration .*batch_rows: 128 there, 32 now"):
        workdir.claim(epath.Path(tmp_path), finetune.get_config("v0"), data)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\0", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 10**5, b"{}" * 5 * 2**20]
)
@pytest.mark.parametrize("name", ["config.json", "data.json"])
def test_damaged_files_of_a_workdir_are_one_line(name, text, tmp_path):
    data, config = {"samples": 1, "sha256": "0"}, finetune.get_config()
    workdir.claim(epath.Path(tmp_path / "run"), config, data)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "run" / name).write_bytes(text)
    with pytest.raises(UserError) as raised:
        workdir.claim(epath.Path(tmp_path / "run"), config, data)
    said = str(raised.value)
    assert "\n" not in said and (f"{name}: damaged" in said or "not a training workdir" in said)


def test_a_workdir_whose_first_file_was_never_finished_is_taken(tmp_path):
    (tmp_path / "data.json.0123abcd.partial").write_text('{"sam')
    (tmp_path / LOCK).touch()
    workdir.claim(epath.Path(tmp_path), finetune.get_config(), {"samples": 1, "sha256": "0"})
    assert json.loads((tmp_path / "data.json").read_text()) == {"samples": 1, "sha256": "0"}


def test_what_was_set_aside_stays(tmp_path):
    """Even if the run is asked to go back to the same step before it has saved another."""
    aside = tmp_path / "set_aside" / "after_2"
    aside.mkdir(parents=True)
    (aside / METRICS).write_text("all steps")
    (tmp_path / METRICS).write_text("steps up to 2")
    workdir.set_aside(epath.Path(tmp_path), 2)
    assert (aside / METRICS).read_text() == "all steps"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir])
def test_a_log_that_is_no_file_is_named_and_not_waited_for(make, tmp_path):
    file = tmp_path / METRICS
    make(file)
    for read in (
        lambda: keep_lines(epath.Path(file), epath.Path(file), 3),
        lambda: read_losses(tmp_path),
        lambda: workdir._has_trained(epath.Path(tmp_path)),
    ):
        with pytest.raises(UserError, match=f"^{file}: is a .*, not a file"):
            read()
