"""The loop from start to resume."""

import collections
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from training_runs import (
    assert_same_run,
    copied,
    final,
    metrics,
    run_config,
    stop_at,
)

from llava_jax import plot
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.data import build
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.files import lock
from llava_jax.files.lock import hold
from llava_jax.models.llava import abstract_params
from llava_jax.training import builder, goodput, loop, summary
from llava_jax.training import step as training_step
from llava_jax.training.profiling import Profile


def test_two_stages_learn_and_describe_themselves(world, tmp_path, capsys):
    stage_1, stage_2 = tmp_path / "stage_1", tmp_path / "stage_2"
    loop.train(run_config(world, "pretrain", template="plain", learning_rate=1e-2), str(stage_1))
    told = capsys.readouterr().err
    assert "trainable  projector 3,936 parameters" in told and "frozen     llm 80,112, vision 32,096" in told
    assert "⟦" in told and "step 6/6" in told
    config = run_config(world, steps=12, init=str(stage_1), eval_every=6)
    with config.unlocked():
        config.data.holdout = 2
    loop.train(config, str(stage_2))
    history = metrics(stage_2)
    losses = [m["loss"] for m in history if "loss" in m]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert [m["step"] for m in history if "validation_loss" in m] == [6, 12]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "images_per_second"} <= history[0].keys()
    assert 0 < history[0]["learned_share"] < 1 and 0 < history[0]["padding_share"] < 1
    assert list((stage_2 / "tensorboard").iterdir())

    source, projector, both = open_checkpoint(world["init"]).load(), final(stage_1), final(stage_2)
    for name, value in source.items():
        part = name.split(".")[0]
        assert np.array_equal(projector[name], value) == (part != "projector"), name
        if part == "vision":
            np.testing.assert_array_equal(both[name], value)
    checkpoint = open_checkpoint(stage_2)
    assert (checkpoint.template, checkpoint.description.stage, checkpoint.step) == ("v1", "finetune", 12)
    # The frozen tower is referred to where it really is, not by way of stage 1.
    assert [source.path for source in checkpoint.description.sources] == [world["init"]]


