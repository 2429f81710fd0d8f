"""Measures the samples of a survey in tokens: which are too long, what that leaves to learn, and a histogram."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_jax.data.check_records import Problem, Survey
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import measure_once
from llava_jax.data.padding import padding_of_samples
from llava_jax.data.plan import Lengths
from llava_jax.data.template_fit import missing_marks

UNLIMITED = 2**30  # tokens: nothing is cut, so that the same lengths serve every maximum
IN_PROCESSES = 20_000  # samples from which on processes that measure are worth their start


@dataclass(frozen=True)
class Measuring:
    """How to measure samples, whatever maximal length `encode` has, and the length above which one is told."""

    encode: TextEncoder
    maximum: int | None
    workers: int

    def measure(self, survey: Survey) -> Lengths:
        """Without a maximal length; a sample that cannot be encoded has no tokens."""
        workers = self.workers if len(survey) >= IN_PROCESSES else 0
        return measure_once(EncodedSource(survey, replace(self.encode, max_length=UNLIMITED), skip_bad=True), workers)

    @staticmethod
    def describe(lengths: Lengths) -> dict[str, Any]:
        """Positions that samples take, image tokens included: quantiles, and counts between powers of two."""
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
        """What is to be said about padding, see `padding_of_samples`; None without a maximal length."""
        return padding_of_samples(lengths, self.maximum) if self.maximum else None

    def problems(self, survey: Survey, lengths: Lengths) -> Iterator[Problem]:
        if misfit := missing_marks(self.encode.template, self.encode.tokenizer):
            yield Problem("template", "-", misfit, -1, warning=True)
        for number in np.flatnonzero(lengths.tokens == 0).tolist():
            if any(role == "assistant" for role, _ in survey[number].turns):  # else it was reported
                yield from self._nothing_learned(survey, number, UNLIMITED)
        if self.maximum is None:
            return
        for number in np.flatnonzero(lengths.tokens > self.maximum).tolist():
            length, images = int(lengths.tokens[number]), int(lengths.images[number])
            text = length - images * self.encode.image_tokens
            parts = f"{text} of text, {images} images of {self.encode.image_tokens}"
            detail = f"{length} tokens ({parts}) will be cut to {self.maximum}"
            yield Problem("too-long", survey[number].id, detail, survey.good[number], warning=True)
            yield from self._nothing_learned(survey, number, self.maximum)

    def _nothing_learned(self, survey: Survey, number: int, max_length: int) -> Iterator[Problem]:
        encoded = EncodedSource(survey, replace(self.encode, max_length=max_length))
        for _, ident, reason in encoded.bad_texts([number]):
            yield Problem("nothing-learned", ident, reason, survey.good[number])
