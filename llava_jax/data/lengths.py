"""The lengths of samples, measured once: later starts, and other commands with the same data, find them in the cache.

They are kept under a hash of all that they depend on: the samples, the tokenizer, the template, the tokens of an image,
the maximal length, where images are placed, and the versions of what tokenizes.
"""

import hashlib

import numpy as np
import tokenizers
import transformers

from llava_jax.data.pipeline import TextEncoder, measure
from llava_jax.data.plan import Lengths
from llava_jax.data.sources import Source
from llava_jax.data.tokenization import default_system
from llava_jax.files import cache

LENGTHS = 2  # raise it when samples of the same texts are encoded or counted otherwise


def measure_once(source: Source, encode: TextEncoder, workers: int = 0, skip_bad: bool = False) -> Lengths:
    """What `pipeline.measure` gives of all samples, from the cache if it is there, else kept in it."""
    lengths = cached_lengths(source, encode, skip_bad)
    if lengths is None:
        lengths = measure(source, encode, workers, skip_bad=skip_bad)
        keep_lengths(source, encode, lengths)
    return lengths


def cached_lengths(source: Source, encode: TextEncoder, skip_bad: bool) -> Lengths | None:
    """The lengths in the cache. Bad samples, which have no tokens, are for those to take who skip them."""
    found = cache.load(lengths_name(source, encode))
    stored = np.zeros(0) if found is None else found.get("lengths", np.zeros(0))
    if stored.shape != (len(Lengths._fields), len(source)) or stored.dtype.kind != "i" or np.any(stored < 0):
        return None
    lengths = Lengths(*stored)
    return lengths if skip_bad or lengths.tokens.all() else None


def keep_lengths(source: Source, encode: TextEncoder, lengths: Lengths) -> None:
    cache.save(lengths_name(source, encode), lengths=np.stack(lengths))


def lengths_name(source: Source, encode: TextEncoder) -> str:
    """What lengths are called in the cache."""
    placed = (encode.image_tokens, encode.max_length, encode.image_position, encode.seed)
    vocabulary = hashlib.sha256(encode.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    text = (vocabulary, encode.template, default_system(encode.tokenizer))
    versions = (LENGTHS, transformers.__version__, tokenizers.__version__)
    return f"lengths-{cache.digest(source.digest, placed, text, versions)}"
