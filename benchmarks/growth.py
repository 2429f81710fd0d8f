"""Writes the page `growth` of the docs: how memory and time grow with rows, positions, images, devices, samples, slots.

    python benchmarks/growth.py

Steps are compiled for machines you don't have; their results are kept like those of machines.py. Plans and the engine
run on this machine. An exponent p says that a quantity grows like x^p: the slope of a straight line through the
logarithms of the larger half of the points, where constant parts weigh least.
"""

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machines import GiB, installed, preflight, spelled, table
from peers import CONFIG, Side
from serve import ANSWER, CONTEXT, EngineSide

from llava_jax import cli
from llava_jax.data.packing import fill, image_slot_plans
from llava_jax.data.plan import Lengths, Order
from llava_jax.files.writing import atomic_file

ROOT = Path(__file__).parents[1]
DOCS = Path("docs")
PAGE, PLOT = DOCS / "growth.md", DOCS / "images/growth.svg"
RECIPE = "finetune.py:7b"


class Series(NamedTuple):
    """Quantities at growing x.

    Attributes:
      what: that grows.
      setting: in words, with the command.
      xs: its values.
      columns: name of a quantity with its unit -> its values.
    """

    what: str
    setting: str
    xs: list[int]
    columns: dict[str, list[float]]

    def exponents(self) -> dict[str, float]:
        """By column."""
        half = len(self.xs) // 2
        x = np.log(self.xs[half:])
        return {name: float(np.polyfit(x, np.log(values[half:]), 1)[0]) for name, values in self.columns.items()}


def compiled(what: str, xs: list[int], target: Callable[[int], str], changes: Callable[[int], dict]) -> Series:
    """A step of stage 2 of 7B at each x."""
    results = [preflight(RECIPE, target(x), **changes(x)) for x in xs]
    columns = {
        "memory, GiB a device": [result["memory"]["needed"] / GiB for result in results],
        "activations, GiB a device": [result["memory"]["activations"] / GiB for result in results],
        "predicted s": [result["prediction"]["seconds"] for result in results],
    }
    names = sorted({target(x) for x in xs}, key=len)
    options = " ".join(f"--config.{key}={value}" for key, value in changes(xs[-1]).items())
    setting = (
        f"Stage 2, 7B, compiled for {names[0]}{f' to {names[-1]}' if names[1:] else ''}; the last row is `{options}`."
    )
    return Series(what, setting, xs, columns)


def rows(count: int, devices: int, **changes: Any) -> dict[str, Any]:
    """`count` rows on each device, without accumulation."""
    return {"batch_rows": count * devices, "max_rows_per_device": count} | changes


