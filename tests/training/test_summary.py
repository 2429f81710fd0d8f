"""What a run says before its first step."""

import numpy as np

from llava_jax.data.plan import Lengths
from llava_jax.data.sources import Sample
from llava_jax.training.summary import warn_of_moved_images


def sample(ident, question):
    return Sample(ident, ("a.jpg",) * question.count("<image>"), (("user", question), ("assistant", "a")))


def test_images_that_are_moved_out_of_the_text_are_told_once(capsys):
    samples = [
        sample("one", "Before <image> after"),
        sample("b", "Source: <image>\nTarget: <image>"),
        sample("two", "<image>\n<image>\nCompare"),
        sample("c", "<image> and <image>"),
    ]
    images = np.array([1, 2, 2, 2], np.int32)
    lengths = Lengths(np.full(4, 50, np.int32), np.full(4, 5, np.int32), images, images)
    warn_of_moved_images(samples, lengths, "as_is")
    warn_of_moved_images(samples[::2], Lengths(*(part[::2] for part in lengths)), "first")
    assert capsys.readouterr().err == ""
    warn_of_moved_images(samples, lengths, "random")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 2 samples, b the first, have text between the images")
    assert "image_position=random moves before it: image_position=as_is keeps" in line
