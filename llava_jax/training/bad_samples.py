"""The bad samples that a run skips (config.data.on_bad_sample = "skip"): they are reported, counted and limited.

A bad sample keeps its place, so that all others keep theirs. A bad text is known before step 0: it takes no positions.
A bad image is found when it is read: its sample keeps its positions, with no targets and with zeros for its images.
Each is written to `bad_samples.jsonl` with step, id and reason.

The run stops when more than `max_bad_share` of the samples seen so far were bad, or of 1,000 while there are fewer (of
an epoch's samples if it has fewer). All processes count the same, so all stop at the same step. A run with more bad
texts than that does not begin.
"""

from collections.abc import Sequence

import numpy as np

from llava_jax.cli import UserError
from llava_jax.data.encoded import BadSample, EncodedSource
from llava_jax.data.plan import Lengths, Order
from llava_jax.parallel import distributed
from llava_jax.training.metrics import BAD_SAMPLES

MIN_JUDGED = 1000  # samples


def check_texts(lengths: Lengths, share: float) -> None:
    """Raises UserError if more than this share of the texts is bad, which is known before the first step."""
    faulty, count = int(np.count_nonzero(lengths.tokens == 0)), len(lengths.tokens)
    if faulty > share * count:
        raise UserError(
            f"{faulty:,} of {count:,} samples have texts with faults, more than data.max_bad_share={share:g}: "
            "python -m llava_jax.data.check lists them; mend them or raise data.max_bad_share"
        )


def bad_texts(encoded: EncodedSource, lengths: Lengths) -> list[dict]:
    """The entries of samples with bad texts, which have no tokens."""
    indices = np.flatnonzero(lengths.tokens == 0).tolist()
    return [{"step": 1, "part": "text"} | one._asdict() for one in encoded.bad_texts(indices)]


class BadSamples:
    """Counts the bad samples of a run that resumes after step `start`, up to which `found` bad images were found.

    A `share` of bad samples is allowed. Those with bad texts have no tokens in `lengths`.
    """

    def __init__(self, order: Order, lengths: Lengths, share: float, start: int, found: int):
        self.share, self.lengths = share, lengths
        self.min_judged = min(MIN_JUDGED, len(order.samples))
        self.seen, self.count = 0, found
        self.advance([order.before(start)])
        self.pending: list[dict] = []  # found by this process, not yet known to the others

    def advance(self, rows: Sequence[Sequence[int]]) -> None:
        """Counts the samples in the rows of a step."""
        samples = [index for row in rows for index in row]
        self.seen += len(samples)
        self.count += int(np.count_nonzero(self.lengths.tokens[samples] == 0))

    def note(self, step: int, bad: Sequence[BadSample], part: str = "training") -> None:
        """Adds what this process found in its rows of a step."""
        self.pending += [{"step": step, "part": part} | one._asdict() for one in bad]

    def gather(self, name: str) -> list[dict]:
        """What all processes have found since the last call, which all make together. `name` as for `barrier`."""
        pending, self.pending = self.pending, []
        found = [one for entries in distributed.gather_json(name, pending) for one in entries]
        self.count += sum(one["part"] == "training" for one in found)
        return sorted(found, key=lambda one: (one["step"], one["index"]))

    def verdict(self) -> str | None:
        """Why the run has to stop, if it has to."""
        judged = max(self.seen, self.min_judged)
        if self.count <= self.share * judged:
            return None
        return (
            f"{self.count} of {self.seen:,} samples are bad, more than a share of {self.share:g} of {judged:,}; "
            f"{BAD_SAMPLES} in the workdir names them: mend the data, or raise data.max_bad_share, and start again"
        )
