"""The run summary: what is trained from what, on which devices and data, and the first sample as the model sees it."""

import sys
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from rich.console import Console

from llava_jax.checkpoint.format import needed
from llava_jax.cli import UserError, one_line, printable, say, short, track, warn, wrapped
from llava_jax.data.conversation import has_interleaved_images
from llava_jax.data.encoded import EncodedSource
from llava_jax.data.inspect import view
from llava_jax.data.packing import PackedOrder, fill
from llava_jax.data.padding import padding_of_run
from llava_jax.data.plan import Lengths
from llava_jax.data.sources import Source
from llava_jax.data.template_fit import missing_marks
from llava_jax.data.tokenization import truncate
from llava_jax.models.llava import Params
from llava_jax.parallel import distributed, sharding
from llava_jax.training import optim
from llava_jax.training.setup import Run
from llava_jax.training.step import TrainState


def _parts(run: Run, trainable: Params, frozen: Params) -> Iterator[str]:
    """Yields a line for each part of the model and each group that is trained: how, how large, at which rate."""
    lora, rows = run.start.model.lora, []
    for group in optim.groups(run.config):
        names = [name for name, other in run.program.groups.items() if other == group]
        params = [trainable[name] for name in names]
        if not params:
            continue
        how = f"layers {group.layers}" if group.layers else "whole"
        if all(".lora." in name for name in names):
            how = f"LoRA of rank {lora.rank}{', DoRA' * lora.dora}"
        rate = f"  rate {group.learning_rate:g}, weight decay {group.weight_decay:g}"
        rate += f", layer decay {group.layer_decay:g}" * (group.layer_decay != 1)
        rows.append((group.pattern if run.config.trainable else group.label, how, params, rate))
    for part, params in _by_part(frozen).items():
        quantized = run.start.model.base_dtype if part == "llm" else ""
        rows.append((part, f"frozen, {quantized}" if quantized else "frozen", params, ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for number, (name, how, params, rate) in enumerate(rows):
        count, mebibytes = sum(v.size for v in params), sum(v.nbytes for v in params) / 2**20
        head = "parts" if number == 0 else ""
        yield f"{head:10} {name:{widths[0]}}  {how:{widths[1]}}  {count:>14,}  {mebibytes:>10,.1f} MiB{rate}"


def print_summary(run: Run, state: TrainState, frozen: Params) -> None:
    """Process 0 prints what the run will do and the first sample, and warns of images that it moves."""
    if not distributed.is_first():
        return
    data, config = run.data, run.config
    say(wrapped("\n".join(run_summary(run, state, frozen)), sys.stderr), file=sys.stderr, flush=True)
    samples, lengths = data.encoded.source, data.lengths
    warn_of_moved_images(samples, lengths, config.image_position)
    show_first_sample(data.encoded, (index for index in data.order.visits(0) if lengths.tokens[index]))


def run_summary(run: Run, state: TrainState, frozen: Params) -> Iterator[str]:
    """Yields the lines of the run summary: what is trained from what, on which devices and data, for how long."""
    config, data, settings = run.config, run.data, run.program.settings
    order, layout = data.order, data.layout
    yield f"stage      {config.stage} in {run.workdir}, from {config.init}"
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.optimizer, state.ema)))
    yield f"trainable  {_size(state.trainable)}, optimizer {optimizer_bytes / 2**20:,.1f} MiB"
    yield f"frozen     {_size(frozen)}"
    yield from _parts(run, state.trainable, frozen)
    if sources := needed(run.workdir, run.description):
        yield (
            f"needs      {', '.join(sources)}, as the frozen parameters are not stored here; to copy them: "
            f"python -m llava_jax.convert copy-frozen --checkpoint {run.workdir}"
        )
    kind, axes = jax.devices()[0].device_kind, sharding.axis_sizes(run.mesh)
    yield f"devices    {jax.device_count()} x {kind} as {axes}, computing in {settings.dtype.name}"
    mean = float(np.mean(data.lengths.tokens[order.visited(0)]))
    yield f"data       {len(order.samples):,} samples an epoch, {mean:.0f} tokens each (image tokens included)"
    yield (
        f"batch      {layout.batch_rows} rows of {layout.max_length} tokens, {layout.groups} groups with "
        f"{layout.image_slots} image and {layout.label_slots} label slots, {settings.accumulation} microbatches"
    )
    if isinstance(order, PackedOrder):
        full = fill(order)
        yield (
            f"packing    {full.samples_a_row:.2f} samples a row, {full.samples_a_row * order.batch_rows:.0f} a step; "
            f"used are {full.tokens:.1%} of positions, {full.images:.1%} of image and {full.labels:.1%} of label slots"
        )
    resuming = f", resuming after step {run.start.step:,}" if run.start.step else ""
    epoch = order.epoch_steps(0)
    yield f"steps      {run.steps:,} of {epoch:,} an epoch ({run.steps / epoch:.2f} epochs){resuming}"
    if padding := padding_of_run(order, data.lengths, layout.max_length):
        yield f"padding    {padding}"


def _by_part(params: Params) -> dict[str, list[jax.Array]]:
    parts: dict[str, list[jax.Array]] = {}
    for name, value in params.items():
        parts.setdefault(name.split(".")[0], []).append(value)
    return parts


def _size(params: Params) -> str:
    """Numbers of parameters by part of the model, and their bytes."""
    counted = ", ".join(f"{part} {sum(v.size for v in values):,}" for part, values in _by_part(params).items())
    return f"{counted or 'nothing'} parameters, {sum(v.nbytes for v in params.values()) / 2**20:,.1f} MiB"


def warn_of_moved_images(samples: Source, lengths: Lengths, position: str) -> None:
    """Warns if `position` moves images in front of the text that stands between them, with the number of samples."""
    if position == "as_is":
        return
    several = track(np.flatnonzero(lengths.images > 1).tolist(), "looking at samples of several images")
    moved = [sample.id for sample in (samples[i] for i in several) if has_interleaved_images(sample.turns)]
    if moved:
        warn(
            f"{len(moved):,} samples, {short(moved[0])} the first, have text between the images of a turn, "
            f"which image_position={position} moves before it: image_position=as_is keeps their places"
        )


def show_first_sample(source: EncodedSource, indices: Iterable[int]) -> None:
    """Prints the first of the samples as the model sees it with its targets marked, and what its tokenizer lacks."""
    encode = source.encode
    for index in indices:
        sample = source.source[index]
        encoded = encode.ids(sample)
        try:
            sizes = source.sizes(index, sample)
            break
        except UserError:  # of an image
            if not source.skip_bad:
                raise
    else:
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if misfit := missing_marks(encode.template, encode.tokenizer):
        console.print(printable(f"warning: {misfit} (--config.template=NAME)"), markup=False)
    kept = truncate(encoded, encode.features(sample, sizes), encode.max_length)
    before, after = len(encoded.input_ids), len(kept.input_ids)
    cut = f", cut to {after} of {before} tokens" if after < before else ""
    ident = one_line(short(sample.id))
    console.print(f"the first sample, {ident}{cut}; target tokens are between ⟦ and ⟧:", markup=False)
    console.print(view(kept, encode.tokenizer))
