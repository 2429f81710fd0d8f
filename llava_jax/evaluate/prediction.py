"""What `predict` does with a checkpoint: every process answers its share, and the first one writes them all."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llava_jax.cli import say, track
from llava_jax.data.names import folder_of
from llava_jax.evaluate.answer_file import AnswerFile, Key
from llava_jax.evaluate.answering import Answering, Asking, batches, replicas
from llava_jax.evaluate.questions import Question, key_of
from llava_jax.inference.options import open_model
from llava_jax.inference.requests import Sampling
from llava_jax.parallel import distributed

START_SECONDS = 300  # until all processes have met


def predict(args: argparse.Namespace, questions: Sequence[Question]) -> None:
    sampling = Sampling(args.temperature, args.top_p, args.seed, args.max_tokens)
    asking = Asking(folder_of(args), sampling, args.batch_rows, args.picture_last, args.answer_prompter)
    with distributed.joined(args.coordinator, args.num_processes, args.process_id, START_SECONDS):
        file = AnswerFile(args.output, questions, args.model_id, jax.process_index())
        answered = {tuple(key) for keys in _gathered("answered", list(file.lines)) for key in keys}
        waiting = [question for question in questions if question.key not in answered]
        if waiting:
            _answer(args, asking, file, batches(waiting, asking.batch_rows), len(answered))
        everybodys = {key_of(line): line for lines in _gathered("answers", list(file.lines.values())) for line in lines}
        if distributed.is_first():
            say(f"{file.finish(everybodys)} answers: {args.output}", file=sys.stderr)
        distributed.barrier("answers are written")
        file.remove_part()


def _answer(
    args: argparse.Namespace, asking: Asking, file: AnswerFile, work: Sequence[Sequence[Question]], answered: int
) -> None:
    """Answers this process's share of the batches, which are about as long as those of others."""
    share = work[jax.process_index() :: jax.process_count()]
    if answered:
        say(f"{args.output}: goes on after {answered} answers", file=sys.stderr)
    checkpoint, template = open_model(args)
    if asking.picture_last:
        checkpoint = checkpoint.with_image_position("as_is")
    answering = Answering(replicas(checkpoint, template, args.devices_each), asking, share)

    def one_by_one() -> Iterator[Question]:
        for answers in answering:
            file.add(answers)
            yield from (question for question, _ in answers)

    count = sum(map(len, share))
    for _ in track(one_by_one(), "answering", total=count):
        pass
    file.flush()
    say(
        f"{count} answers in {answering.seconds:.1f} s, {count / max(answering.seconds, 1e-9):.1f} a second; devices "
        f"were idle for {answering.idle:.1%} of it",
        file=sys.stderr,
    )


def _gathered(name: str, values: list[dict | Key]) -> list[list]:
    """Everybody's values, which JSON can hold."""
    encoded = np.frombuffer(json.dumps(values).encode(), np.uint8)
    return [json.loads(array.tobytes()) for array in distributed.gather(name, encoded)]
