"""A bar for each category and run, with its confidence interval."""

import io
from collections.abc import Sequence

from llava_jax.cli import short
from llava_jax.evaluate.comparison import Row


def draw(runs: Sequence[str], rows: Sequence[Row]) -> bytes:
    """The chart as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(max(6.0, 0.35 * len(rows) * (len(runs) + 1)), 400.0), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        bars = [(place, row.values[number]) for place, row in enumerate(rows) if row.values[number]]
        values = [interval.value for _, interval in bars]
        errors = [
            [max(0.0, interval.value - interval.low) for _, interval in bars],
            [max(0.0, interval.high - interval.value) for _, interval in bars],
        ]
        places = [place + (number - (len(runs) - 1) / 2) * width for place, _ in bars]
        axes.bar(places, values, width, yerr=errors, capsize=2, label=_plain(run))
    axes.set_xticks(range(len(rows)), [_plain(short(f"{row.benchmark}\n{row.category}")) for row in rows])
    axes.tick_params(axis="x", labelrotation=45 if len(rows) > 6 else 0)
    axes.set_ylabel("percent, with 95% intervals")
    axes.legend(fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _plain(text: str) -> str:
    """Without what matplotlib would typeset."""
    return text.replace("$", r"\$")
