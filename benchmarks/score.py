"""Seconds of CPU that `evaluate score` takes for 10,000 answers to each benchmark, made up, apart from its start."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks.mme import PARTS

COUNT = 10_000


def people(i: int) -> list[dict[str, str]]:
    return [{"answer": f"{(i + k // 4) % 977} red cats, 1,000 of them"} for k in range(10)]


def write(path: Path, value: Any) -> str:
    lines = isinstance(value, list) and path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in value) if lines else json.dumps(value))
    return str(path)


def labels(root: Path) -> dict[str, str]:
    """A file of labels of each benchmark; ids are the numbers from 0 on, unless a benchmark's are others."""
    numbers = range(COUNT)
    challenge = [{"question_id": i, "image": f"{i}", "answer_type": "other", "answers": people(i)} for i in numbers]
    textvqa = [{"question_id": i, "image_id": f"p{i // 2}", "question": f"What is {i}?",
                "answers": [person["answer"] for person in people(i)]} for i in numbers]  # fmt: skip
    seed = [
        {"question_id": i, "question_type_id": i % 9, "data_type": "image", "answer": "ABCD"[i % 4]} for i in numbers
    ]
    names = "index\tquestion\tA\tB\tC\tD\tanswer\tcategory\n"
    rows = "".join(f"{i % 5000 + i // 5000 * 1_000_000}\tWhich?\tw\tx\ty\tz\tA\tc{i % 20}\n" for i in numbers)
    (root / "mmbench.tsv").write_text(names + rows)
    mme = root / "mme"
    mme.mkdir()
    categories = [name for part in PARTS.values() for name in part]
    for number, category in enumerate(categories):
        own = range(number, COUNT, len(categories))
        (mme / f"{category}.txt").write_text("".join(f"{i // 28}.png\tIs it {i}?\tYes\tyes\n" for i in own))
    turns = [{"from": "human", "value": "what shape is it?"}, {"from": "gpt", "value": "circle"}]
    pope = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a cat?", "label": "yes"} for i in numbers]
    return {
        "vqav2": write(root / "vqav2.json", {"annotations": challenge}),
        "vizwiz": write(root / "vizwiz.json", challenge),
        "textvqa": write(root / "textvqa.json", {"data": textvqa}),
        "gqa": write(root / "gqa.json", {i: {"answer": "cat", "types": {"structural": "query"}} for i in numbers}),
        "pope": write(root / "coco_pope_random.jsonl", pope),
        "mme": str(mme),
        "mmbench": str(root / "mmbench.tsv"),
        "seed": write(root / "seed.json", {"question_type": {f"kind {k}": k for k in range(9)}, "questions": seed}),
        "mm-vet": write(root / "mm-vet.json", {f"v1_{i}": {"capability": ["ocr", "math"]} for i in numbers}),
        "easy-vqa": write(root / "easy.json", [{"id": i, "conversations": turns} for i in numbers]),
    }


def answers(name: str, root: Path) -> str:
    categories = [category for part in PARTS.values() for category in part]
    lines = [{"question_id": i, "prompt": "?", "text": f"The {i % 977} red cats, 1,000 of them."} for i in range(COUNT)]
    for i, line in enumerate(lines):
        if name == "mme":
            line |= {"question_id": f"{categories[i % 14]}/{i // 28}.png", "prompt": f"Is it {i}?"}
        if name == "mmbench":
            line |= {"question_id": i % 5000 + i // 5000 * 1_000_000}
        if name == "textvqa":
            line |= {"prompt": f"What is {i}?"}
        if name == "mm-vet":
            line |= {"grade": 0.5}
    return write(root / f"{name}.answers.jsonl", lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for name, path in labels(root).items():
            given = answers(name, root)
            begin = time.process_time()
            evaluate.main(["score", name, f"--answers={given}", f"--labels={path}", "--json"])
            print(f"{name:<10}{time.process_time() - begin:6.2f} s for {COUNT:,} answers", file=sys.stderr)


if __name__ == "__main__":
    main()
