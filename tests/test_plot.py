"""Losses as a picture."""

import io
import json

import pytest
from PIL import Image

from llava_jax import plot
from llava_jax.cli import UserError


def workdir(path, losses, stage="finetune", validation=()):
    """A workdir with what training writes of these losses."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"stage": stage}))
    lines = [{"step": step, "loss": loss, "seconds": 1.0} for step, loss in enumerate(losses, 1)]
    lines += [{"step": step, "validation_loss": loss} for step, loss in validation]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_is_drawn_is_what_training_wrote(tmp_path):
    run = workdir(tmp_path / "run", [3.0, 2.0, 1.0], validation=[(2, 2.5)])
    (run / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # as a crash leaves it, or a run that is writing
    assert plot.read_losses(run) == {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)], "validation_loss": [(2, 2.5)]}
    svg = plot.draw({"a$b": plot.read_losses(run)}, {"a$b": "finetune"}, "svg").decode()
    for text in ("a$b: loss", "a$b: validation loss", "finetune"):
        assert f"<!-- {text} -->" in svg, "matplotlib writes each text as a comment beside its glyphs"


def test_the_command(tmp_path, capsys):
    run = workdir(tmp_path / "run", [3.0, 2.0])
    plot.main(["--workdir", str(run)])
    assert capsys.readouterr().out == f"{run}/loss.png\n"
    assert Image.open(run / "loss.png").format == "PNG"
    first, second = workdir(tmp_path / "a" / "finetune", [0.0, 2.0]), workdir(tmp_path / "b" / "finetune", [3.0])
    stage_1 = workdir(tmp_path / "a" / "pretrain", [4.0], stage="pretrain")
    output = tmp_path / "new" / "all.svg"
    plot.main(["--workdir", str(first), f"{second}/", f"--workdir={stage_1}", "--output", str(output)])
    text = output.read_text()
    assert all(f"<!-- {name} -->" in text for name in ("a/finetune: loss", "b/finetune: loss", "a/pretrain: loss"))
    assert text.count("<!-- loss -->") == 2, "the axes of a panel for each stage"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no metrics.jsonl"),
        ("", "holds no losses yet"),
        ('{"step": 0, "vqa": 3.0}\n', "holds no losses yet"),
        ('{"step": 1, "loss": 1.0}\nbroken\n{"step": 2, "loss": 1.0}\n', "line 2: is no line of metrics"),
        ('{"loss": 1.0}\n{"step": 2, "loss": 1.0}\n', "line 1: is no line of metrics"),
    ],
)
def test_nothing_to_draw_is_an_error_and_for_training_a_warning(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        plot.main(["--workdir", str(tmp_path)])
    assert not (tmp_path / "loss.png").exists()
    plot.plot_own(str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}: no loss.png: ") and message in line


def test_bad_arguments(tmp_path, capsys):
    run = workdir(tmp_path / "run", [3.0])
    with pytest.raises(UserError, match=r"losses.txt: a chart is .png, .svg, .pdf"):
        plot.main(["--workdir", str(run), "--output", str(tmp_path / "losses.txt")])
    with pytest.raises(SystemExit):
        plot.main(["--workdir", str(run), str(run)])
    assert "several workdirs need --output" in capsys.readouterr().err
    assert Image.open(io.BytesIO(plot.draw({"a": {"loss": [(1, -1.0)], "validation_loss": []}}, {"a": ""}))).width > 0
