"""What a run writes down survives a crash without doubling."""

import json

from etils import epath

from llava_jax import metrics
from llava_jax.metrics import MetricsWriter, Screen


def test_lines_beyond_the_resumed_step_and_cut_lines_are_dropped(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "lo')
    writer = MetricsWriter(epath.Path(tmp_path), 2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_run_that_begins_anew_keeps_no_line(tmp_path):
    """It evaluates step 0 again."""
    for _ in range(2):
        writer = MetricsWriter(epath.Path(tmp_path), 0)
        writer.write(0, {"pope/accuracy": 1.0})
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_off_a_terminal_the_screen_prints_plain_lines(capsys):
    screen = Screen(0, 2)
    metrics = {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_second": 1e4, "images_per_second": 3.0}
    metrics |= {"learned_share": 0.123, "padding_share": 0.5}
    screen.show(1, metrics)
    screen.show(2, metrics)
    screen.close()
    told = capsys.readouterr().err
    assert (
        "step 2/2  loss 1.5000  lr 1.00e-03  grad 2.00  10,000 tokens/s  3.0 images/s  learned 12%  padding 50%" in told
    )


def test_mfu_is_shown_in_both_conventions(capsys):
    used = {"mfu_full": 0.375, "mfu_causal": 0.25}
    shown = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "images_per_second", "learned_share")
    screen = Screen(0, 1)
    screen.show(1, dict.fromkeys((*shown, "padding_share"), 0.5) | used)
    assert capsys.readouterr().err.endswith("padding 50%  MFU 37.5% (causal 25.0%)\n")


def test_logs_of_a_remote_workdir_are_staged_and_a_failing_upload_only_warns(tmp_path, monkeypatch, capsys):
    """The workdir stands for a bucket here; tests/test_remote.py has a real one."""
    workdir = tmp_path / "bucket"
    (workdir / "tensorboard").mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 9.0}\n')
    (workdir / "bad_samples.jsonl").write_text('{"step": 1, "id": "a"}\n{"step": 2, "id": "b"}\n{"step": 2, "i')
    monkeypatch.setattr(metrics, "is_remote", lambda path: path == workdir)
    writer = MetricsWriter(epath.Path(workdir), 1)
    writer.write(2, {"loss": 2.0})
    assert writer.read("bad_samples.jsonl") == [{"step": 1, "id": "a"}]
    writer.append("bad_samples.jsonl", {"step": 2, "id": "c"})
    assert "9.0" in (workdir / "metrics.jsonl").read_text(), "nothing is written there before the first upload"

    def fails(source, target):
        raise OSError("no network")

    with monkeypatch.context() as broken:
        broken.setattr(metrics, "upload", fails)
        writer.flush()
        writer.uploads.submit(bool).result()  # uploads go one after the other: that one is over
    assert "logs cannot be uploaded now: no network" in capsys.readouterr().err
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0)
    writer.write(3, {"loss": 3.0})
    writer.uploads.submit(bool).result()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    writer.close()
    assert (workdir / "bad_samples.jsonl").read_text() == '{"step": 1, "id": "a"}\n{"step": 2, "id": "c"}\n'
    assert list((workdir / "tensorboard").iterdir())
