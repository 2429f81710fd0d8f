"""One optimizer step of stage 2 beside `LlavaForConditionalGeneration` and torch's fused AdamW, on this machine.

All sides have the same random float32 weights and the same batches, and train projector and decoder. Each runs
in a process of its own, so that its peak memory is its own, and they take turns, so that other load hits all. The
first step of a turn is not counted: it is spent on getting back the memory that the other side has just freed.
The shape is SmolLM2-135M's with a CLIP ViT-B/16 tower; a row is an image, a question and an answer, and only
the answer has target tokens. The losses must agree at every step. With --compile, torch also trains a model that
`torch.compile` compiled. What the machine could do at most is its rate of large matrix products, measured between the
turns, over the FLOPs of a step by formula (`llava_jax.training.flops`).
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable

import figures
import numpy as np
from figures import Figure, matmul_rate
from peers import CONFIG, TINY, Side, our_parameters, torch_model

from llava_jax import cli
from llava_jax.data.plan import Layout
from llava_jax.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig
from llava_jax.models.llava import abstract_params
from llava_jax.training import flops

ROWS, QUESTION, ANSWER = 4, 80, 40
LENGTH = CONFIG.image_tokens + QUESTION + ANSWER
LEARNING_RATE, BETAS, EPSILON = 1e-4, (0.9, 0.999), 1e-8
LOSS_TOLERANCE = 1e-4

Batch = dict[str, np.ndarray]
Step = Callable[[int], float]  # number of the step -> its loss


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where the losses disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/train_step.py --turns 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=4, help="measured turns of a side, after one to warm up")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a turn")
    parser.add_argument("--compile", action="store_true", help="a third side: torch.compile")
    figures.add_option(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the benchmark runs")
    args = parser.parse_args(argv)

    config = TINY if args.tiny else CONFIG
    starts = {"llava_jax": jax_step, "torch": torch_step}
    if args.compile:
        starts["torch.compile"] = functools.partial(torch_step, compiled=True)
    sides = {name: Side(start, config) for name, start in starts.items()}
    tokens = ROWS * LENGTH
    print(f"{ROWS} rows of {LENGTH} tokens, {ROWS * ANSWER} of them learned; {os.cpu_count()} cores; float32")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rates, worst = [], 0.0
    for turn in range(args.turns + 1):
        numbers = range(turn * (args.steps + 1), (turn + 1) * (args.steps + 1))
        results = {name: [side.call(number) for number in numbers] for name, side in sides.items()}
        rates.append(matmul_rate())
        ours, *others = ([loss for loss, _ in result] for result in results.values())
        worst = max(worst, *(abs(a - b) for theirs in others for a, b in zip(ours, theirs, strict=True)))
        for name, result in results.items():
            counted = [elapsed for _, elapsed in result[1:]]
            seconds[name] += counted if turn else []
            steps = ", ".join(f"{elapsed:.2f}" for elapsed in counted)
            print(f"turn {turn or 'to warm up'}: {name} in {steps} s, loss {result[-1][0]:.6f}", flush=True)
    speeds = {name: [tokens / each for each in elapsed] for name, elapsed in seconds.items()}
    limit = max(rates) / step_flops(config) * tokens
    what = f"a step of stage 2, {ROWS} rows of {LENGTH} tokens, float32"
    figure = Figure(what, "tokens/s", speeds, limit, "the rate of large matrix products")
    figures.write(args.json, [figure])
    for name, side in sides.items():
        share = f"{figure.median(name) / limit:.2f} of the machine's limit"
        print(
            f"{name}: {figure.median(name):.0f} tokens/s (median), {share}, peak memory {side.stop() / 2**30:.2f} GiB"
        )
    for name in list(sides)[1:]:
        print("llava_jax / {}: {:.2f} x (median), {:.2f} x (best)".format(name, *figure.ratio("llava_jax", name)))
    print(f"large matrix products: {max(rates) / 1e9:.0f} GFLOP/s (best); losses differ by {worst:.1e} at most")
    if not worst <= LOSS_TOLERANCE:
        print(f"error: the losses differ by more than {LOSS_TOLERANCE}", file=sys.stderr)
        return 1
    return 0


def random_batch(step: int, config: LlavaConfig) -> Batch:
    """In each row a picture, a question and an answer; the layout of the training step."""
    rng = np.random.default_rng(step)
    shape, size, P = (ROWS, LENGTH), config.vision.image_size, config.image_tokens
    tokens = rng.integers(0, config.text.vocab_size - 1, shape, np.int32)  # the last id is torch's `<image>`
    tokens[:, :P] = 0
    labels = np.where(np.arange(LENGTH) >= LENGTH - ANSWER, tokens, -100).astype(np.int32)
    index = np.broadcast_to(np.where(np.arange(LENGTH) < P, np.arange(LENGTH), -1).astype(np.int32), shape)
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "images": rng.integers(0, 256, (ROWS, 1, size, size, 3), np.uint8),
        "image_feature_index": index,
    }


def layout_of(config: LlavaConfig) -> Layout:
    return Layout(ROWS, 1, LENGTH, 1, ANSWER, config.image_tokens, config.vision.image_size)


def step_flops(config: LlavaConfig, remat: str = "none", layout: Layout | None = None) -> float:
    """That the step executes, by formula."""
    trainable = [name for name in abstract_params(config) if is_trained(config, name)]
    return flops.executed_flops(flops.step_flops(config, layout or layout_of(config), trainable, remat))


def is_trained(config: LlavaConfig, name: str) -> bool:
    return name.startswith("projector.") or name.startswith("llm.") and (config.lora is None or ".lora." in name)


# --------------------------------------------------------------------------------------------------------- the sides


def jax_step(
    config: LlavaConfig,
    remat: str = "none",
    batches: Callable[[int], Batch] | None = None,
    layout: Layout | None = None,
) -> Step:
    """The step of `llava_jax.training.step`, as training runs it, on `random_batch` or other batches.

    Trains projector and decoder or, of a model with adapters, projector and adapters.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from llava_jax.parallel.sharding import make_mesh
    from llava_jax.training.step import StepSettings, TrainState, train_step

    trainable, frozen = {}, {}
    for name, value in our_parameters(config):
        (trainable if is_trained(config, name) else frozen)[name] = jnp.array(value)

    optimizer = optax.adamw(LEARNING_RATE, *BETAS, EPSILON, weight_decay=0.0)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    batches = batches or functools.partial(random_batch, config=config)
    settings = StepSettings(config, layout or layout_of(config), make_mesh({"fsdp": -1}), remat=remat)
    step_fn = jax.jit(functools.partial(train_step, settings, optimizer), donate_argnums=0)

    def take_step(number: int) -> float:
        nonlocal state
        state, metrics = step_fn(state, frozen, jax.device_put(batches(number)))
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return loss

    return take_step


