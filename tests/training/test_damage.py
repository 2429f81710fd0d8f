"""Damaged steps of a workdir, and going back to an earlier one."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from training_runs import assert_same_run, copied, final, run_config

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.training import loop


def flip_bits(file: Path, seed: int = 0) -> None:
    """Eight bits, anywhere."""
    data = bytearray(file.read_bytes())
    for place in np.random.default_rng(seed).choice(8 * len(data), 8, replace=False):
        data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def data_file(step: Path, part: str) -> Path:
    """The file with the arrays of a step's `params` or `optimizer`."""
    return max((step / part).glob("ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)


DAMAGES = {
    "metadata cut": (lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 200), "_CHECKPOINT_METADATA is cut off"),
    "metadata gone": (lambda step: (step / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is cut off"),
    "metadata of zeros": (lambda step: (step / "_CHECKPOINT_METADATA").write_bytes(bytes(99)), "is cut off"),
    "a list for metadata": (lambda step: (step / "_CHECKPOINT_METADATA").write_text("[1]"), "must be a dictionary"),
    "another model": (
        lambda step: (step / "_CHECKPOINT_METADATA").write_text(
            (step / "_CHECKPOINT_METADATA").read_text().replace('"rms_norm_eps": 1e-0', '"rms_norm_eps": 2e-0')
        ),
        "altered",
    ),
    "empty": (lambda step: [shutil.rmtree(step), step.mkdir()], "_CHECKPOINT_METADATA is cut off"),
    "no params": (lambda step: shutil.rmtree(step / "params"), "params"),
    "no optimizer": (lambda step: shutil.rmtree(step / "optimizer"), "optimizer"),
    "manifest cut": (lambda step: os.truncate(step / "optimizer" / "manifest.ocdbt", 20), "does not match actual"),
    "no manifest": (lambda step: (step / "optimizer" / "manifest.ocdbt").unlink(), "does not exist"),
    "no tree": (lambda step: (step / "optimizer" / "_METADATA").unlink(), "_METADATA"),
    "half a tree": (lambda step: os.truncate(step / "optimizer" / "_METADATA", 99), "JSONDecodeError"),
    "no data": (lambda step: os.truncate(data_file(step, "params"), 0), "is not valid for value of size 0"),
    "half the data": (
        lambda step: os.truncate(data_file(step, "optimizer"), 5000),
        "for value of size 5000",
    ),
    "data gone": (lambda step: data_file(step, "optimizer").unlink(), "projector|llm"),
    "bits of params": (lambda step: flip_bits(data_file(step, "params")), "(projector|llm)[.a-z_0-9]+: "),
    "bits of the optimizer": (lambda step: flip_bits(data_file(step, "optimizer")), "(projector|llm)[.a-z_0-9]+: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_is_named_with_the_one_before_it(damage, world, six_steps, tmp_path):
    workdir = copied(six_steps, tmp_path / "run")
    spoil, why = DAMAGES[damage]
    spoil(workdir / "checkpoints" / "6")
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as raised:
        loop.train(run_config(world, save_every=1, keep=9), str(workdir))
    said = str(raised.value)
    assert said.startswith(f"{workdir}/checkpoints/6: this step is damaged (") and re.search(why, said)
    assert said.endswith(f"with --resume-from 5, or give other commands {workdir}/checkpoints/5") and "\n" not in said
    assert {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()} == before


def test_a_run_goes_back_to_a_step_that_is_asked_for_once(world, six_steps, tmp_path, capsys):
    """Bit-equal, with every line once; what was newer is kept. Repeated, as launchers do, it does not go back again."""
    workdir = copied(six_steps, tmp_path / "run")
    os.truncate(workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA", 200)
    flip_bits(data_file(workdir / "checkpoints" / "5", "optimizer"))
    log = (workdir / "metrics.jsonl").read_bytes()
    config = run_config(world, save_every=1, keep=9)
    with pytest.raises(UserError, match="checkpoints/5: this step is damaged .* with --resume-from 4"):
        loop.train(config, str(workdir), 5)
    assert (workdir / "checkpoints" / "6").exists() and (workdir / "metrics.jsonl").read_bytes() == log
    loop.train(config, str(workdir), 4)
    told = capsys.readouterr().err
    assert f"resumes from step 4: moved steps 5, 6 to {workdir}/set_aside/after_4" in told
    assert "resuming after step 4" in told
    assert_same_run(workdir, six_steps)
    aside = workdir / "set_aside" / "after_4"
    assert (aside / "metrics.jsonl").read_bytes() == log and (aside / "6" / "params").exists()
    longer = run_config(world, save_every=1, keep=9)
    loop.train(longer, str(workdir), 4)
    assert "was followed by an earlier start: resumes from the newest step, 6" in capsys.readouterr().err
    assert_same_run(workdir, six_steps)


def test_a_run_goes_back_from_whole_steps_too(world, six_steps, tmp_path):
    workdir = copied(six_steps, tmp_path / "run")
    loop.train(run_config(world, save_every=1, keep=2), str(workdir), 2)
    assert_same_run(workdir, six_steps)
    assert sorted(step.name for step in (workdir / "checkpoints").iterdir()) == ["5", "6"]


def test_a_step_that_is_not_there_is_refused_with_those_that_are(world, six_steps, tmp_path):
    config = run_config(world, save_every=1, keep=9)
    with pytest.raises(UserError, match="has no step 7: the steps there are 0, 1, 2, 3, 4, 5, 6$"):
        loop.train(config, str(six_steps), 7)
    with pytest.raises(UserError, match="has no step to resume from: leave --resume-from out"):
        loop.train(config, str(tmp_path / "new"), 1)
    with pytest.raises(UserError, match="no such checkpoint: the steps there are 0, 1"):
        open_checkpoint(six_steps / "checkpoints" / "7")


def test_any_eight_bits_of_a_data_file_are_an_error_or_change_nothing(six_steps, tmp_path):
    """Nothing else: bytes that no array needs are left where a step was written."""
    workdir = copied(six_steps, tmp_path / "run")
    expected, errors = final(six_steps), 0
    file = data_file(workdir / "checkpoints" / "6", "params")
    whole = file.read_bytes()
    for seed in range(30):
        flip_bits(file, seed)
        try:
            for name, value in final(workdir).items():
                np.testing.assert_array_equal(value, expected[name], err_msg=name)
        except UserError:
            errors += 1
        file.write_bytes(whole)
    assert errors >= 29