def planned(counts: list[int]) -> Series:
    """Packing an epoch of samples with random lengths."""
    seconds, shares = [], []
    for count in counts:
        rng = np.random.default_rng(0)
        tokens = np.minimum(rng.lognormal(6.2, 0.6, count), 2048).astype(np.int32)
        images = (rng.random(count) < 15 / 16).astype(np.int32)
        order = Order(np.arange(count), 32, seed=0)
        before = time.perf_counter()
        plan = image_slot_plans(order, Lengths(tokens, tokens // 2, images, images), 4096, 4)[0]
        shares.append(fill(plan).tokens)
        seconds.append(time.perf_counter() - before)
    setting = "Packing plans of an epoch, rows of 4096 positions, one core, and the share of positions that they use."
    return Series("samples", setting, counts, {"s": seconds, "used share": shares})


def served(slots: list[int]) -> Series:
    """The engine with all slots busy."""
    speeds, memory = [], []
    for count in slots:
        side = Side(EngineSide({"slots": count, "kept": 0}), CONFIG)
        runs = [side.call(("together", run, count))[0] for run in range(3)][1:]
        speeds.append(max(count * ANSWER / seconds for seconds, _ in runs))
        memory.append(side.stop() / GiB)
    setting = f"The engine with that many requests at a time, a context of {CONTEXT}; the model is serve.py's, float32."
    return Series("slots", setting, slots, {"tokens/s": speeds, "peak memory, GiB": memory})


def all_series() -> Iterator[Series]:
    one_row = functools.partial(rows, 1)
    yield compiled("rows a device", [1, 2, 4, 8], lambda x: "h100:8", lambda x: rows(x, 8))
    yield compiled("positions a row", [1024, 2048, 4096, 8192], lambda x: "h100:8", lambda x: one_row(8, max_length=x))
    yield compiled(
        "images a row", [1, 2, 4, 8], lambda x: "h100:8", lambda x: one_row(8, image_slots=x, max_length=8192)
    )
    yield compiled("GPUs", [8, 16, 64, 128, 512], lambda x: f"h100:{x // 8}x8" if x > 8 else "h100:8", one_row)
    slices = {8: "2x2x2", 32: "2x4x4", 128: "4x4x8", 512: "8x8x8"}
    yield compiled("TPU chips", list(slices), lambda x: f"v5p:{slices[x]}", one_row)
    yield planned([10_000, 30_000, 100_000, 300_000, 1_000_000])
    yield served([1, 2, 4, 8, 16])


def main() -> None:
    found = []
    for series in all_series():
        found.append(series)
        print(f"{series.what}: " + ", ".join(f"{n} ~ x^{p:.2f}" for n, p in series.exponents().items()), flush=True)
    lines = [
        "# Growth",
        "",
        "`python benchmarks/growth.py` writes this page: how memory and time grow. Steps are compiled ahead of time "
        f"({spelled(installed())}), and their times predicted ([prediction](prediction.md)); nothing of them was run. "
        "The last line of a table is the exponent p of x^p, fitted to the larger half of its rows.",
        "",
        "![Quantities relative to their first value, both axes logarithmic](images/growth.svg)",
        "",
    ]
    for series in found:
        header = [series.what, *series.columns]
        body = [
            [f"{x:,}", *(f"{values[number]:.4g}" for values in series.columns.values())]
            for number, x in enumerate(series.xs)
        ]
        body.append(["exponent", *(f"{value:.2f}" for value in series.exponents().values())])
        lines += [f"## {series.what[0].upper()}{series.what[1:]}", "", series.setting, "", table(header, body)]
    with atomic_file(ROOT / PAGE) as file:
        file.write("\n".join(lines).rstrip().encode() + b"\n")
    with atomic_file(ROOT / PLOT) as file:
        file.write(plot(found).encode())
    print(f"written to {PAGE} and {PLOT}", file=sys.stderr)


def plot(found: list[Series]) -> str:
    """A panel for each series, as SVG: every quantity relative to its first value."""
    side, gap, text = 190, 40, 14
    width = 4 * (side + gap) + gap
    height = math.ceil(len(found) / 4) * (side + 110)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>Growth of memory and time, relative to the first value; both axes are logarithmic</title>",
        "<style>text{font:12px sans-serif;fill:#777}path{fill:none;stroke-width:2}rect{fill:none;stroke:#999}</style>",
    ]
    for number, series in enumerate(found):
        left, top = gap + number % 4 * (side + gap), 30 + number // 4 * (side + 110)
        span = math.log(series.xs[-1] / series.xs[0])
        lines.append(
            f'<text x="{left}" y="{top - 8}">{escape(series.what)}: {series.xs[0]:,} to {series.xs[-1]:,}</text>'
        )
        lines.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}"/>')
        for index, (name, values) in enumerate(series.columns.items()):
            colour = ("#4a7dbd", "#c55", "#5a9")[index]
            points = [
                (
                    left + side * math.log(x / series.xs[0]) / span,
                    top + side / 2 - side / 2 * math.log(y / values[0]) / span,
                )
                for x, y in zip(series.xs, values, strict=True)
            ]
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            lines.append(f'<path d="{path}" stroke="{colour}"/>')
            lines.append(
                f'<text x="{left}" y="{top + side + text * (index + 1)}" style="fill:{colour}">{escape(name)}: '
                f"x^{series.exponents()[name]:.2f}</text>"
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    cli.run(main)
