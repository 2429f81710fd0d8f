"""Batches of prompts: shapes, shared images and shared prefixes."""

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.tokenization import one_tile
from llava_jax.inference.prompts import Prompt, assemble, bucket, share_prefixes
from llava_jax.inference.requests import PreparedImage

P = 4  # features of a picture
IMAGES = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue")]


def prompt(*parts: int | Image.Image) -> Prompt:
    """So many tokens of text, or a picture."""
    tokens, index, pictures = [], [], []
    for part in parts:
        if isinstance(part, int):
            tokens += range(1, part + 1)
            index += [-1] * part
        else:
            tokens += [0] * P
            index += range(len(pictures) * P, (len(pictures) + 1) * P)
            pictures.append(part)
    return Prompt(np.array(tokens, np.int32), np.array(index, np.int32), pictures, [1] * len(pictures))


def test_buckets_are_few_and_waste_at_most_half():
    sizes = {bucket(n) for n in range(1, 1025)}
    assert sizes == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024}
    assert all(n <= bucket(n) <= 1.5 * n for n in range(1, 1025))


def test_each_picture_is_read_once_and_its_features_are_found_where_its_marks_were():
    red, lime, blue = IMAGES
    prompts = [prompt(3, red, 1), prompt(5), prompt(blue, 2, red), prompt(lime, blue, lime, 7)]
    read = []

    def colour(picture: Image.Image, several: bool) -> PreparedImage:
        read.append(picture)
        return PreparedImage(np.asarray(picture)[None], one_tile(P))

    batch = assemble(prompts, P, colour)
    assert len(read) == 3
    assert batch.images.shape == (1, 3, 2, 2, 3)
    assert batch.tokens.shape == (4, 24)
    assert batch.lengths.tolist() == [len(each.tokens) for each in prompts]
    for row, each in enumerate(prompts):
        length = len(each.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :length], each.tokens)
        assert (batch.image_feature_index[row, length:] == -1).all()
        for position, index in enumerate(each.image_feature_index):
            found = batch.image_feature_index[row, position]
            if index == -1:
                assert found == -1
            else:
                assert found % P == index % P
                np.testing.assert_array_equal(batch.images[0, found // P], np.asarray(each.images[index // P]))


def test_text_alone_needs_no_pictures():
    batch = assemble([prompt(2), prompt(3), prompt(1), prompt(1), prompt(1)], P, np.asarray)
    assert batch.images is None
    assert batch.tokens.shape == (6, 16)
    assert batch.lengths.tolist() == [2, 3, 1, 1, 1, 1]


def test_questions_about_an_image_share_their_prefix():
    red, lime, _ = IMAGES
    prompts = [prompt(40, picture, 3 + i) for picture in (red, lime) for i in range(8)]
    shared = share_prefixes(prompts)
    assert [len(each.tokens) for each in shared.prefixes] == [44, 44]
    for whole, number, suffix in zip(prompts, shared.prefix_of, shared.suffixes, strict=True):
        prefix = shared.prefixes[number]
        assert prefix.images[0] is whole.images[0]
        np.testing.assert_array_equal(np.concatenate([prefix.tokens, suffix.tokens]), whole.tokens)
        assert (suffix.image_feature_index == -1).all()


@pytest.mark.parametrize(
    "prompts",
    [
        [prompt(40, IMAGES[0], 3)],  # alone
        [prompt(40, picture, 3) for picture in IMAGES],  # all different
        [prompt(4, IMAGES[0], 40 + i) for i in range(8)],  # little in common
        [prompt(40 + i, IMAGES[0], 3) for i in range(8)],  # other text before the picture
        [prompt(40, IMAGES[0]) for _ in range(8)],  # nothing after it
        [prompt(40) for _ in range(8)],
    ],
)
def test_prompts_stay_whole_where_sharing_saves_little(prompts):
    assert share_prefixes(prompts) is None