def test_sigterm_saves_and_leaves_and_the_same_command_resumes_bit_equal(world, uninterrupted, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    count_tokens, calls = loop.count_tokens, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_tokens(*args)

    monkeypatch.setattr(loop, "count_tokens", interrupt)
    with pytest.raises(SystemExit) as left:
        loop.train(run_config(world), str(workdir))
    assert left.value.code == 128 + signal.SIGTERM
    assert open_checkpoint(workdir).step == 3
    monkeypatch.undo()
    loop.train(run_config(world), str(workdir))
    assert_same_run(workdir, uninterrupted)


def test_a_packed_run_reports_its_plan_and_resumes_bit_equal(world, tmp_path, capsys):
    """Stopped in its second epoch."""
    changes = {"pack": True, "row_length": 200, "rows_per_group": 2, "batch_rows": 2, "steps": 0, "epochs": 2.0}
    changes["data"] = {"holdout": 2}
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    loop.train(run_config(world, **changes), str(whole))
    told = capsys.readouterr().err
    assert re.search(r"packing +[2-9]\.\d+ samples a row, \d+ a step; used are \d+\.\d% of positions", told), told
    steps = sum("loss" in m for m in metrics(whole))
    assert f"{steps} steps done" in told and 2 <= steps < 12
    stop_at(steps - 1, run_config(world, **changes), workdir)
    loop.train(run_config(world, **changes), str(workdir))
    assert_same_run(workdir, whole)


def test_a_run_grouped_by_modality_has_steps_without_pictures(world, tmp_path):
    """Three of twelve samples have none: one step of two of them, and the third with what is left of the others."""
    changes = {"group_by_modality": True, "batch_rows": 2, "steps": 6}
    loop.train(run_config(world, **changes), str(tmp_path / "run"))
    images = [m["images_per_second"] for m in metrics(tmp_path / "run")]
    assert len(images) == 6 and images[:5].count(0) == 1 and images[5] > 0


def broken_data(world, directory: Path) -> tuple[str, str]:
    """The data with a damaged and a missing picture, a record that is no sample, and an answer that is cut off."""
    records = json.loads(Path(world["json"]).read_text())
    records[7]["conversations"][0]["value"] = "Say white. " * 40
    del records[3]["conversations"]
    images = Path(shutil.copytree(world["images"], directory / "images"))
    (images / "0.png").write_bytes(b"no picture")
    (images / "5.png").unlink()
    (directory / "data.json").write_text(json.dumps(records))
    return str(directory / "data.json"), str(images)


def test_bad_samples_are_skipped_told_and_not_counted_twice(world, tmp_path, capsys):
    file, images = broken_data(world, tmp_path)
    data = {"on_bad_sample": "skip", "max_bad_share": 0.6, "json": file, "images": images, "holdout": 2}
    changes = {"data": data, "steps": 0, "epochs": 2.0}
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    loop.train(run_config(world, **changes), str(whole))
    told = capsys.readouterr().err
    assert "skipped    sample sample-7: nothing to learn" in told and "sample-0: image" in told
    found = [json.loads(line) for line in (whole / "bad_samples.jsonl").read_text().splitlines()]
    counts = collections.Counter((one["id"], one["part"]) for one in found)
    expected = {("sample-0", "training"): 2, ("sample-5", "training"): 2, ("sample-7", "text"): 1}
    expected[("3", "text")] = 1
    assert counts == expected, "none of them is held out"
    losses = [m for m in metrics(whole) if "loss" in m]
    assert losses[-1]["bad_samples"] == 8 and np.isfinite([m["loss"] for m in losses]).all()
    stop_at(len(losses) - 1, run_config(world, **changes), workdir)
    loop.train(run_config(world, **changes), str(workdir))
    assert_same_run(workdir, whole)
    again = [json.loads(line) for line in (workdir / "bad_samples.jsonl").read_text().splitlines()]
    assert again == found and metrics(workdir)[-2]["bad_samples"] == 8


def test_too_many_bad_samples_stop_a_run_which_can_go_on(world, tmp_path, capsys):
    file, images = broken_data(world, tmp_path)
    data = {"on_bad_sample": "skip", "max_bad_share": 0.2, "json": file, "images": images}
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        loop.train(run_config(world, data=data), str(workdir))
    told = capsys.readouterr().err
    assert left.value.code == 1 and "samples are bad, more than a share of 0.2 of 12; bad_samples.jsonl" in told
    assert isinstance(left.value.__cause__, UserError), "what `llava_jax.train` raises"
    assert 1 <= open_checkpoint(workdir).step < 6
    loop.train(run_config(world, data=data | {"max_bad_share": 0.9}), str(workdir))
    assert metrics(workdir)[-1]["step"] == 6
    data["max_bad_share"] = 0.1
    with pytest.raises(UserError, match="2 of 12 samples have texts with faults, more than data.max_bad_share=0.1"):
        loop.train(run_config(world, data=data), str(tmp_path / "texts"))
    with pytest.raises(UserError, match="no list of turns"):
        loop.train(run_config(world, data={"json": file, "images": images}), str(tmp_path / "strict"))


def test_sigkill_loses_only_what_was_not_saved(world, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    overrides = {
        "init": world["init"],
        "data.json": world["json"],
        "data.images": world["images"],
        "max_length": 64,
        "batch_rows": 4,
        "steps": 100_000,
        "learning_rate": 1e-3,
        "save_every": 2,
        "remat": "none",
        "stage": "finetune",
    }
    command = [sys.executable, "-m", "llava_jax.main", "--config=configs/common.py", f"--workdir={workdir}"]
    process = subprocess.Popen(command + [f"--config.{key}={value}" for key, value in overrides.items()])
    while process.poll() is None and not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    step = open_checkpoint(workdir).step
    assert step >= 2
    config = run_config(world, steps=100_000, save_every=2)
    killed = final(workdir)
    reference_run = tmp_path / "reference"
    stop_at(step, config, reference_run)
    for name, value in final(reference_run).items():
        np.testing.assert_array_equal(killed[name], value, err_msg=name)
    stop_at(step + 3, config, workdir)
    stop_at(step + 3, config, reference_run)
    assert_same_run(workdir, reference_run)


def test_a_signal_to_the_whole_group_leaves_the_readers_to_the_run(world, tmp_path):
    """As terminals and launchers send it."""
    workdir = tmp_path / "run"
    config = run_config(world, steps=100_000)
    overrides = {"max_length": 64, "batch_rows": 4, "steps": 100_000, "data.workers": 1, "stage": "finetune"}
    overrides |= {"init": config.init, "data.json": config.data.json, "data.images": config.data.images}
    command = [sys.executable, "-m", "llava_jax.main", "--config=configs/common.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "stopped by SIGTERM" in told and "Traceback" not in told
    assert open_checkpoint(workdir).step >= 1


def test_an_evaluation_that_was_cut_off_is_made_up_for(world, tmp_path):
    """By a signal at step 2, which is saved first, and by a crash after the last step was saved."""
    config = run_config(world, steps=4, eval_every=2)
    config.data.holdout = 2
    for name in ("whole", "stopped"):
        if name == "stopped":
            stop_at(2, config, tmp_path / name)
            assert [line for line in metrics(tmp_path / name) if "validation_loss" in line] == []
        loop.train(config, str(tmp_path / name))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    file = tmp_path / "stopped" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert "validation_loss" in lines[-1]
    for kept in (lines[:-1], lines):  # written by the crash or not
        file.write_text("".join(kept))
        loop.train(config, str(tmp_path / "stopped"))
        assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(world, uninterrupted):
    before = final(uninterrupted)
    loop.train(run_config(world), str(uninterrupted))
    for name, value in final(uninterrupted).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_run_accounts_for_its_time_and_writes_a_profile(world, tmp_path, capsys):
    config = run_config(world)
    with config.unlocked():
        config.profile = {"start": 2, "steps": 2}
        config.data.holdout = 2
    stop_at(3, config, tmp_path / "run")
    loop.train(config, str(tmp_path / "run"))
    account = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert (account["starts"], account["step"], account["steps_done"], account["steps_repeated"]) == (2, 6, 6, 0)
    assert all(account["seconds"][kind] > 0 for kind in goodput.KINDS)
    assert "in 2 starts: " in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "profile" / "plugins" / "profile").iterdir())) == 1


