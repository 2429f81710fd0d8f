"""The step of stage 2 with adapters (LoRA) beside the full step and beside PEFT's on torch, on this machine.

All train the model of `train_step.py` in float32 on the same batches: the full step projector and decoder, the others
the projector and adapters of all linear layers of the decoder. With --wide the decoder has four layers of TinyLlama's
width. Each side runs in a process of its own, and they take turns, so that other load hits all. Our losses must agree
with PEFT's at every step.

Beside the ratio of the times stands that of the FLOPs: those of the formula of `llava_jax.training.flops`.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys

import figures
from figures import Figure
from peers import CONFIG, TINY, WIDE, Side
from train_step import LENGTH, LOSS_TOLERANCE, ROWS, jax_step, step_flops, torch_step

from llava_jax import cli
from llava_jax.models.config import LlavaConfig, LoraConfig
from llava_jax.training import flops

FULL = "full"
TARGETS = (r"llm\.layers\..*_proj",)


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where the losses disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/lora.py --ranks 16 128 --remat full",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--base-dtypes", nargs="+", default=[""], help="of the frozen decoder: '', int8, nf4")
    parser.add_argument("--remat", choices=sorted(flops.RECOMPUTED), default="none", help="of all steps")
    parser.add_argument("--turns", type=int, default=4, help="measured turns of a side, after one to warm up")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a turn")
    parser.add_argument("--no-peft", action="store_true", help="only llava_jax")
    parser.add_argument("--wide", action="store_true", help="a model whose decoder has most of the FLOPs")
    figures.add_option(parser)
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the benchmark runs")
    args = parser.parse_args(argv)

    model = TINY if args.tiny else WIDE if args.wide else CONFIG
    ours, theirs = {FULL: model}, {}
    for rank in args.ranks:
        adapted = dataclasses.replace(model, lora=LoraConfig(rank, 2.0 * rank, TARGETS))
        for base_dtype in args.base_dtypes:
            ours[f"r{rank} {base_dtype}".strip()] = dataclasses.replace(adapted, base_dtype=base_dtype)
        if not args.no_peft:
            theirs[f"PEFT r{rank}"] = adapted
    sides = {name: Side(functools.partial(jax_step, remat=args.remat), config) for name, config in ours.items()}
    sides |= {name: Side(functools.partial(torch_step, remat=args.remat), config) for name, config in theirs.items()}
    print(f"{ROWS} rows of {LENGTH} tokens, remat {args.remat}; {os.cpu_count()} cores; float32")
    seconds, losses = measure(sides, args.turns, args.steps)
    for name, side in sides.items():
        median, best = statistics.median(seconds[name]), min(seconds[name])
        line = f"{name:<12} {median:6.2f} s (median), {best:6.2f} s (best), {side.stop() / 2**30:5.2f} GiB"
        if name in ours and name != FULL:
            share = step_flops(ours[name], args.remat) / step_flops(model, args.remat)
            line += f"; of full: {ratio(seconds[name], seconds[FULL])}, FLOPs {share:.3f}"
        if (peft := f"PEFT {name.split()[0]}") in theirs:
            line += f"; of PEFT: {ratio(seconds[name], seconds[peft])}"
        print(line)
    figures.write(args.json, [compared(name, seconds, model) for name in ours if f"PEFT {name.split()[0]}" in theirs])
    worst = max(
        (abs(a - b) for name in theirs for a, b in zip(losses[name], losses[name.removeprefix("PEFT ")], strict=True)),
        default=0.0,
    )
    print(f"losses differ from PEFT's by {worst:.1e} at most")
    if not worst <= LOSS_TOLERANCE:
        print(f"error: the losses differ by more than {LOSS_TOLERANCE}", file=sys.stderr)
        return 1
    return 0


def compared(name: str, seconds: dict[str, list[float]], model: LlavaConfig) -> Figure:
    peft = f"PEFT {name.split()[0]}"
    sides = {"llava_jax": seconds[name], "PEFT on torch": seconds[peft], "the full step of llava_jax": seconds[FULL]}
    what = f"a step with LoRA, {name}, width {model.text.hidden_size}, {ROWS} rows of {LENGTH} tokens, float32"
    return Figure(what, "s", sides)


def measure(sides: dict[str, Side], turns: int, steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the counted steps and losses of all steps, by side. The first step of a turn is not counted."""
    seconds, losses = ({name: [] for name in sides} for _ in range(2))
    for turn in range(turns + 1):
        numbers = range(turn * (steps + 1), (turn + 1) * (steps + 1))
        for name, side in sides.items():
            results = [side.call(number) for number in numbers]
            losses[name] += [loss for loss, _ in results]
            counted = [elapsed for _, elapsed in results[1:]]
            seconds[name] += counted if turn else []
            shown = ", ".join(f"{elapsed:.2f}" for elapsed in counted)
            print(f"turn {turn or 'to warm up'}: {name} in {shown} s, loss {losses[name][-1]:.6f}", flush=True)
    return seconds, losses


def ratio(one: list[float], other: list[float]) -> str:
    return f"{statistics.median(one) / statistics.median(other):.2f} x (median), {min(one) / min(other):.2f} x (best)"


if __name__ == "__main__":
    cli.run(main)
