"""What quantization costs: the validation loss of SmolLM2 after LoRA on an unquantized, an int8 and an NF4 base.

Starts from what `examples.smollm2.recipe` wrote, or makes the tower, the data and the import itself.
"""

import json
from pathlib import Path

from examples.commands import command
from examples.easy_vqa import data
from examples.easy_vqa.data import IMAGES
from examples.smollm2.recipe import language_model
from llava_jax.cli import Parser, run

ROOT = Path("runs/smollm2-quantized")
BASES = ("", "int8", "nf4")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.smollm2.quantized", description=__doc__)
    parser.add_argument("--steps", type=int, default=90, help="of LoRA, for each base (default: %(default)s)")
    args = parser.parse_args(argv)
    start = prepare()
    losses = {base or "as imported": train(start, base, args.steps) for base in BASES}
    for base, loss in losses.items():
        print(f"{base:12} validation loss {loss:.4f}, {loss / losses['as imported'] - 1:+.2%}")


def prepare() -> Path:
    """The checkpoint to start from; the data is beside it."""
    done = Path("runs/smollm2")
    if (done / "import").exists():
        return done / "import"
    from examples.easy_vqa import tower  # and JAX, which takes seconds

    ROOT.mkdir(parents=True, exist_ok=True)
    if not (ROOT / "import").exists():
        data.write(ROOT / "data")
        tower.train(ROOT / "clip")
        command(
            ROOT,
            *("llava_jax.convert", "import", "--llm", f"{language_model()}", "--vision", f"{ROOT}/clip"),
            *("--output", f"{ROOT}/import", "--template", "chatml", "--aspect", "square"),
        )
    return ROOT / "import"


def train(start: Path, base: str, steps: int) -> float:
    """The validation loss after LoRA on a base of this type."""
    workdir = ROOT / f"{base or 'plain'}-{steps}"
    command(
        ROOT,
        *("llava_jax.main", "--config=configs/smollm2.py:finetune", f"--workdir={workdir}", f"--config.init={start}"),
        *(f"--config.data.json={start.parent}/data/conversations.json", f"--config.data.images={IMAGES}"),
        *(f"--config.steps={steps}", "--config.lora.rank=16", f"--config.base_dtype={base}"),
    )
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in lines if "validation_loss" in line][-1]


if __name__ == "__main__":
    run(main)
