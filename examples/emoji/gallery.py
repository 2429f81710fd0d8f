"""An image of some of the test's emoji with the assistant's answers, drawn from the outcomes that `score` writes."""

import json
import random
import textwrap
from pathlib import Path

from PIL import Image

from examples.emoji.data import NAME
from llava_jax.cli import Parser, run, say
from llava_jax.files.writing import atomic_file

COLUMNS, ROWS = 8, 3
RIGHT, WRONG = "#1a7f37", "#cf222e"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.emoji.gallery", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, metavar="D", help="of examples.emoji.recipe")
    parser.add_argument("--output", required=True, type=Path, metavar="F", help="a PNG file")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of emoji")
    args = parser.parse_args(argv)
    file = args.root / "outcomes/assistant/emoji.outcomes.jsonl"
    outcomes = [json.loads(line) for line in file.read_text().splitlines()]
    named = [outcome for outcome in outcomes if NAME in outcome["categories"]]
    shown = random.Random(args.seed).sample(named, min(COLUMNS * ROWS, len(named)))
    with atomic_file(args.output) as out:
        draw(shown, args.root / "images", out)
    right = sum(outcome["score"] for outcome in named) / len(named)
    say(f"{args.output}: {len(shown)} of {len(named)} emoji, chosen at random, of which {right:.0%} are named right")


def draw(outcomes: list[dict], images: Path, out) -> None:
    """An image for each outcome with the answer below it and, if that is wrong, the right one."""
    from matplotlib.figure import Figure  # takes a second

    rows = -(-len(outcomes) // COLUMNS)
    figure = Figure(figsize=(1.3 * COLUMNS, 1.45 * rows), layout="constrained", facecolor="white")
    for axes, outcome in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, outcomes, strict=False):
        axes.imshow(Image.open(images / outcome["image"]))
        right = outcome["score"] == 1
        answer = outcome["answer"].rstrip(".")
        label = answer if right else f"{answer}\n(no: {outcome['reference']})"
        axes.set_xlabel("\n".join(textwrap.fill(line, 20) for line in label.splitlines()), fontsize=8)
        axes.xaxis.label.set_color(RIGHT if right else WRONG)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(out, format="png", dpi=150)


if __name__ == "__main__":
    run(main)
