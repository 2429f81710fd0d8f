"""Answers to easy-VQA in batches and one by one, with the same checkpoint, on this machine: `--help` has an example.

Both go the way of `evaluate predict`, after a round in which programs are compiled. Answers have to be the same.
"""

import argparse
import statistics

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.evaluate.predict_checkpoint import Answering, Asking, batches, replicas
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Sampling


def answer(
    generators: list[Generator], questions: list[Question], images: str, rows: int
) -> tuple[dict[str, str], float, float]:
    """-> the answers by id, how many a second, and for which share of the time the device had nothing to do."""
    answering = Answering(generators, Asking(images, Sampling(max_new_tokens=8), rows), batches(questions, rows))
    texts = {question.id: text for answers in answering for question, text in answers}
    return texts, len(questions) / answering.seconds, answering.idle


def main() -> None:
    args = _parse()
    generators = replicas(open_checkpoint(args.checkpoint), None, 1)
    questions = read_questions([args.questions], "")[: args.limit]
    rates: dict[int, list[float]] = {1: [], args.batch_rows: []}
    for round_ in range(args.runs + 1):
        answers = {}
        for rows in rates:
            answers[rows], rate, idle = answer(generators, questions, args.images, rows)
            if round_:
                rates[rows].append(rate)
                print(f"{rows:>4} at a time: {rate:8.1f} answers a second, device idle for {idle:.1%}", flush=True)
        different = sum(answers[1][ident] != text for ident, text in answers[args.batch_rows].items())
    one, many = (statistics.median(values) for values in rates.values())
    print(f"medians of {args.runs}: {one:.1f} and {many:.1f} answers a second, {many / one:.2f} x; "
          f"{different} of {len(questions)} answers differ")  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example, after `make quickstart`:\n  python benchmarks/predict.py "
        "--checkpoint runs/quickstart/finetune "
        "\\\n    --questions runs/quickstart/data/questions.json --images "
        "$(python -c 'from examples.easy_vqa.data import IMAGES; print(IMAGES)')",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="D")
    parser.add_argument("--questions", required=True, metavar="F")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, default=512, metavar="N", help="questions (default: 512)")
    parser.add_argument("--batch-rows", type=int, default=64, metavar="N", help="at a time (default: 64)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each (default: 3)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
