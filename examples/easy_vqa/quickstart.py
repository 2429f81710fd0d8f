"""LLaVA from nothing on two cores: backbones, import, both stages, evaluation, export, one answered question.

Only the backbones are special to this example. All else are the commands for models of any size, printed as they run.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

from examples.commands import command
from examples.easy_vqa.data import IMAGES
from llava_jax.cli import run
from llava_jax.files.writing import atomic_file
from llava_jax.plot import plot

ROOT = Path("runs/quickstart")
QUESTION, IMAGE = "what is the color of the shape?", IMAGES / "test/images/0.png"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m examples.easy_vqa.quickstart", description=__doc__).parse_args(argv)
    began = time.monotonic()
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    seconds = {}

    def step(name: str, *arguments: str) -> str:
        start = time.monotonic()
        output = command(ROOT, *arguments).output
        seconds[name] = round(time.monotonic() - start, 1)
        return output

    python = ("examples.easy_vqa.backbones", "--output")
    step("data and backbones", *python, f"{ROOT}")
    step(
        "import",
        *("llava_jax.convert", "import", "--llm", f"{ROOT}/llama", "--vision", f"{ROOT}/clip"),
        *("--output", f"{ROOT}/import", "--aspect", "square"),
    )
    for stage, init, data in (("pretrain", "import", "captions"), ("finetune", "pretrain", "conversations")):
        step(
            stage,
            *("llava_jax.main", f"--config=configs/quickstart.py:{stage}", f"--workdir={ROOT}/{stage}"),
            *(f"--config.init={ROOT}/{init}", f"--config.data.json={ROOT}/data/{data}.json"),
            f"--config.data.images={IMAGES}",
        )
    questions, answers = f"{ROOT}/data/questions.json", f"{ROOT}/answers.jsonl"
    step(
        "answers",
        *("llava_jax.evaluate", "predict", "easy-vqa", "--checkpoint", f"{ROOT}/finetune", "--batch-rows", "256"),
        *("--questions", questions, "--images", f"{IMAGES}", "--output", answers),
    )
    score = json.loads(
        step("score", "llava_jax.evaluate", "score", "easy-vqa", "--answers", answers, "--labels", questions, "--json")
    )
    step("export", *("llava_jax.convert", "export", "--checkpoint", f"{ROOT}/finetune", "--output", f"{ROOT}/export"))
    chat = ("llava_jax.chat", "--checkpoint", f"{ROOT}/finetune", "--image", f"{IMAGE}")
    answer = step("one answer", *chat, "--prompt", QUESTION).strip()
    plot([f"{ROOT}/pretrain", f"{ROOT}/finetune"], ROOT / "loss.png")

    seconds["total"] = round(time.monotonic() - began, 1)
    summary = {
        "accuracy": score["accuracy"] / 100,
        "accuracy_by_type": {kind: accuracy / 100 for kind, accuracy in score["by_kind"].items()},
        "questions": score["total"],
        "seconds": seconds,
        "checkpoint": f"{ROOT}/finetune",
        "export": f"{ROOT}/export",
        "loss_curve": f"{ROOT}/loss.png",
        "question": {"image": str(IMAGE), "question": QUESTION, "answer": answer},
    }
    with atomic_file(ROOT / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    print(report(summary, chat))


def report(summary: dict, chat: tuple[str, ...]) -> str:
    minutes = summary["seconds"]["total"] / 60
    kinds = "\n".join(f"  {name:20}  {value:7.2%}" for name, value in summary["accuracy_by_type"].items())
    times = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items() if name != "total")
    asked = summary["question"]
    return f"""
{summary["accuracy"]:.2%} of {summary["questions"]:,} test questions answered right, after {minutes:.1f} minutes
{kinds}
{asked["question"]} ({asked["image"].removeprefix(str(IMAGES) + "/")}): {asked["answer"]}
time: {times}
loss curve: {summary["loss_curve"]}; everything as numbers: {ROOT}/summary.json

Go on:
  {sys.executable} -m {shlex.join(chat)}
  transformers.LlavaForConditionalGeneration.from_pretrained("{summary["export"]}")  # with torch installed
"""


if __name__ == "__main__":
    run(main)
