"""Answers every test question of easy-VQA by greedy decoding and compares with the right answers.

An answer counts only if it is exactly the right word.
"""

import argparse
import collections
import json
from pathlib import Path

from examples.easy_vqa.data import IMAGES, Question, kind
from llava_jax.checkpoint import open_checkpoint
from llava_jax.cli import run, track
from llava_jax.data.sources import LlavaJson
from llava_jax.generate import Generator, Request, Sampling

BATCH = 256
LONGEST_ANSWER = 8  # tokens; the longest right one has two, with its end mark


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    generator = Generator.from_checkpoint(open_checkpoint(args.checkpoint))
    samples = list(LlavaJson(args.questions))  # those of a picture together: they share its computation
    answers = []
    for start in track(range(0, len(samples), BATCH), "answering"):
        requests = [
            Request(sample.turns[:1], [IMAGES / name for name in sample.images])
            for sample in samples[start : start + BATCH]
        ]
        answers += generator.answer(requests, Sampling(max_new_tokens=LONGEST_ANSWER), batch_rows=BATCH)
    correct, asked = collections.Counter(), collections.Counter()
    with Path(args.output).open("w") as file:
        for sample, answer in zip(samples, answers, strict=True):
            (_, question), (_, right) = sample.turns
            group = kind(Question(question, right))
            asked[group] += 1
            correct[group] += answer == right
            line = {"id": sample.id, "question": question, "answer": answer, "right": right, "type": group}
            print(json.dumps(line), file=file)
    score = {
        "accuracy": correct.total() / asked.total(),
        "accuracy_by_type": {group: correct[group] / asked[group] for group in sorted(asked)},
        "questions": asked.total(),
    }
    print(json.dumps(score))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.easy_vqa.evaluate",
        description=__doc__,
        epilog="example:\n  python -m examples.easy_vqa.evaluate --checkpoint runs/quickstart/finetune "
        "--questions runs/quickstart/data/questions.json --output answers.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="D")
    parser.add_argument(
        "--questions", required=True, metavar="F", help="questions.json as examples.easy_vqa.data writes it"
    )
    parser.add_argument("--output", required=True, metavar="F", help="where the answers go, JSONL")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
