"""Reports runs of which more than half of the positions are padding, and the settings that lower this share."""

from collections.abc import Iterator

import numpy as np

from llava_jax.data.modality import ModalityOrder
from llava_jax.data.packing import Fill, PackedOrder, fill, image_slot_plans
from llava_jax.data.plan import Lengths, Order

MAX_SHARE = 0.5  # of padding that is not reported
PLANNED = 10_000  # samples with which packing is tried
ALIGNED = 128  # accelerators prefer multiples of it as lengths
TOOL = "python -m llava_jax.data.pack suggests sizes"


def padding_of_run(order: Order, lengths: Lengths, row_length: int) -> str | None:
    """One line about the padding of the first epoch of a run; None if it is at most half of the positions."""
    rows, step_rows = order.epoch_rows(0), order.epoch_steps(0) * order.batch_rows
    tokens = int(lengths.tokens[rows.samples].sum())
    share = 1 - tokens / (step_rows * row_length)
    if share <= MAX_SHARE:
        return None
    if 1 - tokens / max(rows.count * row_length, 1) <= MAX_SHARE:
        return f"{share:.0%} of positions: an epoch has {rows.count} rows; lower --config.batch_rows={order.batch_rows}"
    packed = isinstance(order, PackedOrder)
    rows_per_group = order.room.rows_per_group if packed else 1
    remedies = [] if packed else list(_shorter(_select(lengths, rows.samples), row_length))
    unset = " --config.group_by_modality=False" if isinstance(order, ModalityOrder) else ""
    remedies += _packed(_select(lengths, rows.samples), row_length, rows_per_group, packed, unset)
    return f"{share:.0%} of positions: {'; or '.join([*remedies, TOOL])}"


def padding_of_samples(lengths: Lengths, max_length: int) -> str | None:
    """The same for samples that are cut at `max_length`, one a row."""
    lengths = _select(lengths._replace(tokens=np.minimum(lengths.tokens, max_length)), np.flatnonzero(lengths.tokens))
    if not len(lengths.tokens) or (share := 1 - lengths.tokens.mean() / max_length) <= MAX_SHARE:
        return None
    remedies = [*_shorter(lengths, max_length), *_packed(lengths, max_length)]
    return f"{share:.0%} of positions: {'; or '.join([*remedies, TOOL])}"


def _shorter(lengths: Lengths, max_length: int) -> Iterator[str]:
    """A `max_length` that cuts no sample and leaves little padding."""
    mean, longest = float(lengths.tokens.mean()), int(lengths.tokens.max())
    for length in (-(-longest // ALIGNED) * ALIGNED, longest):
        if length < max_length and 1 - mean / length <= MAX_SHARE:
            yield f"--config.max_length={length} leaves {1 - mean / length:.0%} and cuts no sample"
            return


def _packed(
    lengths: Lengths, row_length: int, rows_per_group: int = 1, packed: bool = False, others: str = ""
) -> Iterator[str]:
    """Packed rows that leave little padding: as long as now or, if there are few samples, shorter."""
    longest = int(lengths.tokens.max())
    for length in (max(row_length >> halved, longest) for halved in range(4)):
        full = _fill(lengths, length, rows_per_group)
        if 1 - full.tokens <= MAX_SHARE:
            size = f" --config.row_length={length}" if packed or length != row_length else ""
            slots = " --config.image_slots=0" if packed else ""
            yield (
                f"--config.pack=True{size}{slots}{others} leaves {1 - full.tokens:.0%}, "
                f"with {full.samples_a_row:.1f} samples in each of batch_rows"
            )
            return


def _fill(lengths: Lengths, row_length: int, rows_per_group: int) -> Fill:
    """How full packed rows are, with the best number of image slots."""
    order = Order(np.arange(min(len(lengths.tokens), PLANNED)), rows_per_group, 0)
    return fill(image_slot_plans(order, lengths, row_length, rows_per_group)[0])


def _select(lengths: Lengths, samples: np.ndarray) -> Lengths:
    return Lengths(*(part[samples] for part in lengths))
