"""The data of a run: its samples, their lengths, the order in which they come, and the shapes of the batches."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import cached_lengths, keep_lengths, measure
from llava_jax.data.mixture import check_folders, open_data, visits
from llava_jax.data.modality import ModalityOrder
from llava_jax.data.packing import Room, pack_orders
from llava_jax.data.plan import Layout, Lengths, Order, plan_layout, split
from llava_jax.data.templates import with_im_start_end
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.parallel import distributed
from llava_jax.training import config_check
from llava_jax.training.bad_samples import check_texts
from llava_jax.training.start import Start


@dataclasses.dataclass(frozen=True)
class RunData:
    """The data of a run."""

    encoded: EncodedSource  # all samples, and what happens to bad ones
    lengths: Lengths  # the positions, targets and images of each
    order: Order  # which samples are in the rows of each training step
    validation: Order  # the same of the steps of the validation loss; without samples if none are held out
    steps: int  # how many training steps are taken
    layout: Layout  # the shapes of all batches


def prepare_data(config: ConfigDict, start: Start) -> RunData:
    """Opens the samples and encodes all texts once, so that every error in them is raised before the first step."""
    model, length = start.model, config_check.row_length(config)
    skip_bad = config.data.on_bad_sample == "skip"
    source = open_data(config.data, lenient=skip_bad)
    encode = TextEncoder(
        with_im_start_end(start.template, model.im_start_end),
        load_tokenizer(start.source.tokenizer_dir),
        model.image_tokens,
        config.max_length,
        config.image_position,
        config.seed,
        model.tiling,
    )
    encoded = EncodedSource(source, encode, skip_bad)
    lengths = _measure_together(encoded, config.data.workers, start.resumed)
    check_texts(lengths, config.data.max_bad_share)
    check_folders(source, lengths)

    training, held_out = split(len(source), config.data.holdout, config.seed)
    order = Order(visits(source, training, config.seed), config.batch_rows, config.seed)
    validation = Order(held_out, config.batch_rows, None)
    if config.group_by_modality:
        fields = (order.samples, order.batch_rows, order.seed)
        order = ModalityOrder(*fields, lengths=lengths, rows_per_group=config.rows_per_group)
    if config.pack:
        room = Room(length, config.rows_per_group, config.image_slots)
        order, validation = pack_orders([order, validation], lengths, room, source)

    steps = config.steps or order.steps(config.epochs)
    layout = plan_layout(
        [(order, steps), (validation, validation.epoch_steps(0))],
        lengths,
        rows_per_group=config.rows_per_group,
        max_length=length,
        image_tokens=model.image_tokens,
        image_size=model.vision.image_size,
        image_slots=config.image_slots,
        label_slots=config.label_slots,
    )
    return RunData(encoded, lengths, order, validation, steps, layout)


def _measure_together(encoded: EncodedSource, workers: int, resumed: bool) -> Lengths:
    """The lengths of all samples. Each process measures a share of them, unless its cache has them.

    A run that resumes has the bad samples that it began with. A new one with AnyRes measures these again, as an image
    that could not be read may be back.
    """
    first, count = jax.process_index(), jax.process_count()
    known = cached_lengths(encoded)
    share = measure(encoded, workers, first, count) if known is None else [part[first::count].copy() for part in known]
    if known is not None and encoded.needs_sizes and not resumed:
        for place in np.flatnonzero(share[0] == 0):
            for part, value in zip(share, encoded.count(first + int(place) * count), strict=True):
                part[place] = value
    lengths = np.zeros((len(encoded), len(Lengths._fields)), np.int32)
    for process, values in enumerate(distributed.gather("lengths", np.stack(share, axis=1))):
        lengths[process::count] = values
    together = Lengths(*np.ascontiguousarray(lengths.T))
    if known is None or not np.array_equal(together, known):
        keep_lengths(encoded, together)
    return together