def torch_step(
    config: LlavaConfig,
    remat: str = "none",
    compiled: bool = False,
    batches: Callable[[int], Batch] | None = None,
) -> Step:
    """The model of transformers with its default attention, compiled or not, and the fastest AdamW that torch has.

    Adapters are PEFT's. Any remat policy but "none" is transformers' gradient checkpointing.
    """
    import torch

    model = torch_model(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name if config.lora else "vision_tower" not in name)
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    model.train()
    if remat != "none":
        model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, BETAS, EPSILON, weight_decay=0.0, fused=True)
    if compiled:
        model = torch.compile(model)
    batches = batches or functools.partial(random_batch, config=config)

    def take_step(number: int) -> float:
        batch = batches(number)
        used = int((batch["image_feature_index"] >= 0).sum()) // config.image_tokens
        images = batch["images"].reshape(-1, *batch["images"].shape[2:])[:used]
        ids = np.where(batch["image_feature_index"] >= 0, config.text.vocab_size - 1, batch["tokens"])
        pixels = ((images / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
        output = model(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))) if used else None,
            attention_mask=torch.from_numpy(batch["segment_ids"]).long(),
            labels=torch.from_numpy(batch["labels"]).long(),
            use_cache=False,
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return output.loss.item()

    return take_step


if __name__ == "__main__":
    cli.run(main)