def test_the_seconds_of_a_step_are_those_of_the_step(world, tmp_path, monkeypatch):
    """By a clock on which compiling, saving, evaluating and tracing take a thousand seconds each time."""
    late, clock = [], time.monotonic
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(monotonic=lambda: clock() + 1000 * len(late)))

    def delayed(owner, name: str) -> None:
        function = getattr(owner, name)

        def slow(*arguments, **options):
            late.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    delayed(loop.TrainingCheckpoints, "save")
    delayed(Profile, "close")
    delayed(jax.profiler, "start_trace")
    delayed(jax.stages.Lowered, "compile")
    delayed(builder, "eval_step")  # traced once
    config = run_config(world, save_every=2, eval_every=3)
    with config.unlocked():
        config.profile = {"start": 2, "steps": 1}
        config.data.holdout = 2
    loop.train(config, str(tmp_path / "run"))
    assert {"save", "close", "start_trace", "compile", "eval_step"} == set(late)
    seconds = [m["seconds"] for m in metrics(tmp_path / "run") if "seconds" in m]
    assert len(seconds) == 6 and all(0 < value < 1000 for value in seconds)
    account = json.loads((tmp_path / "run" / "goodput.json").read_text())["seconds"]
    assert account["step"] < 1000 and account["data"] < 1000 and account["profile"] >= 2000


