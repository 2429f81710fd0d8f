"""What a run writes down survives a crash without doubling."""

import io
import json
import math
import re

import pytest
from boards import events
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboardX.proto import layout_pb2

from llava_jax.cli import UserError
from llava_jax.training import metrics
from llava_jax.training.metrics import MetricsWriter, Screen, keep_lines, step_of
from tests.files.test_writing import disk_of


def test_lines_beyond_the_resumed_step_and_cut_lines_are_dropped_and_told(tmp_path, capsys):
    writer = MetricsWriter(epath.Path(tmp_path), 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'3\n{"step": "x"}\n' + file.read_bytes() + b'{"step": 2, "\xff\0\n{"step": 4, "lo')
    writer = MetricsWriter(epath.Path(tmp_path), 2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert f"{file}: dropped 4 damaged lines, as a crash leaves them" in capsys.readouterr().err


LINES = b"".join(b'{"step": %d, "loss": %d.5}\n' % (step, step) for step in range(1, 7))


@pytest.mark.parametrize("last, tail", [(3, b""), (6, b""), (6, b'{"step": 7, "lo')])
def test_a_full_disk_at_the_start_of_a_resumed_run_loses_no_line(last, tail, tmp_path, capsys):
    """Full after any number of bytes. What stays as it is is not even touched."""
    file = epath.Path(tmp_path / "metrics.jsonl")
    kept = b"".join(LINES.splitlines(keepends=True)[:last])
    for room in range(len(kept) + 2):
        file.write_bytes(LINES + tail)
        try:
            with disk_of(room):
                keep_lines(file, file, last)
            assert file.read_bytes() == kept
            assert room >= len(kept) or kept == LINES + tail
        except UserError as error:
            assert file.read_bytes() == LINES + tail and "metrics.jsonl: cannot be written" in str(error)
            assert room < len(kept)
        assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]
    assert capsys.readouterr().err.count("dropped 1 damaged line, as") == (len(kept) + 2 if tail else 0)


def test_a_line_that_finds_the_disk_full_is_not_written_in_part(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), 0)
    writer.append("metrics.jsonl", {"step": 1})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for room in range(len(whole), 2 * len(whole)):
        with disk_of(room), pytest.raises(UserError, match="metrics.jsonl: cannot be written: File too large"):
            writer.append("metrics.jsonl", {"step": 2})
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    writer.append("metrics.jsonl", {"step": 2})
    assert [line["step"] for line in writer.read("metrics.jsonl")] == [1, 2]
    writer.close()


def test_tensorboard_has_charts_of_the_metrics(tmp_path):
    """A group's chart shows the metrics whose names match one of its tags."""
    writer = MetricsWriter(epath.Path(tmp_path), 0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    layout = layout_pb2.Layout()
    values = [value for event in events(tmp_path / "tensorboard") for value in event.summary.value]
    layout.ParseFromString(next(v.tensor.string_val[0] for v in values if v.tag == "custom_scalars__config__"))
    charts = {chart.title: chart.multiline.tag for group in layout.category for chart in group.chart}
    assert [group.title for group in layout.category] == ["training", "speed", "data"]

    def shown(name: str) -> list[str]:
        return [title for title, tags in charts.items() if any(re.match(tag, name) for tag in tags)]

    assert shown("loss") == shown("validation_loss") == ["loss"] and not shown("other")
    assert shown("learning_rate_2") == shown("projector_learning_rate") == ["learning rates"]
    assert shown("images_per_second") == shown("tiles_per_second") == ["images and tiles a second"]
    assert shown("seconds") == ["seconds a step"] and shown("mmbench/all") == ["scores of evaluations"]
    assert shown("mfu_full") == shown("mfu_causal") == ["MFU"] and shown("bad_samples") == ["bad samples"]


def test_nothing_is_written_once_the_workdir_was_lost(tmp_path):
    def lost():
        raise UserError("lost")

    writer = MetricsWriter(epath.Path(tmp_path), 0, None, lost)
    with pytest.raises(UserError, match="lost"):
        writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_logs_of_a_workdir_that_was_lost_are_not_uploaded(tmp_path, monkeypatch, capsys):
    """Which another process has by now."""
    (tmp_path / "bucket").mkdir()
    monkeypatch.setattr(metrics, "is_remote", lambda path: path == tmp_path / "bucket")
    lost = []

    def check():
        if lost:
            raise UserError("taken over")

    writer = MetricsWriter(epath.Path(tmp_path / "bucket"), 0, None, check)
    writer.write(1, {"loss": 1.0})
    lost.append(True)
    writer.close()
    assert not list((tmp_path / "bucket").iterdir())
    assert "logs cannot be uploaded now: taken over" in capsys.readouterr().err


@given(st.binary(max_size=60) | st.sampled_from([b"[" * 9999, b'{"step": 1e999}', b'{"step": ' + b"9" * 5000 + b"}"]))
def test_any_bytes_have_a_step_or_none(line):
    step = step_of(line)
    assert step == math.inf or isinstance(step, float)


def test_a_run_that_begins_anew_keeps_no_line(tmp_path):
    """It evaluates step 0 again."""
    for _ in range(2):
        writer = MetricsWriter(epath.Path(tmp_path), 0)
        writer.write(0, {"pope/accuracy": 1.0})
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]


FIGURES = {
    "loss": 1.5,
    "learning_rate": 1e-3,
    "grad_norm": 2.0,
    "tokens_per_second": 1e4,
    "images_per_second": 3.0,
    "learned_share": 0.123,
    "padding_share": 0.5,
    "mfu_full": 0.375,
    "mfu_causal": 0.25,
}
ALL = "loss 1.5000  10,000 tokens/s  lr 1.00e-03  grad 2.00  MFU 37.5%  (causal 25.0%)  3.0 images/s  learned 12%  "
ALL += "padding 50%"


def test_off_a_terminal_the_screen_prints_plain_lines_of_80_columns(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    screen = Screen(5194, 5197, every=0)
    for step in (5195, 5196, 5197):
        screen.show(step, FIGURES)
    screen.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 5195/5197, -:--:-- left",
        "step 5196/5197, 0:00:04 left",
        "step 5197/5197, 0:00:00 left",
    ]
    for line in lines:
        assert len(line) <= 80 and line.split("  ", 1)[1] == "loss 1.5000  10,000 tokens/s  lr 1.00e-03"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self) -> list[str]:
        """What was drawn, without what moves the cursor and colours."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue().replace("\r", "\n"))
        return [line.rstrip() for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("width", [50, 80, 100, 200])
def test_on_a_terminal_the_bar_is_one_line_with_step_total_and_time_left_first(width, monkeypatch):
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=width)
    monkeypatch.setattr(metrics, "Console", lambda stderr: console)
    screen = Screen(0, 665000)
    screen.show(123456, FIGURES)
    screen.say("step 123456: a line [with brackets]")
    screen.bar.refresh()
    screen.close()
    assert "step 123456: a line [with brackets]" in terminal.lines()
    line = terminal.lines()[-1]
    head, figures = re.fullmatch(r"(123456/665000 \S+ left \S+) (.+)", line).groups()
    assert len(line) <= width and ALL.startswith(figures) and "loss 1.5000" in figures
    if width == 200:
        assert figures == ALL


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
