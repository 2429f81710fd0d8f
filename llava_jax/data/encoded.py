"""Samples as the model reads their texts, and what happens to bad ones."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llava_jax.cli import UserError, short
from llava_jax.data.sources import Sample, Source
from llava_jax.data.template_fit import require_fit
from llava_jax.data.templates import Template
from llava_jax.data.tokenization import IGNORE_INDEX, Encoded, Segment, encode_sample, expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextEncoder:
    """Makes the segment of a sample: rendered, tokenized, with its images expanded, and truncated.

    Raises UserError where template and tokenizer do not fit.
    """

    template: Template
    tokenizer: "PreTrainedTokenizerBase"
    image_tokens: int
    max_length: int
    image_position: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        require_fit(self.template, self.tokenizer)

    def __call__(self, sample: Sample) -> Segment:
        return expand(self.ids(sample), self.image_tokens, self.max_length)

    def ids(self, sample: Sample) -> Encoded:
        """The token ids and labels before images are expanded and the sample is cut."""
        return encode_sample(sample, self.template, self.tokenizer, image_position=self.image_position, seed=self.seed)


class BadSample(NamedTuple):
    """A sample that is skipped, and why."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True)
class EncodedSource:
    """A source whose texts are encoded. It travels to processes that read.

    Attributes:
      source: the samples.
      encode: encodes the text of a sample, as `TextEncoder` does.
      skip_bad: whether a bad sample is skipped in its place, instead of raising UserError. A sample with a bad text
        takes no positions. One with a bad image keeps its positions, with zeros for its images and no targets.
    """

    source: Source
    encode: Callable[[Sample], Segment]
    skip_bad: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def segment(self, sample: Sample) -> Segment:
        """Encodes the text of a sample. Raises UserError where that fails, or leaves no target."""
        segment = self.encode(sample)
        if num_targets(segment) == 0:
            raise UserError(
                f"sample {short(sample.id)}: nothing to learn in the {len(segment.tokens)} positions that are kept, "
                "its answers are empty or cut off: raise the maximal length or remove the sample"
            )
        return segment

    def count(self, index: int) -> tuple[int, int, int]:
        """The positions, targets and images of a sample; zeros if it is bad and skipped."""
        try:
            segment = self.segment(self.source[index])
        except UserError:
            if self.skip_bad:
                return 0, 0, 0
            raise
        return len(segment.tokens), num_targets(segment), segment.num_images

    def bad_texts(self, indices: Iterable[int]) -> Iterator[BadSample]:
        """Yields those of the samples whose texts are bad."""
        for index in indices:
            ident = str(index)  # until the record is known to be a sample
            try:
                sample = self.source[index]
                ident = sample.id
                self.segment(sample)
            except UserError as error:
                yield BadSample(index, ident, str(error))

    def id(self, index: int) -> str:
        """The id of a sample; of a record that is no sample its index."""
        try:
            return self.source[index].id
        except UserError:
            return str(index)


def num_targets(segment: Segment) -> int:
    return int(np.count_nonzero(segment.labels[1:] != IGNORE_INDEX))  # no position predicts the first label
