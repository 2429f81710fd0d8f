"""The instructions that ask for a caption or a description: as many as the paper has, in our own words."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.datagen.words import read_entries

Option = TypeVar("Option")

BRIEF = tuple(read_entries("brief_instructions.txt"))  # for captions of a phrase or a sentence
DETAILED = tuple(read_entries("detailed_instructions.txt"))  # for descriptions of a paragraph or more


def pick(options: Sequence[Option], *key: int | str) -> Option:
    """One of the options, which depends on `key` alone."""
    return options[int.from_bytes(hashlib.sha256(repr(key).encode(errors="surrogatepass")).digest()) % len(options)]


def with_image(question: str, seed: int, id: str) -> str:
    """The question with the image before or after it, by seed and id of the sample."""
    before = pick((True, False), "image before the question", seed, id)
    return f"{IMAGE_TOKEN}\n{question}" if before else f"{question}\n{IMAGE_TOKEN}"
