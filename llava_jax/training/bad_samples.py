"""What is wrong with samples that a run skips (config.data.on_bad_sample = "skip"): told, counted, and judged.

A bad sample stays in its place, so that all others stay in theirs. One whose text is at fault takes no position, which
is known before step 0. One whose picture is at fault is found where it is read: it keeps its positions, with nothing to
learn in them and zeros for its pictures. Each is written to `bad_samples.jsonl` with step, id and reason.

The run stops when more than `max_bad_share` of the samples that it has come to were bad, or of 1,000 while they are
fewer (of an epoch's where that has fewer). All processes count the same, so all stop at the same step. It does not
begin where more of all texts have faults.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.cli import UserError
from llava_jax.data.pipeline import Bad, bad_texts
from llava_jax.data.plan import Lengths, Order
from llava_jax.data.sources import Sample, Source
from llava_jax.data.tokenization import Row
from llava_jax.parallel import distributed
from llava_jax.training.metrics import BAD_SAMPLES, MetricsWriter, Screen

JUDGED = 1000  # samples
TOLD = 20  # on the screen, by one start of a run


def check_texts(lengths: Lengths, share: float) -> None:
    """Raises UserError where the texts alone are too many, which is known before the first step."""
    faulty, count = int(np.count_nonzero(lengths.tokens == 0)), len(lengths.tokens)
    if faulty > share * count:
        raise UserError(
            f"{faulty:,} of {count:,} samples have texts with faults, more than data.max_bad_share={share:g}: "
            "python -m llava_jax.data.check lists them; mend them or raise data.max_bad_share"
        )


class BadSamples:
    """The bad samples of a run.

    Args:
      order, lengths: of the samples; those without tokens have faulty texts.
      share: that may be bad.
      start: the step after which the run goes on.
      found: bad pictures up to then.
    """

    def __init__(self, order: Order, lengths: Lengths, share: float, start: int, found: int):
        self.share, self.lengths = share, lengths
        self.least = min(JUDGED, len(order.samples))
        self.seen = self.count = 0
        self.come_to(order.before(start))
        self.count += found
        self.pending: list[dict] = []  # of this process, not yet known to the others
        self.told = 0

    def of_texts(self, source: Source, encode: Callable[[Sample], Row]) -> list[dict]:
        """Those known before the first step."""
        indices = np.flatnonzero(self.lengths.tokens == 0).tolist()
        return [{"step": 1, "part": "text"} | one._asdict() for one in bad_texts(source, encode, indices)]

    def come_to(self, samples: Sequence[int]) -> None:
        """Counts the samples of a step."""
        self.seen += len(samples)
        self.count += int(np.count_nonzero(self.lengths.tokens[samples] == 0))

    def note(self, step: int, bad: Sequence[Bad], part: str = "training") -> None:
        """What this process found in its rows of a step."""
        self.pending += [{"step": step, "part": part} | one._asdict() for one in bad]

    def gather(self, name: str) -> list[dict]:
        """What all processes have found since the last time; they have to call this together. `name` as `barrier`'s."""
        mine = np.frombuffer(json.dumps(self.pending).encode(), np.uint8)
        self.pending = []
        found = [one for said in distributed.gather(name, mine) for one in json.loads(said.tobytes())]
        self.count += sum(one["part"] == "training" for one in found)
        return sorted(found, key=lambda one: (one["step"], one["index"]))

    def verdict(self) -> str | None:
        """Why the run has to stop, if it has to."""
        judged = max(self.seen, self.least)
        if self.count <= self.share * judged:
            return None
        return (
            f"{self.count} of {self.seen:,} samples are bad, more than a share of {self.share:g} of {judged:,}; "
            f"{BAD_SAMPLES} in the workdir names them: mend the data, or raise data.max_bad_share, and start again"
        )

    def tell(self, found: Sequence[dict], writer: MetricsWriter, screen: Screen) -> None:
        """Writes down what was gathered: for the first process."""
        for one in found:
            writer.append(BAD_SAMPLES, one)
            if self.told < TOLD:
                screen.say(f"skipped    {one['reason']}")
            elif self.told == TOLD:
                screen.say(f"           more are skipped: see {BAD_SAMPLES}")
            self.told += 1
