"""What a run says before its first step: what is trained, on what, and the first sample as the model sees it."""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from llava_jax.cli import one_line, printable, say, short, track, warn
from llava_jax.data.conversation import has_interleaved_images
from llava_jax.data.inspect import view
from llava_jax.data.packing import PackedOrder, fill
from llava_jax.data.padding import padding_of_run
from llava_jax.data.pipeline import TextEncoder
from llava_jax.data.plan import Lengths, Order
from llava_jax.data.sources import Source
from llava_jax.data.template_fit import missing_marks
from llava_jax.data.tokenization import encode_sample, truncate
from llava_jax.models.llava import Params
from llava_jax.parallel import sharding
from llava_jax.training.step import StepSettings, TrainState


def introduce(
    config: ConfigDict,
    directory: epath.Path,
    mesh: Mesh,
    settings: StepSettings,
    steps: int,
    order: Order,
    lengths: Any,
    state: TrainState,
    frozen: Params,
    start: int,
    sources: Sequence[str],
) -> None:
    """Says what is about to happen. `sources`: other checkpoints, which the run's take their frozen parameters from."""
    layout = settings.layout
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
    device = jax.devices()[0]
    mean = float(np.mean(lengths.tokens[order.visited(0)]))
    lines = [
        f"stage      {config.stage} in {directory}, from {config.init}",
        f"trainable  {_summary(state.trainable)}, optimizer {optimizer_bytes / 2**20:,.1f} MiB",
        f"frozen     {_summary(frozen)}",
        f"devices    {jax.device_count()} x {device.device_kind} as {sharding.axis_sizes(mesh)}, "
        f"computing in {settings.dtype.name}",
        f"data       {len(order.samples):,} samples an epoch, {mean:.0f} tokens each (image tokens included)",
        f"batch      {layout.batch_rows} rows of {layout.max_length} tokens, {layout.groups} groups with "
        f"{layout.image_slots} image and {layout.label_slots} label slots, {settings.accumulation} microbatches",
        f"steps      {steps:,} of {order.epoch_steps(0):,} an epoch ({steps / order.epoch_steps(0):.2f} epochs)"
        + (f", resuming after step {start:,}" if start else ""),
    ]
    if sources:
        lines.insert(3, _sources_line(directory, sources))
    if isinstance(order, PackedOrder):
        lines.insert(-1, _packing_line(order))
    if padding := padding_of_run(order, lengths, layout.max_length):
        lines.append(f"padding    {padding}")
    say("\n".join(lines), file=sys.stderr, flush=True)


def _sources_line(directory: epath.Path, sources: Sequence[str]) -> str:
    return (
        f"needs      {', '.join(sources)}, as the frozen parameters are not stored here; to copy them: "
        f"python -m llava_jax.convert copy-frozen --checkpoint {directory}"
    )


def _packing_line(order: PackedOrder) -> str:
    full = fill(order)
    return (
        f"packing    {full.samples_a_row:.2f} samples a row, {full.samples_a_row * order.batch_rows:.0f} a step; "
        f"used are {full.tokens:.1%} of positions, {full.images:.1%} of image and {full.labels:.1%} of label slots"
    )


def _summary(params: Params) -> str:
    """Counts and bytes by part of the model."""
    parts: dict[str, list[jax.Array]] = {}
    for name, value in params.items():
        parts.setdefault(name.split(".")[0], []).append(value)
    counted = ", ".join(f"{part} {sum(v.size for v in values):,}" for part, values in parts.items())
    return f"{counted or 'nothing'} parameters, {sum(v.nbytes for v in params.values()) / 2**20:,.1f} MiB"


def warn_of_moved_images(samples: Source, lengths: Lengths, position: str) -> None:
    """Says of how many samples `position` moves images out of the text that stands between them."""
    if position == "as_is":
        return
    several = track(np.flatnonzero(lengths.images > 1).tolist(), "looking at samples of several images")
    moved = [sample.id for sample in (samples[i] for i in several) if has_interleaved_images(sample.turns)]
    if moved:
        warn(
            f"{len(moved):,} samples, {short(moved[0])} the first, have text between the images of a turn, "
            f"which image_position={position} moves before it: image_position=as_is keeps their places"
        )


def show_first_sample(sample: Any, encode: TextEncoder) -> None:
    """The first sample as the model sees it, what is learned marked; before it what does not fit its tokenizer."""
    encoded = encode_sample(
        sample, encode.template, encode.tokenizer, image_position=encode.image_position, seed=encode.seed
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if misfit := missing_marks(encode.template, encode.tokenizer):
        console.print(printable(f"warning: {misfit} (--config.template=NAME)"), markup=False)
    kept = truncate(encoded, encode.image_tokens, encode.max_length)
    before, after = len(encoded.input_ids), len(kept.input_ids)
    cut = f", cut to {after} of {before} tokens" if after < before else ""
    ident = one_line(short(sample.id))
    console.print(f"the first sample, {ident}{cut}; what is learned stands between ⟦ and ⟧:", markup=False)
    console.print(view(kept, encode.tokenizer))
