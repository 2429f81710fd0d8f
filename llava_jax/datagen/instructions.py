"""What is asked for a caption or a description: as many ways of it as the paper has, in words of our own."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from llava_jax.data.conversation import IMAGE_TOKEN

Option = TypeVar("Option")

# For captions of a phrase or a sentence.
BRIEF = (
    "Say in a few words what this picture shows.",
    "Sum up the image in one short sentence.",
    "Give a brief caption for this picture.",
    "What is shown here, in short?",
    "Tell briefly what can be seen in the photo.",
    "Write a concise caption of the image.",
    "Put the content of this picture into a single sentence.",
    "Name the main thing that this image shows.",
    "How would you caption this picture in a line?",
    "Outline the image in as few words as you can.",
    "State shortly what is in the picture.",
)

# For descriptions of a paragraph or more.
DETAILED = (
    "Describe this picture in as much detail as you can.",
    "Write a thorough description of the image.",
    "Go through everything that can be seen in this photo.",
    "What does the picture show? Leave nothing out.",
    "Explain the image to someone who cannot see it, in detail.",
    "Give a full account of what is in the picture.",
    "Take a close look at the image and tell what you find.",
    "Describe the scene, its objects and how they stand to each other.",
    "Please paint this picture in words, with all its particulars.",
    "Write an extensive description of what this photo contains.",
    "Walk me through the picture, part by part.",
    "What do you see in this image? Be as complete as possible.",
    "Give a detailed report on the content of the image.",
    "Analyse the picture carefully and describe all of it.",
    "Tell me about this scene at length.",
    "Characterise the image with a rich and precise description.",
)


def pick(options: Sequence[Option], *key: int | str) -> Option:
    """One of the options, by `key` alone."""
    return options[int.from_bytes(hashlib.sha256(repr(key).encode(errors="surrogatepass")).digest()) % len(options)]


def with_image(question: str, seed: int, id: str) -> str:
    """The question with the picture before or after it, by seed and id of the sample."""
    before = pick((True, False), "image before the question", seed, id)
    return f"{IMAGE_TOKEN}\n{question}" if before else f"{question}\n{IMAGE_TOKEN}"
