"""Draws the losses of training runs: `python -m llava_jax.plot --workdir D [D ...]`.

The figure has a panel for each stage. Training losses are solid lines, validation losses dashed ones. Training draws
`loss.png` in its workdir when it ends; this command draws it at any time, and several runs in one figure.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from llava_jax.cli import Parser, UserError, run, say, warn
from llava_jax.files.reading import loads, read_object, require_regular
from llava_jax.files.writing import atomic_file

EPILOG = """examples:
  python -m llava_jax.plot --workdir runs/finetune
  python -m llava_jax.plot --workdir runs/a runs/b --output losses.svg
"""
LOSS = "loss.png"
METRICS = "metrics.jsonl"
NAMES = ("loss", "validation_loss")
FORMATS = ("png", "svg", "pdf")
Points = list[tuple[int, float]]


def read_losses(workdir: epath.PathLike) -> dict[str, Points]:
    """The (step, loss) points of a workdir by name. Raises UserError if there are none yet or a line is damaged."""
    file = epath.Path(workdir) / METRICS
    if not file.exists():
        raise UserError(f"{workdir}: holds no {METRICS}: is it a training workdir that has finished its first step?")
    require_regular(file)
    lines = file.read_bytes().splitlines()
    losses: dict[str, Points] = {name: [] for name in NAMES}
    for number, line in enumerate(lines, 1):
        try:
            values = loads(line, strict=False)
            for name in NAMES:
                if name in values:
                    losses[name].append((int(values["step"]), float(values[name])))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number < len(lines):  # a crash may have cut off the last one, or it is being written
                raise UserError(f"{file}: line {number}: is no line of metrics ({error})") from None
    if not any(losses.values()):
        raise UserError(f"{file}: holds no losses yet")
    return losses


def stage_of(workdir: epath.PathLike) -> str:
    """The stage that a workdir trains; "" if its config.json does not say."""
    try:
        return str(read_object(epath.Path(workdir) / "config.json", strict=False)["stage"])
    except (OSError, UserError, KeyError):
        return ""


def draw(runs: Mapping[str, Mapping[str, Points]], stages: Mapping[str, str], format: str = "png") -> bytes:
    """Draws runs, by name. `stages` has the stage of each. -> the bytes of an image file"""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(stages[name] for name in runs))
    figure = Figure(figsize=(max(6.4, 4.5 * len(panels)), 3.6), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(name for name in runs if stages[name] == stage):
            _lines(axes, name, runs[name], 2 * number)
        axes.set(title=_plain(stage), xlabel="step", ylabel="loss")
        shown = [loss for name in runs if stages[name] == stage for points in runs[name].values() for _, loss in points]
        axes.set_yscale("log" if min(shown) > 0 else "linear")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format=format, dpi=120)
    return data.getvalue()


def _lines(axes: Any, name: str, losses: Mapping[str, Points], colour: int) -> None:
    for number, (kind, style) in enumerate(zip(NAMES, ("-", "--"), strict=True), colour):
        if points := losses[kind]:
            steps, values = zip(*points, strict=True)
            marker = "." if len(points) < 20 else None
            label = _plain(f"{name}: {kind.replace('_', ' ')}")
            axes.plot(steps, values, style, color=f"C{number % 10}", marker=marker, label=label)


def _plain(text: str) -> str:
    """Escapes what matplotlib would typeset as mathematics."""
    return text.replace("$", r"\$")


def plot(workdirs: Sequence[str], output: epath.PathLike) -> None:
    """Draws the losses of workdirs into a file."""
    suffix = PurePosixPath(output).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise UserError(f"{output}: a chart is .{', .'.join(FORMATS)}")
    labels = _labels(workdirs)
    runs = {label: read_losses(workdir) for label, workdir in labels.items()}
    chart = draw(runs, {label: stage_of(workdir) for label, workdir in labels.items()}, suffix)
    epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as file:
        file.write(chart)


def _labels(workdirs: Sequence[str]) -> dict[str, str]:
    """A label for each workdir: the shortest end of its path that differs from those of the others."""
    paths = {workdir: PurePosixPath(workdir.rstrip("/") or "/").parts for workdir in dict.fromkeys(workdirs)}
    for parts in range(1, max(map(len, paths.values())) + 1):
        labels = {"/".join(path[-parts:]): workdir for workdir, path in paths.items()}
        if len(labels) == len(paths):
            return labels
    return {workdir: workdir for workdir in paths}


def plot_own(workdir: str) -> None:
    """Draws the losses of a run that ended. An error is only a warning."""
    try:
        plot([workdir], epath.Path(workdir) / LOSS)
    except Exception as error:  # of matplotlib or a storage client
        warn(f"{workdir}: no {LOSS}: {' '.join(str(error).split())}")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    output = args.output or str(epath.Path(args.workdir[0]) / LOSS)
    plot(args.workdir, output)
    say(output)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.plot", description=__doc__, epilog=EPILOG)
    parser.add_argument("--workdir", required=True, nargs="+", action="extend", metavar="D", help="training workdirs")
    parser.add_argument("--output", metavar="F", help=f"a .png, .svg or .pdf file (default: {LOSS} in the workdir)")
    args = parser.parse_args(argv)
    if len(args.workdir) > 1 and not args.output:
        parser.error("several workdirs need --output F")
    return args


if __name__ == "__main__":
    run(main)
