"""Answers many questions with a checkpoint, on all devices of this process.

Each replica of the model lies on one device, or is split over several, and has a thread that feeds it. Pictures are
read by other threads, a batch or two ahead.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.cli import UserError
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import decode_image, load_image
from llava_jax.data.templates import Template
from llava_jax.evaluate.questions import Question, marked, system_turns
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling

READERS = 4  # threads of a process
AHEAD = 2  # batches of a replica that are read ahead
ANSWER_IS = " ###\nANSWER:"  # what a model of ScienceQA goes on from, after its reasons


class Asking(NamedTuple):
    """How questions become requests."""

    images: epath.PathLike  # the folder of images, see `names.ImageFolder`
    sampling: Sampling
    batch_rows: int
    picture_last: bool = False  # as the paper's models have it, which end questions with the picture
    answer_prompter: bool = False  # asks again after the reasons, which for the paper's models end before the answer


def batches(questions: Sequence[Question], rows: int) -> list[list[Question]]:
    """Batches of questions that have about the same length, long ones first, those about a picture together: their
    rows share its computation."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.pictures or (question.key,), []).append(question)

    def longest(group: list[Question]) -> tuple[int, int]:
        return len(group[0].pictures), max(len(question.text) for question in group)

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
    """Answers batches. Iterating gives the answers of a batch as soon as they are there.

    Attributes:
      seconds: from the first batch on.
    """

    def __init__(self, generators: Sequence[Generator], asking: Asking, work: Sequence[Sequence[Question]]):
        self.generators, self.asking, self.work = generators, asking, work
        self.seconds = 0.0

    @property
    def idle(self) -> float:
        """The share of the time in which devices had nothing to do."""
        computing = sum(generator.computing for generator in self.generators)
        return 1 - computing / (self.seconds * len(self.generators)) if self.seconds else 0.0

    def __iter__(self) -> Iterator[list[tuple[Question, str]]]:
        begin = time.perf_counter()
        for generator in self.generators:
            generator.computing = 0.0
        prepared: queue.Queue[Any] = queue.Queue(AHEAD * len(self.generators))
        done: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()
        with ThreadPoolExecutor(READERS) as readers:
            threads = [threading.Thread(target=self._prepare, args=(readers, prepared, stop), daemon=True)]
            threads += [threading.Thread(target=self._answer, args=(generator, prepared, done, stop), daemon=True)
                        for generator in self.generators]  # fmt: skip
            for thread in threads:
                thread.start()
            try:
                for _ in self.work:
                    result = done.get()
                    if isinstance(result, BaseException):
                        raise result
                    self.seconds = time.perf_counter() - begin
                    yield result
            finally:
                stop.set()
                for thread in threads:
                    while thread.is_alive():  # whoever waits to put or to get something goes on
                        _drain(prepared)
                        prepared.put_nowait(None)
                        thread.join(0.05)

    def _prepare(self, readers: ThreadPoolExecutor, prepared: queue.Queue, stop: threading.Event) -> None:
        try:
            for batch in self.work:
                asker = {name: question for question in reversed(batch) for name in question.pictures}
                pictures = dict(zip(asker, readers.map(self._read, asker, asker.values()), strict=True))
                if stop.is_set():
                    return
                prepared.put([(question, self._request(question, pictures)) for question in batch])
        except BaseException as error:
            prepared.put(error)  # behind what can be answered
            return
        for _ in self.generators:
            prepared.put(None)

    def _read(self, name: str | bytes, asker: Question) -> np.ndarray:
        try:
            of_file = not isinstance(name, bytes)
            image = load_image(image_path(self.asking.images, name)) if of_file else decode_image(name)
            return self.generators[0].prompts.read(image)
        except UserError as error:
            raise UserError(f"question {asker.id}: {error}") from error

    def _request(self, question: Question, pictures: dict[str | bytes, np.ndarray], begun: str = "") -> Request:
        text = marked(question, self.asking.picture_last, self.generators[0].config.image_position)
        turns = [*system_turns(question), ("user", text)]
        return Request(turns, [pictures[name] for name in question.pictures], begun)

    def _answer(self, generator: Generator, prepared: queue.Queue, done: queue.Queue, stop: threading.Event) -> None:
        try:
            while not stop.is_set() and (batch := prepared.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                texts = self._texts(generator, [question for question, _ in batch], [request for _, request in batch])
                done.put([(question, text) for (question, _), text in zip(batch, texts, strict=True)])
        except BaseException as error:
            done.put(error)

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


def _longest(generator: Generator, questions: Sequence[Question], requests: Sequence[Request]) -> Any:
    """The id of the question that leaves the least room for an answer."""
    return questions[int(np.argmin([generator.room(request) for request in requests]))].id


def _drain(waiting: queue.Queue) -> None:
    while True:
        try:
            waiting.get_nowait()
        except queue.Empty:
            return
