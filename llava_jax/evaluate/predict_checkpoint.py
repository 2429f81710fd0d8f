"""`predict` with a checkpoint: answers many questions on all devices of all processes.

Every process answers its share of the questions. Each replica of the model is on one device, or split over several, and
has a thread that feeds it; other threads read images a batch or two ahead.
"""

import argparse
import dataclasses
import functools
import itertools
import queue
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.cli import UserError, say, track
from llava_jax.data.image_folder import folder_of
from llava_jax.data.templates import Template
from llava_jax.evaluate.answer_file import AnswerFile
from llava_jax.evaluate.dataset_files import Image
from llava_jax.evaluate.questions import Question, key_of, read_images, request_turns
from llava_jax.inference.generate import Generator
from llava_jax.inference.options import open_model
from llava_jax.inference.requests import PreparedImage, Request, Sampling
from llava_jax.parallel import distributed

START_SECONDS = 300  # until all processes have met
READERS = 4  # threads of a process
AHEAD = 2  # batches of a replica that are read ahead
ANSWER_IS = " ###\nANSWER:"  # a model of ScienceQA continues from this after its reasons


class Asking(NamedTuple):
    """How questions become requests."""

    images: epath.PathLike  # the folder of images, see `data.image_folder`
    sampling: Sampling
    batch_rows: int
    image_last: bool = False  # after the question, as in the paper
    answer_prompter: bool = False  # ask again after the reasons, which end before the answer in the paper's models


def predict(args: argparse.Namespace, questions: Sequence[Question]) -> None:
    sampling = Sampling(args.temperature, args.top_p, args.seed, args.max_tokens)
    asking = Asking(folder_of(args), sampling, args.batch_rows, args.picture_last, args.answer_prompter)
    with distributed.joined(args.coordinator, args.num_processes, args.process_id, START_SECONDS):
        checkpoint, template = open_model(args)
        settings = {
            "checkpoint": [checkpoint.description.id, checkpoint.step],
            "template": template.name,
            "sampling": [args.temperature, args.top_p, args.seed if args.temperature else 0, args.max_tokens],
            "prompts": [args.picture_last, args.answer_prompter],
        }
        file = AnswerFile(args.output, questions, args.model_id, jax.process_index(), settings)
        answered = {tuple(key) for keys in distributed.gather_json("answered", list(file.lines)) for key in keys}
        waiting = [question for question in questions if question.key not in answered]
        if waiting:
            if answered:
                say(f"{args.output}: resumes after {len(answered)} answers", file=sys.stderr)
            if asking.image_last:
                checkpoint = checkpoint.with_model(image_position="as_is")
            _answer(replicas(checkpoint, template, args.devices_each), asking, file, batches(waiting, args.batch_rows))
        shares = distributed.gather_json("answers", list(file.lines.values()))
        lines = {key_of(line): line for share in shares for line in share}
        if distributed.is_first():
            say(f"{file.finish(lines)} answers: {args.output}", file=sys.stderr)
        distributed.barrier("answers are written")
        file.remove_part()


def _answer(
    generators: Sequence[Generator], asking: Asking, file: AnswerFile, work: Sequence[Sequence[Question]]
) -> None:
    """Answers this process's share of the batches, of about the same lengths as the shares of others."""
    share = work[jax.process_index() :: jax.process_count()]
    answering = Answering(generators, asking, share)

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


