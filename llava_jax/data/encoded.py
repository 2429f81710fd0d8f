"""Samples as the model reads their texts, and what happens to bad ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_jax.cli import UserError, short
from llava_jax.data.anyres import Tiling
from llava_jax.data.features import Features, Size
from llava_jax.data.sources import Sample, Source, image_sizes
from llava_jax.data.template_fit import require_fit
from llava_jax.data.templates import Template
from llava_jax.data.tokenization import IGNORE_INDEX, Encoded, Segment, encode_sample, expand, one_tile
from llava_jax.data.tokenizer_files import Tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Makes the segment of a sample: rendered, tokenized, with its images expanded, and truncated.

    Raises UserError where template and tokenizer do not fit.

    Attributes:
      image_tokens: P, of a tile.
      tiling: of AnyRes, if the features of an image depend on its size.
    """

    template: Template
    tokenizer: Tokenizer
    image_tokens: int
    max_length: int
    image_position: str = "first"
    seed: int = 0
    tiling: Tiling | None = None

    def __post_init__(self) -> None:
        require_fit(self.template, self.tokenizer)

    def __call__(self, sample: Sample, sizes: Sequence[Size] = ()) -> Segment:
        """`sizes`: of the images of the sample, with AnyRes."""
        return expand(self.ids(sample), self.image_tokens, self.max_length, self.features(sample, sizes))

    def features(self, sample: Sample, sizes: Sequence[Size]) -> list[Features]:
        """The features of each image. Raises UserError naming an image that is too thin for AnyRes."""
        if self.tiling is None:
            return [one_tile(self.image_tokens)] * len(sample.images)
        features = []
        for name, size in zip(sample.images, sizes, strict=True):
            try:
                features.append(self.tiling.features(size, several=len(sizes) > 1))
            except UserError as error:
                raise UserError(f"sample {short(sample.id)}: image {name}: {error}") from error
        return features

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

    @property
    def needs_sizes(self) -> bool:
        """Whether the segment of a sample depends on the sizes of its images."""
        return getattr(self.encode, "tiling", None) is not None

    def sizes(self, index: int, sample: Sample) -> list[Size]:
        """The sizes of the images of a sample; none if they do not matter."""
        return image_sizes(self.source, index, sample) if self.needs_sizes else []

    def segment(self, index: int, sample: Sample) -> Segment:
        """Encodes sample number `index`. Raises UserError where that fails, or leaves no target."""
        segment = self.encode(sample, self.sizes(index, sample)) if self.needs_sizes else self.encode(sample)
        if num_targets(segment) == 0:
            raise UserError(
                f"sample {short(sample.id)}: nothing to learn in the {len(segment.tokens)} positions that are kept, "
                "its answers are empty or cut off: raise the maximal length or remove the sample"
            )
        return segment

    def count(self, index: int) -> tuple[int, int, int, int]:
        """The `Lengths` of a sample; zeros if it is bad and skipped."""
        try:
            segment = self.segment(index, self.source[index])
        except UserError:
            if self.skip_bad:
                return 0, 0, 0, 0
            raise
        return len(segment.tokens), num_targets(segment), segment.num_tiles, segment.num_images

    def bad_texts(self, indices: Iterable[int]) -> Iterator[BadSample]:
        """Yields those of the samples whose texts are bad."""
        for index in indices:
            ident = str(index)  # until the record is known to be a sample
            try:
                sample = self.source[index]
                ident = sample.id
                self.segment(index, sample)
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
