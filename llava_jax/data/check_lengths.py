"""Checks the lengths of samples in tokens: which are too long, which keep no targets, and a histogram."""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_jax.cli import UserError
from llava_jax.data.check_records import CheckedRecords, Problem
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.features import Features
from llava_jax.data.lengths import measure, measure_once
from llava_jax.data.padding import padding_of_samples
from llava_jax.data.plan import Lengths
from llava_jax.data.template_fit import missing_marks

UNLIMITED = 2**30  # tokens: no sample is cut, so the same lengths serve every maximum
IN_PROCESSES = 20_000  # samples: processes that measure fewer would take longer to start than to measure


@dataclass(frozen=True)
class Measuring:
    """How to measure samples. Those of more than `maximum` tokens are reported; that of `encode` does not count."""

    encode: TextEncoder
    maximum: int | None
    workers: int

    def measure(self, checked: CheckedRecords) -> Lengths:
        """The lengths before samples are cut; a sample that cannot be encoded has no tokens."""
        workers = self.workers if len(checked) >= IN_PROCESSES else 0
        encoded = EncodedSource(checked, replace(self.encode, max_length=UNLIMITED), skip_bad=True)
        return (measure if encoded.needs_sizes else measure_once)(encoded, workers)  # images may have changed

    @staticmethod
    def describe(lengths: Lengths) -> dict[str, Any]:
        """Statistics of the tokens of samples, image tokens included: quantiles, and counts between powers of two."""
        tokens = lengths.tokens[lengths.tokens > 0]
        if not len(tokens):
            return {"samples": 0}
        bounds = [0, *(2**power for power in range(5, max(int(tokens.max()).bit_length(), 5) + 1))]
        counts, _ = np.histogram(tokens, bounds)
        quantiles = {f"p{q}": int(np.percentile(tokens, q)) for q in (50, 90, 99)}
        sizes = {"mean": round(float(tokens.mean()), 1), **quantiles, "max": int(tokens.max())}
        bins = zip(itertools.pairwise(bounds), counts.tolist(), strict=True)
        histogram = [{"from": low, "below": high, "samples": count} for (low, high), count in bins]
        return {"samples": len(tokens), "tokens": int(tokens.sum()), **sizes, "histogram": histogram}

    def padding(self, lengths: Lengths) -> str | None:
        """The message of `padding_of_samples`; None without a maximal length."""
        return padding_of_samples(lengths, self.maximum) if self.maximum else None

    def problems(
        self, checked: CheckedRecords, lengths: Lengths, unreadable: Collection[int] = ()
    ) -> Iterator[Problem]:
        """Problems of lengths, with AnyRes not of samples whose images are `unreadable`, which were reported."""
        if misfit := missing_marks(self.encode.template, self.encode.tokenizer):
            yield Problem("template", "-", misfit, -1, warning=True)
        for number in np.flatnonzero(lengths.tokens == 0).tolist():
            if self.encode.tiling and checked.good[number] in unreadable:
                continue
            try:
                self._features(checked, number)
            except UserError as error:
                yield Problem("image-size", checked[number].id, str(error), checked.good[number])
                continue
            if any(role == "assistant" for role, _ in checked[number].turns):  # else it was reported
                yield from self._nothing_learned(checked, number, UNLIMITED)
        if self.maximum is None:
            return
        for number in np.flatnonzero(lengths.tokens > self.maximum).tolist():
            length, images = int(lengths.tokens[number]), int(lengths.images[number])
            under = sum(len(image.index) for image in self._features(checked, number))
            tiles = f"{under} in {lengths.tiles[number]} tiles"
            each = tiles if self.encode.tiling else self.encode.image_tokens
            detail = (
                f"{length} tokens ({length - under} of text, {images} images of {each}) will be cut to {self.maximum}"
            )
            yield Problem("too-long", checked[number].id, detail, checked.good[number], warning=True)
            yield from self._nothing_learned(checked, number, self.maximum)

    def _features(self, checked: CheckedRecords, number: int) -> list[Features]:
        sample = checked[number]
        return self.encode.features(sample, EncodedSource(checked, self.encode).sizes(number, sample))

    def _nothing_learned(self, checked: CheckedRecords, number: int, max_length: int) -> Iterator[Problem]:
        encoded = EncodedSource(checked, replace(self.encode, max_length=max_length))
        for _, ident, reason in encoded.bad_texts([number]):
            yield Problem("nothing-learned", ident, reason, checked.good[number])
