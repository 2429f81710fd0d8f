"""Greedy decoding beside `LlavaForConditionalGeneration.generate`, on this machine.

All sides have the same random float32 weights and the same prompts, an image and a question; each runs in a process
of its own, and the runs alternate, so that other load hits all. With --compile, torch also runs a forward pass that
`torch.compile` compiled, with a static cache. The prompt's own computation is not counted. Each id
must be the likeliest for torch too, given those before it; of two that are equal to rounding either will do. What a
machine can decode at most is its memory bandwidth over the bytes that every token has to read: the bandwidth is
measured between the runs, by reading a large buffer from all cores.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import figures
import numpy as np
from figures import Figure, read_bandwidth
from peers import CONFIG, TINY, Side, our_parameters, torch_model

from llava_jax import cli
from llava_jax.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig
from llava_jax.models.llava import abstract_params

QUESTION, ANSWER = 80, 65  # tokens; the first one of the answer belongs to the prompt
SCALE = 0.1  # of the weights; with those of the start of a training, a model repeats its last token
COMPILED = "torch.compile"
TIE = 1e-3  # difference of logits below which rounding decides


class Run(NamedTuple):
    """What a side generated, and the time that took from the first token on."""

    ids: np.ndarray  # int[rows, ANSWER]
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where ids are not the likeliest."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/generate.py --rows 1 4 --runs 7",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="batch sizes")
    parser.add_argument("--runs", type=int, default=7, help="measured runs a side, after one to warm up")
    parser.add_argument("--compile", action="store_true", help="a third side: torch.compile")
    figures.add_option(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the benchmark runs")
    args = parser.parse_args(argv)

    config = TINY if args.tiny else CONFIG
    starts = {"llava_jax": jax_side, "torch": torch_side}
    if args.compile:
        starts[COMPILED] = functools.partial(torch_side, compiled=True)
    sides = {name: Side(start, config) for name, start in starts.items()}
    print(f"prompts of {config.image_tokens + QUESTION} tokens, {ANSWER} generated; {os.cpu_count()} cores; float32")
    found = {rows: compare(sides, rows, args.runs, config) for rows in args.rows}
    figures.write(args.json, [figure for figure, _ in found.values()])
    wrong = [rows for rows, (_, right) in found.items() if not right]
    for name, side in sides.items():
        print(f"{name}: peak memory {side.stop() / 2**30:.2f} GiB")
    if wrong:
        print(f"error: ids that torch finds less likely by {TIE} or more in batches of {wrong} rows", file=sys.stderr)
    return 1 if wrong else 0


def compare(sides: dict[str, Side], rows: int, runs: int, config: LlavaConfig) -> tuple[Figure, bool]:
    """Prints the speeds at a batch size; -> these, and whether the ids are right."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    bandwidths, equal, worst = [], 0, 0.0
    for run in range(runs + 1):
        results = {name: side.call((rows, run))[0] for name, side in sides.items()}
        ours, theirs = (results[name].ids for name in ("llava_jax", "torch"))
        equal += (ours == theirs).all(axis=1).sum()
        worst = max(worst, sides["torch"].call((rows, run, ours))[0])
        if run:
            bandwidths.append(read_bandwidth())
            for name, result in results.items():
                speeds[name].append(rows * (ANSWER - 1) / result.seconds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bound = rows * max(bandwidths) / bytes_per_step(rows, config)
    print(
        f"{rows} rows: {equal} of {rows * (runs + 1)} answers have equal ids; ours are at most {worst:.1e} less likely "
        f"than torch's likeliest; the last run's had {len(set(ours.flat))} different ones"
    )
    for name, values in speeds.items():
        print(f"  {name}: {medians[name]:.1f} tokens/s (median), {max(values):.1f} (best)")
    print(
        f"  llava_jax / torch: {medians['llava_jax'] / medians['torch']:.2f} x; memory is read at "
        f"{max(bandwidths) / 1e9:.1f} GB/s (best), {statistics.median(bandwidths) / 1e9:.1f} (median), "
        f"so the best possible is {bound:.1f} tokens/s",
        flush=True,
    )
    what = f"greedy decoding, {rows} row{'s' * (rows > 1)}, float32"
    return Figure(what, "tokens/s", speeds, bound, "reading the decoder's weights once a step"), worst < TIE


def bytes_per_step(rows: int, config: LlavaConfig) -> int:
    """What a step of decoding has to read: the decoder's weights once, and the keys and values of every row."""
    text = config.text
    read = [
        leaf.size
        for name, leaf in abstract_params(config).items()
        if name.startswith("llm.") and (text.tie_word_embeddings or "embed_tokens" not in name)
    ]
    positions = config.image_tokens + QUESTION + ANSWER // 2
    cached = 2 * rows * positions * text.num_layers * text.num_kv_heads * text.head_dim
    return 4 * (sum(read) + cached)


def random_prompts(rows: int, run: int, config: LlavaConfig) -> tuple[np.ndarray, np.ndarray]:
    """-> ids of the questions, int32[rows, QUESTION], and a picture each, uint8[rows, H, W, 3]."""
    rng, size = np.random.default_rng(run), config.vision.image_size
    questions = rng.integers(0, config.text.vocab_size - 1, (rows, QUESTION), np.int32)
    return questions, rng.integers(0, 256, (rows, size, size, 3), np.uint8)


def jax_side(config: LlavaConfig) -> Callable[[tuple[int, int]], Run]:
    """`inference.decoding.Decoder`, used as `inference.generate.Generator` uses it."""
    import jax.numpy as jnp

    from llava_jax.inference.decoding import MAX_STEPS, Decoder, Slots
    from llava_jax.inference.prompts import PromptBatch, bucket
    from llava_jax.models.llava import build

    decoder = Decoder(build(config, {name: jnp.array(value) for name, value in our_parameters(config, SCALE)}))
    P = config.image_tokens
    length = P + QUESTION

    def generate(argument: tuple[int, int]) -> Run:
        rows, _ = argument
        questions, images = random_prompts(*argument, config)
        tokens, index = np.zeros((rows, bucket(length)), np.int32), np.full((rows, bucket(length)), -1, np.int32)
        tokens[:, P:length], index[:, :P] = questions, np.arange(rows * P).reshape(rows, P)
        batch = PromptBatch(tokens, np.full(rows, length, np.int32), images[None], index)
        first, cache = decoder.prefill(batch, None, size=bucket(length + ANSWER))
        ids = [np.asarray(first)[:, None]]
        before = time.perf_counter()
        for done in range(0, ANSWER - 1, MAX_STEPS):
            steps = min(MAX_STEPS, ANSWER - 1 - done)
            slots = Slots(ids[-1][:, -1], np.full(rows, length + done, np.int32), np.full(rows, length + ANSWER))
            sampled, cache = decoder.decode(slots=slots, stop_ids=np.array([-1]), steps=steps, cache=cache)
            ids.append(np.asarray(sampled.tokens)[:, :steps])
        return Run(np.concatenate(ids, axis=1), time.perf_counter() - before)

    return generate


def torch_side(config: LlavaConfig, compiled: bool = False) -> Callable[[tuple], Run | float]:
    """transformers' `generate` with its default cache and attention, or with a static cache and compiled.

    Called with ids that were generated elsewhere, the function tells by how much the logit of one of them is below the
    highest one, at most.
    """
    import torch

    model = torch_model(config, SCALE).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    options = {}
    if compiled:
        model.forward, options = torch.compile(model.forward, dynamic=False), {"cache_implementation": "static"}

    def prompts(rows: int, run: int) -> dict[str, torch.Tensor]:
        questions, images = random_prompts(rows, run, config)
        marks = np.full((rows, config.image_tokens), config.text.vocab_size - 1)
        pixels = ((images / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
        return {
            "input_ids": torch.from_numpy(np.concatenate([marks, questions], axis=1)),
            "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        }

    def generate(rows: int, run: int) -> Run:
        inputs, times = prompts(rows, run), []

        def note_time(ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        output = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=ANSWER,
            do_sample=False,
            stopping_criteria=[note_time],
            **options,
        )
        return Run(output[:, inputs["input_ids"].shape[1] :].numpy(), times[-1] - times[0])

    @torch.no_grad()
    def shortfall(rows: int, run: int, ids: np.ndarray) -> float:
        inputs, generated = prompts(rows, run), torch.from_numpy(ids).long()
        inputs["input_ids"] = torch.cat([inputs["input_ids"], generated], dim=1)
        logits = model(**inputs, logits_to_keep=ANSWER + 1).logits[:, :-1]
        chosen = logits.gather(-1, generated[..., None])[..., 0]
        return float((logits.max(-1).values - chosen).max())

    return lambda argument: (generate if len(argument) == 2 else shortfall)(*argument)


if __name__ == "__main__":
    cli.run(main)
