"""Measures how many positions, targets and images each sample takes, once: the cache keeps it for later starts.

It is kept under a hash of all that it depends on: the samples, the tokenizer, the template, the tokens of an image,
the maximal length, where images are placed, and the versions of the libraries that tokenize.
"""

import functools
import hashlib

import grain
import numpy as np
import tokenizers
import transformers

from llava_jax.cli import track
from llava_jax.data.encoded import EncodedSource
from llava_jax.data.plan import Lengths
from llava_jax.data.read_ahead import read_ahead
from llava_jax.data.tokenization import default_system
from llava_jax.files import cache

LENGTHS = 2  # raise it when samples of the same texts are encoded or counted otherwise
MEASURED_TOGETHER = 256  # samples: a process takes as long to pass one on as to measure it


def measure_once(encoded: EncodedSource, workers: int = 0) -> Lengths:
    """The lengths of all samples, from the cache if it has them, else measured and kept there."""
    lengths = cached_lengths(encoded)
    if lengths is None:
        lengths = measure(encoded, workers)
        keep_lengths(encoded, lengths)
    return lengths


def measure(encoded: EncodedSource, workers: int = 0, first: int = 0, stride: int = 1) -> Lengths:
    """Encodes the text of samples first, first + stride, ... once, so that all errors in it appear before step 0.

    Raises UserError for the first sample that cannot be encoded or has no targets; if bad samples are skipped it takes
    no positions.
    """
    indices = range(first, len(encoded), stride)
    starts = grain.MapDataset.range(0, len(indices), MEASURED_TOGETHER)
    counts = read_ahead(starts.map(functools.partial(_counts, encoded, indices)), workers)
    if first == 0:
        counts = track(counts, f"Measuring samples, {MEASURED_TOGETHER} at a time", total=len(starts))
    return Lengths(*np.concatenate([np.zeros((0, len(Lengths._fields)), np.int32), *counts]).T)


def _counts(encoded: EncodedSource, indices: range, start: int) -> np.ndarray:
    """int32[n, 4]: the `Lengths` of the next samples, from a place in `indices` on."""
    return np.array([encoded.count(index) for index in indices[start : start + MEASURED_TOGETHER]], np.int32)


def cached_lengths(encoded: EncodedSource) -> Lengths | None:
    """The lengths in the cache. Those with bad samples, which take no positions, count only if these are skipped."""
    found = cache.load(lengths_name(encoded))
    parts = np.zeros(0) if found is None else found.get("lengths", np.zeros(0))
    if parts.shape != (4 if encoded.needs_sizes else 3, len(encoded)) or parts.dtype.kind != "i" or np.any(parts < 0):
        return None
    lengths = Lengths(*parts[:3], images=parts[-1])
    return lengths if encoded.skip_bad or lengths.tokens.all() else None


def keep_lengths(encoded: EncodedSource, lengths: Lengths) -> None:
    """Writes the lengths to the cache."""
    cache.save(lengths_name(encoded), lengths=stored(encoded, lengths))


def stored(encoded: EncodedSource, lengths: Lengths) -> np.ndarray:
    """The lengths as files have them, without the images where each is one tile; int32[4, N] or int32[3, N]."""
    return np.stack(lengths if encoded.needs_sizes else lengths[:3])


def lengths_name(encoded: EncodedSource) -> str:
    """The name of the lengths in the cache."""
    encode = encoded.encode
    tiles = (encode.tiling.anyres, encode.tiling.side, encode.tiling.patches) if encode.tiling else ()
    placed = (encode.image_tokens, encode.max_length, encode.image_position, encode.seed, *tiles)
    vocabulary = hashlib.sha256(encode.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    text = (vocabulary, encode.template, default_system(encode.tokenizer))
    versions = (LENGTHS, transformers.__version__, tokenizers.__version__)
    return f"lengths-{cache.digest(encoded.source.digest, placed, text, versions)}"