def batches(questions: Sequence[Question], rows: int) -> list[list[Question]]:
    """Batches of questions of about the same length, long ones first. Questions about an image are together, since
    their rows share its computation."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.images or (question.key,), []).append(question)

    def longest(group: list[Question]) -> tuple[int, int]:
        return len(group[0].images), max(len(question.text) for question in group)

    ordered = [question for group in sorted(groups.values(), key=longest, reverse=True) for question in group]
    return [ordered[start : start + rows] for start in range(0, len(ordered), rows)]


def replicas(checkpoint: Checkpoint, template: Template | None, devices_each: int) -> list[Generator]:
    """The model on each device of this process, or split over each `devices_each` of them."""
    devices = jax.local_devices()
    if devices_each < 1 or len(devices) % devices_each:
        raise UserError(f"--devices-each {devices_each}: does not divide the {len(devices)} devices of this process")
    groups = [devices[start : start + devices_each] for start in range(0, len(devices), devices_each)]
    return [Generator.from_checkpoint(checkpoint, template, devices=group) for group in groups]


class Answering:
    """Answers batches. An iteration gives the answers of each batch as soon as they are done.

    Attributes:
      seconds: since the start of the first batch.
    """

    def __init__(self, generators: Sequence[Generator], asking: Asking, work: Sequence[Sequence[Question]]):
        self.generators, self.asking, self.work = generators, asking, work
        self.seconds = 0.0

    @property
    def idle(self) -> float:
        """The share of the time in which devices were idle."""
        computing = sum(generator.computing for generator in self.generators)
        return 1 - computing / (self.seconds * len(self.generators)) if self.seconds else 0.0

    def __iter__(self) -> Iterator[list[tuple[Question, str]]]:
        begin = time.perf_counter()
        idle: queue.SimpleQueue[Generator] = queue.SimpleQueue()
        for generator in self.generators:
            generator.computing = 0.0
            idle.put(generator)
        count, work = len(self.generators), iter(self.work)
        running: set[Future] = set()
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(count) as workers:
            try:
                while True:
                    for batch in itertools.islice(work, (1 + AHEAD) * count - len(running)):
                        asker = {place: question for question in reversed(batch) for place in _places(question)}
                        images = {place: readers.submit(self._read, *place, asker[place]) for place in asker}
                        running.add(workers.submit(self._answer, idle, batch, images))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    self.seconds = time.perf_counter() - begin
                    for batch in sorted(done, key=lambda batch: batch.exception() is not None):  # errors come last
                        yield batch.result()
            finally:
                for pool in (workers, readers):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, name: Image, several: bool, asker: Question) -> PreparedImage:
        read = functools.partial(self.generators[0].prompts.read, several=several)
        (image,) = read_images(asker._replace(images=(name,)), self.asking.images, read)
        return image

    def _answer(
        self, idle: "queue.SimpleQueue[Generator]", batch: Sequence[Question], images: Mapping["Place", Future]
    ) -> list[tuple[Question, str]]:
        """Answers a batch with an idle generator, after its images are read."""
        position, last = self.generators[0].config.image_position, self.asking.image_last
        requests = [
            Request(request_turns(question, last, position), [images[place].result() for place in _places(question)])
            for question in batch
        ]
        generator = idle.get()
        try:
            return list(zip(batch, self._texts(generator, batch, requests), strict=True))
        finally:
            idle.put(generator)

    def _texts(self, generator: Generator, questions: Sequence[Question], requests: Sequence[Request]) -> list[str]:
        sampling, rows = self.asking.sampling, self.asking.batch_rows
        try:
            texts = [text.strip() for text in generator.answer(requests, sampling, rows)]
            if not self.asking.answer_prompter:
                return texts
            again = [dataclasses.replace(r, begun=text + ANSWER_IS) for r, text in zip(requests, texts, strict=True)]
            answers = generator.answer(again, sampling, rows)
        except UserError as error:
            raise UserError(f"question {_longest(generator, questions, requests)}: {error}") from error
        return [f"{text}\n The answer is {answer.strip()}" for text, answer in zip(texts, answers, strict=True)]


Place = tuple[Image, bool]  # an image, and whether it is one of several of a question


def _places(question: Question) -> list[Place]:
    return [(name, len(question.images) > 1) for name in question.images]


def _longest(generator: Generator, questions: Sequence[Question], requests: Sequence[Request]) -> Any:
    """The id of the question whose prompt leaves the least room for an answer."""
    return questions[int(np.argmin([generator.room(request) for request in requests]))].id
