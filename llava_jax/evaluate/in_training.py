"""Evaluation during training: answers some questions of a benchmark with the parameters of a step, and scores them.

Each process answers its share on its own devices, over which the parameters are resharded. Resharding and gathering the
answers are the only collective operations: no process waits for another's tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.templates import Template
from llava_jax.evaluate.answers import Answer, by_key, count_absent
from llava_jax.evaluate.benchmark import Benchmark
from llava_jax.evaluate.benchmarks import find
from llava_jax.evaluate.lines import Line, write_lines
from llava_jax.evaluate.outcomes import SUFFIX, outcomes_of, write_outcomes
from llava_jax.evaluate.questions import Question, read_images, read_questions, request_turns
from llava_jax.inference.generate import Generator
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, abstract_params, build
from llava_jax.models.quantized import dequantized
from llava_jax.parallel import distributed

FOLDER = "evaluations"  # in the workdir: STEP/BENCHMARK.jsonl, the answers, and STEP/BENCHMARK.outcomes.jsonl


class Evaluation:
    """The questions and their scores. An evaluation at step 0 shows early if labels, images, prompts or memory fail."""

    def __init__(self, config: ConfigDict, model: LlavaConfig, tokenizer: PreTrainedTokenizerBase, template: Template):
        self.every = config.evaluate.every
        self.prompts = PromptEncoder(model, tokenizer, template)
        self.benchmark = find(config.evaluate.benchmark, "score")
        self.name = self.benchmark.name
        self.labels = [config.evaluate.labels]
        asked = read_questions([config.evaluate.questions], self.benchmark.suffix, self.benchmark.questions)
        self.questions = choose(asked, self.benchmark, config.evaluate.limit, config.seed)
        self.images = ImageFolder(config.evaluate.images, config.data.allow_absolute_images)
        outside = [
            question.id for question in self.questions if any(isinstance(image, str) for image in question.images)
        ]
        if outside and not self.images:
            raise UserError(
                f"evaluate.images is not set, and the image of question {outside[0]} is not inside "
                f"{config.evaluate.questions}: give --config.evaluate.images=..."
            )
        self.requests = [
            request(question, self.images, self.prompts.config.image_position) for question in self.questions
        ]
        self.generator: Generator | None = None  # compiled programs; it has no weights between evaluations

    def due(self, step: int, steps: int) -> bool:
        return step == steps or bool(self.every) and step % self.every == 0

    def run(self, step: int, params: Params, dtype: jnp.dtype, workdir: epath.Path) -> dict[str, float]:
        """The scores of a step's parameters, in all processes. The first process writes the answers."""
        count, first = jax.process_count(), jax.process_index()
        plain = dataclasses.replace(self.prompts.config, base_dtype="")
        params = dequantized(params, abstract_params(plain, dtype))
        model = build(plain, on_own_devices(params, dtype), dtype)
        sampling = Sampling(max_new_tokens=self.benchmark.max_new_tokens)
        if self.generator is None:
            self.generator = Generator(model, self.prompts)
        else:
            self.generator.decoder.set_model(model)
        try:
            texts = self.generator.answer(self.requests[first::count], sampling)
        except UserError:
            for question in self.questions[first::count]:
                read_images(question, self.images, self.prompts.read)  # raises an error with its id for a bad image
            raise
        self.generator.decoder.drop_weights()
        answers = [""] * len(self.questions)
        for process, share in enumerate(distributed.gather_json(f"answers of step {step}", texts)):
            answers[process::count] = share
        lines = [
            answer_line(number, question, text, step)
            for number, (question, text) in enumerate(zip(self.questions, answers, strict=True), 1)
        ]
        pairs = self._pairs(lines)
        if distributed.is_first():
            self._write(workdir / FOLDER / str(step), lines, pairs)
        absent = count_absent(answer for answer, _ in pairs)
        return flatten(f"{self.name}/", self.benchmark.score(pairs) | absent)

    def _pairs(self, lines: Sequence[Line]) -> list[tuple[Answer, Any]]:
        """The answers with their labels. Raises `UserError` if a question has no label."""
        labels = self.benchmark.read_labels(self.labels, lines, self.questions)
        answers = by_key(lines, labels.key, self.benchmark.fields)
        if unknown := [answer.where for key, answer in answers.items() if key not in labels]:
            raise UserError(f"{self.labels[0]}: has no label for {unknown[0]}")
        return [(answer, labels[key]) for key, answer in answers.items()]

    def _write(self, directory: epath.Path, lines: Sequence[Line], pairs: Sequence[tuple[Answer, Any]]) -> None:
        """Writes the answers, and the outcomes for `report`."""
        directory.mkdir(parents=True, exist_ok=True)
        write_lines(directory / f"{self.name}.jsonl", (line.value for line in lines))
        outcomes = outcomes_of(self.benchmark, pairs, lines, self.questions)
        write_outcomes(directory / f"{self.name}{SUFFIX}", outcomes)


def choose(asked: Sequence[Question], benchmark: Benchmark, limit: int, seed: int) -> list[Question]:
    """`limit` random questions, in their order. If all questions about an image are scored together, all or none of
    them are chosen, which may be a few more than `limit`."""
    groups: dict[Any, list[int]] = {}
    for index, question in enumerate(asked):
        groups.setdefault(question.images if benchmark.groups else index, []).append(index)
    chosen: list[int] = []
    members = list(groups.values())
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) < limit:
            chosen += members[group]
    return [asked[index] for index in sorted(chosen)]


def request(question: Question, images: epath.PathLike, image_position: str = "first") -> Request:
    """A request for the generator, which reads the images that are in files."""
    found = read_images(question, images, lambda image: image)
    return Request(request_turns(question, image_position=image_position), found)


def answer_line(number: int, question: Question, text: str, step: int) -> Line:
    """An answer as a line of a file of answers."""
    value = {"question_id": question.id, "prompt": question.text, "text": text, "model_id": f"step {step}"}
    return Line(f"answer {number}, question {question.id}", value | question.extra)


def flatten(prefix: str, scores: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of nested scores by path, such as `easy-vqa/by_kind/colour`."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            flat |= flatten(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = value
    return flat


def on_own_devices(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters in `dtype`, sharded over the devices of this process only.

    It is a collective operation: all processes have to call it.
    """
    if jax.process_count() == 1:
        return {name: value.astype(dtype) for name, value in params.items()}
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    everyone = Mesh(np.reshape(devices, (jax.process_count(), -1)), ("processes", "own"))
    mine = Mesh([device for device in devices if device.process_index == jax.process_index()], ("own",))

    def gather(value: jax.Array) -> jax.Array:
        spec = _split(value.shape, mine.size)
        spread = jax.device_put(value.astype(dtype), NamedSharding(everyone, spec))
        shards = [shard.data for shard in spread.addressable_shards]
        gathered = jax.make_array_from_single_device_arrays(value.shape, NamedSharding(mine, spec), shards)
        # Computations of one process must not run between transfers: on CPUs both share few threads, and the processes
        # would deadlock.
        return jax.block_until_ready(gathered)

    return {name: gather(value) for name, value in params.items()}


def _split(shape: Sequence[int], devices: int) -> P:
    """Shards the last divisible axis except the first one, that of the layers, which decoding unstacks."""
    for axis in reversed(range(len(shape))):
        if shape[axis] % devices == 0 and axis > 0:
            return P(*[None] * axis, "own")
    return P()