def test_a_resumed_run_takes_the_memory_of_a_fresh_one(tmp_path):
    """Of a hundred million parameters, in processes of their own: nothing but the state and what is frozen is alive,
    and at no time is there a second state, or the trainable weights of the source, beside it."""
    model = tiny.config(text=tiny.TextConfig(tiny.VOCAB, 1024, 4096, 6, 8, 8, 128))
    shapes, rng = abstract_params(model), np.random.default_rng(0)
    params = {name: 0.02 * rng.standard_normal(leaf.shape, np.float32) for name, leaf in shapes.items()}
    init = tiny.checkpoint(tmp_path, model, params=params)
    file, images = tiny.data(tmp_path)
    config = {"stage": "finetune", "init": str(init), "data.json": str(file), "data.images": str(images)}
    config |= {"max_length": 64, "batch_rows": 2, "steps": 2, "remat": "none", "keep": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    frozen = sum(4 * leaf.size for name, leaf in shapes.items() if name.startswith("vision."))
    trainable = sum(4 * leaf.size for leaf in shapes.values()) - frozen
    assert trainable > 4e8

    def peak(workdir: str, stop: str) -> int:
        """Of the process of one start, in bytes. What is alive after each step is checked."""
        command = [sys.executable, "-m", "tests.support.run_memory", str(tmp_path / "config.json"), workdir, stop]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert run.returncode == 0, run.stderr
        found = json.loads(run.stdout.splitlines()[-1])
        assert found["live"] == [pytest.approx(3 * trainable + frozen, rel=1e-3)] and found["donated"] == [1.0]
        return found["peak"]

    def more_in_a_resume(number: int) -> int:
        workdir = str(tmp_path / f"run{number}")
        fresh = peak(workdir, stop="1")
        return peak(workdir, stop="0") - fresh

    # The peak that the system counts differs by a few hundred MB between runs. A copy of the weights would show in all.
    assert any(more_in_a_resume(number) < trainable / 2 for number in range(3))


def test_another_config_is_refused_with_the_differing_keys(world, uninterrupted, tmp_path):
    with pytest.raises(UserError, match="learning_rate: 0.001 there, 0.002 now"):
        loop.train(run_config(world, learning_rate=2e-3), str(uninterrupted))
    neutral = run_config(world, save_every=7, log_every=3, compilation_cache=str(tmp_path / "cache"))
    with neutral.unlocked():
        neutral.profile.steps = 1
    loop.train(neutral, str(uninterrupted))  # changes no number


def test_other_data_is_refused(world, uninterrupted):
    samples = json.loads(Path(world["json"]).read_text())
    samples[0]["conversations"][1]["value"] += " It is very much so."
    original = Path(world["json"]).read_text()
    try:
        Path(world["json"]).write_text(json.dumps(samples))
        with pytest.raises(UserError, match="not the data that"):
            loop.train(run_config(world), str(uninterrupted))
    finally:
        Path(world["json"]).write_text(original)


def test_other_data_of_equal_lengths_is_refused(world, uninterrupted):
    original = Path(world["json"]).read_text()
    try:
        Path(world["json"]).write_text(original.replace('"sample-0"', '"sample-X"'))
        assert Path(world["json"]).read_text() != original
        with pytest.raises(UserError, match="not the data that"):
            loop.train(run_config(world), str(uninterrupted))
    finally:
        Path(world["json"]).write_text(original)


def test_built_shards_train_as_the_json_does_and_a_mixture_resumes(world, uninterrupted, tmp_path):
    built = str(tmp_path / "built")
    build.main(["--json", world["json"], "--images", world["images"], "--output", built, "--shards", "2"])
    config = run_config({**world, "json": "", "images": ""})
    with config.unlocked():
        config.data.built = built
    loop.train(config, str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)
    with config.unlocked():
        config.data.built = ""
        config.data.mixture = ({"json": world["json"], "images": world["images"]}, {"built": built, "weight": 0.5})
        config.save_every = 3
    loop.train(config, str(tmp_path / "mixture"))
    shutil.copytree(tmp_path / "mixture", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    loop.train(config, str(tmp_path / "resumed"))
    assert_same_run(tmp_path / "resumed", tmp_path / "mixture")
    with config.unlocked():
        config.data.mixture = config.data.mixture[:1]
    with pytest.raises(UserError, match="data.mixture: "):
        loop.train(config, str(tmp_path / "mixture"))


def test_a_run_that_failed_before_its_first_step_can_be_corrected(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="no such folder of images"):
        loop.train(run_config({**world, "images": str(tmp_path / "nowhere")}), str(workdir))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"sample sample-\d+: .*empty"):
        loop.train(run_config({**world, "images": str(tmp_path / "empty")}), str(workdir))
    loop.train(run_config(world, steps=1), str(workdir))
    assert open_checkpoint(workdir).step == 1


def test_a_run_that_failed_in_its_first_step_can_be_corrected(world, tmp_path, monkeypatch):
    """With another checkpoint, of which nothing of the first one is left; after a step it is too late for that."""
    workdir, other = tmp_path / "run", tmp_path / "other"
    tiny.checkpoint(other, template="plain")
    (other / "model" / "tokenizer" / "special.txt").write_text("")
    first = run_config(world, learning_rate=2e-3, init=str(other / "model"))
    with monkeypatch.context() as patch:
        poison(patch, 1)
        with pytest.raises(UserError, match="step 1: loss nan"):
            loop.train(first, str(workdir))
    assert (workdir / "tokenizer" / "special.txt").exists() and open_checkpoint(workdir).step == 0
    loop.train(run_config(world), str(tmp_path / "reference"))
    loop.train(run_config(world), str(workdir))
    assert_same_run(workdir, tmp_path / "reference")
    assert not (workdir / "tokenizer" / "special.txt").exists()
    assert open_checkpoint(workdir).description.sources[0].path == world["init"]
    with pytest.raises(UserError, match="belongs to a run of another configuration .*learning_rate"):
        loop.train(first, str(workdir))


def test_a_line_that_a_crash_cut_off_is_no_step(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, 1)
        with pytest.raises(UserError, match="step 1: loss nan"):
            loop.train(run_config(world, learning_rate=2e-3), str(workdir))
    (workdir / "metrics.jsonl").write_text('{"step": 0, "pope/accuracy": 1.0}\n{"step": 1, "lo')
    loop.train(run_config(world), str(workdir))
    assert [m["step"] for m in metrics(workdir)] == list(range(1, 7))


def test_a_damaged_workdir_is_an_error_of_one_line(world, uninterrupted, tmp_path):
    workdir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: damaged"):
        loop.train(run_config(world), str(workdir))


def test_a_long_first_sample_is_shown_as_it_is_cut(world, capsys):
    tokenizer = load_tokenizer(open_checkpoint(world["init"]).tokenizer_dir)
    source = LlavaJson(world["json"])
    whole = TextEncoder(get_template("v1"), tokenizer, image_tokens=4, max_length=64)
    length = len(whole(source[0]).tokens)
    summary.show_first_sample(EncodedSource(source, dataclasses.replace(whole, max_length=length - 1)), [0])
    told = capsys.readouterr().err
    assert f"sample-0, cut to {length - 4} of {length - 3} tokens" in told and "⟦ It is red.⟧" in told
    summary.show_first_sample(EncodedSource(source, whole), [0])
    told = capsys.readouterr().err
    assert "cut" not in told and "⟦ It is red.</s>⟧" in told


def test_a_run_renders_system_prompts_and_warns_of_moved_images(world, tmp_path, capsys):
    question = {"role": "user", "content": "Source: <image>\nTarget: <image>"}
    record = {"images": ["0.png", "1.png"], "system": "Be brief.", "messages": [question, {"role": "assistant"}]}
    record["messages"][1]["content"] = "red"
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": str(i)} | record for i in range(4)]), "utf-16")
    loop.train(run_config(world | {"json": str(data)}, steps=1), str(tmp_path / "run"))
    told = capsys.readouterr().err
    assert "warning: 4 samples, 0 the first, have text between the images of a turn" in told
    assert "<s>Be brief. USER: <image>\n<image>\nSource: \nTarget: ASSISTANT:" in told and "red</s>⟧" in told


def test_a_directory_of_something_else_is_refused(world, tmp_path):
    for name, text in (("thesis.tex", ""), ("config.json", '{"model_type": "llava"}'), ("data.json", "[]")):
        directory = tmp_path / name.partition(".")[0]
        directory.mkdir()
        (directory / name).write_text(text)
        with pytest.raises(UserError, match="not a training workdir"):
            loop.train(run_config(world), str(directory))
        assert (directory / name).read_text() == text


def poison(monkeypatch, step: int) -> None:
    """The loss of this step is NaN."""

    def poisoned(settings, optimizer, state, frozen, batch):
        state, values = train_step(settings, optimizer, state, frozen, batch)
        return state, values | {"loss": jnp.where(state.step == step, jnp.nan, values["loss"])}

    train_step = training_step.train_step
    monkeypatch.setattr(builder, "train_step", poisoned)


def test_nan_stops_with_the_step_and_its_samples_and_saves_nothing(world, tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with pytest.raises(UserError, match=r"step 3: loss nan.*sample-\d+, sample-\d+"):
        loop.train(run_config(world, save_every=3), str(tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run").step == 0


def test_a_path_that_cannot_be_written_fails_before_the_first_step(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        loop.train(run_config(world), str(tmp_path / "file" / "run"))


def test_another_template_than_that_of_an_earlier_finetuning_warns(world, uninterrupted, tmp_path, capsys):
    for template, warns in (("llava_v1", True), ("v1", False)):
        loop.train(run_config(world, init=str(uninterrupted), template=template, steps=1), str(tmp_path / template))
        assert ("was made with template v1, not llava_v1" in capsys.readouterr().err) is warns


def test_where_images_stood_is_stored_and_told_where_it_changes(world, uninterrupted, tmp_path, capsys):
    assert open_checkpoint(uninterrupted).config.image_position == "first"
    loop.train(run_config(world, init=str(uninterrupted), image_position="as_is", steps=1), str(tmp_path / "a"))
    assert "was trained with image_position first, not as_is" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "a").config.image_position == "as_is"
    loop.train(run_config(world, init=str(tmp_path / "a"), image_position="as_is", steps=1), str(tmp_path / "b"))
    assert "image_position" not in capsys.readouterr().err


def test_a_preset_of_other_sizes_is_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"is not a llava-v1.5-7b .*hidden_size 48, not 4096.*give --config.model= to"):
        loop.train(run_config(world, model="llava-v1.5-7b"), str(tmp_path / "run"))


def test_a_second_start_in_a_workdir_is_refused_and_leaves_all_as_it_is(world, six_steps, tmp_path):
    workdir = copied(six_steps, tmp_path / "run")
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    with hold(epath.Path(workdir)):
        with pytest.raises(UserError, match=f"{workdir}: is in use by another process .{os.getpid()} on "):
            loop.train(run_config(world, save_every=1, keep=9, steps=6), str(workdir))
        open_checkpoint(workdir).load()  # whoever only reads does
        plot.plot([str(workdir)], tmp_path / "loss.png")
    assert {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()} == before


def test_a_run_that_was_frozen_until_another_took_its_workdir_writes_nothing_more(world, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    count_tokens, seen, before = loop.count_tokens, [], {}

    def freeze(*args):
        if len(seen) == 2:
            text = lock._describe("another boot") | {"host": "elsewhere", "pid": 7}
            (workdir / lock.LOCK).write_text(json.dumps(text))
            before.update({file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()})
            monkeypatch.setattr(lock, "EXPIRY", -1)  # as if all of that time had gone by
        seen.append(1)
        return count_tokens(*args)

    monkeypatch.setattr(loop, "count_tokens", freeze)
    with pytest.raises(UserError, match="was taken over by another process .7 on elsewhere .*writes nothing more"):
        loop.train(run_config(world), str(workdir))
    for file in workdir.rglob("*"):
        if file.is_file() and "tensorboard" not in file.parts:
            assert before.pop(file) == file.read_bytes(), file
    assert all("tensorboard" in file.parts for file in before)
    assert [m["step"] for m in metrics(workdir)] == [1, 2]


def test_callbacks_get_the_metrics_of_every_logged_step_in_a_thread_too(world, tmp_path):
    """As a notebook may call it. What they get is what `metrics.jsonl` gets."""
    config = run_config(world, steps=5, log_every=2, eval_every=4)
    config.data.holdout = 2
    workdir, called = tmp_path / "run", []
    callbacks = [lambda step, values: called.append({"step": step} | values)] * 2
    thread = threading.Thread(target=loop.train, args=(config, str(workdir)), kwargs={"callbacks": callbacks})
    thread.start()
    thread.join()
    assert called[::2] == called[1::2] == metrics(workdir)
    assert [(line["step"], "loss" in line) for line in called[::2]] == [
        (2, True), (4, True), (4, False), (5, True), (5, False)
    ]  # fmt: skip


def test_an_error_of_a_callback_ends_the_run_which_resumes(world, uninterrupted, tmp_path):
    def fail(step, values):
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        loop.train(run_config(world), str(tmp_path / "run"), callbacks=[fail])
    loop.train(run_config(world), str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", uninterrupted)
