"""AnyRes against transformers' processor, in pixels and in the number and order of features."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_jax.cli import UserError
from llava_jax.data import anyres
from llava_jax.data.anyres import AnyRes, Grid, Tiling
from llava_jax.data.features import NEWLINE, Size
from llava_jax.data.images import preprocess
from llava_jax.models.config import CLIP_MEAN

S, G = 336, 24
P = G * G


def tiling(**fields):
    return Tiling(AnyRes(**fields), S, G, CLIP_MEAN)


ORIGINAL = tiling(grids=(Grid(2, 1), Grid(1, 2), Grid(2, 2), Grid(1, 3), Grid(3, 1)))
PINPOINTS = [[row * S, column * S] for row, column in anyres.GRIDS]
SIDES = st.integers(1, 3000)

# Sizes with the grid, the kept map and the number of features that transformers has.
KNOWN = """336x336 1x2 24x24 1176 · 300x200 1x2 24x36 1464 · 200x300 1x2 24x16 984 · 337x336 1x2 24x24 1176
336x337 2x1 24x24 1176 · 337x337 2x2 48x48 2928 · 640x480 2x2 36x48 2340 · 480x640 2x2 48x36 2352
640x427 2x2 32x48 2144 · 427x640 2x2 48x32 2160 · 640x360 2x2 28x48 1948 · 640x320 1x2 24x48 1752
500x375 2x2 36x48 2340 · 500x333 1x2 24x36 1464 · 333x500 2x1 36x24 1476 · 1024x899 2x2 42x48 2634
1080x1920 2x2 48x28 1968 · 1170x2532 3x1 52x24 1876 · 800x200 1x3 18x72 1890 · 200x800 3x1 72x18 1944
1008x336 1x3 24x72 2328 · 336x1008 3x1 72x24 2376 · 3000x300 1x3 8x72 1160 · 1700x2200 2x2 48x38 2448
2480x3508 2x2 48x34 2256 · 352x748 3x1 52x24 1876 · 799x376 1x3 24x52 1848""".replace("\n", " · ").split(" · ")


def pair(text):
    return tuple(int(part) for part in text.split("x"))


def kept(size):
    return anyres.kept_map(size, anyres.best_grid(size, anyres.GRIDS, S), G)


@pytest.mark.parametrize("line", KNOWN)
def test_known_sizes(line):
    size, grid, left, count = line.split()
    size = Size(*pair(size))
    assert anyres.best_grid(size, anyres.GRIDS, S) == pair(grid)
    assert kept(size) == pair(left)
    assert len(tiling().features(size, False).index) == int(count)


def test_small_images_follow_the_order_of_the_grids():
    """The original reads the same list of sizes as width and height."""
    assert anyres.best_grid(Size(300, 200), ORIGINAL.anyres.grids, S) == Grid(2, 1)
    assert len(ORIGINAL.features(Size(300, 200), False).index) == 976
    assert len(ORIGINAL.features(Size(200, 300), False).index) == 1476


PROCESSOR = object.__new__(LlavaNextProcessor)
PROCESSOR.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS)
PROCESSOR.patch_size, PROCESSOR.num_additional_image_tokens = 14, 1


@settings(max_examples=3000, deadline=None)
@given(SIDES, SIDES)
def test_counts_are_those_of_the_processor(width, height):
    size = Size(width, height)
    try:
        index = tiling().features(size, False).index
    except UserError:
        assert min(width / height, height / width) < 1 / G
        return
    assert len(index) == PROCESSOR._get_number_of_features(height, width, S, S) - 1


@settings(max_examples=1000, deadline=None)
@given(SIDES, SIDES, st.sampled_from(anyres.MERGES), st.integers(3000, 20_000))
@example(336, 336, "spatial_unpad", 8192)  # three tiles of few features
@example(2000, 84, "spatial_unpad", 8192)
def test_no_images_of_a_row_have_more_tiles(width, height, merge, positions):
    one = tiling(merge=merge)
    try:
        found = one.features(Size(width, height), False)
    except UserError:
        return
    assert positions // len(found.index) * found.tiles <= one.most_tiles_in(positions)


@settings(max_examples=50, deadline=None)
@given(SIDES, SIDES)
def test_order_is_that_of_the_model(width, height):
    """Features that are their own numbers, merged as `LlavaNextModel.pack_image_features` does."""
    size = Size(width, height)
    if min(width / height, height / width) < 1 / G:
        return
    rows, columns = grid = anyres.best_grid(size, anyres.GRIDS, S)
    features = torch.arange(P, P * (1 + rows * columns), dtype=torch.float64).view(rows, columns, G, G, 1)
    features = unpad_image(features.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), (height, width))
    newline = torch.full((1, features.shape[1], 1), float(NEWLINE), dtype=torch.float64)
    merged = torch.cat([features, newline], dim=-1).flatten().long().numpy()
    index = tiling().features(size, False).index
    np.testing.assert_array_equal(index, np.concatenate([np.arange(P), merged]))
    spatial = tiling(merge="spatial").features(size, False).index
    flat = tiling(merge="flat").features(size, False).index
    np.testing.assert_array_equal(flat, np.arange((1 + rows * columns) * P))
    np.testing.assert_array_equal(np.sort(spatial), flat)
    assert list(spatial[P : P + 2 * G : G]) == [P, 2 * P if grid.columns > 1 else P + G]


def drawn(width, height):
    """R = 7x + 3y, G = xy, B = (x² + 5y) / 3, each modulo 256."""
    x, y = np.arange(width), np.arange(height)[:, None]
    channels = (7 * x + 3 * y, x * y, (x**2 + 5 * y) // 3)
    return Image.fromarray(np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size,digest", [((640, 427), "3020efef92bda9ac"), ((500, 700), "fe82d0ca152e59a2")])
def test_pixels_are_known(size, digest):
    image = drawn(*size)
    found = tiling().tiles(image, False).transpose(0, 3, 1, 2)
    assert hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    "size", [(640, 427), (427, 640), (37, 51), (1, 20), (333, 1999), (2000, 121), (336, 336), (1501, 1500)]
)
def test_pixels_are_those_of_the_processor(size):
    image = drawn(*size)
    tiles = tiling().tiles(image, False)
    assert len(tiles) == tiling().features(Size(*size), False).tiles
    processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=PINPOINTS, size={"shortest_edge": S}, crop_size={"height": S, "width": S}
    )
    theirs = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    np.testing.assert_array_equal(tiles, theirs.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("size", [Size(1, 20_000), Size(20_000, 1), Size(56, 1)])
def test_images_of_which_nothing_is_left_are_refused(size):
    with pytest.raises(UserError, match=f"{size.width} x {size.height} pixels are too thin for AnyRes: crop it"):
        tiling().features(size, False)


@pytest.mark.parametrize(
    "field,value",
    [
        ("grids", ()),
        ("grids", ((0, 1),)),
        ("grids", ((1, 2, 3),)),
        ("grids", ((20, 20),)),
        ("grids", (("1", 2),)),
        ("merge", "unpad"),
        ("several", "first"),
    ],
)
def test_configs_that_are_none(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(AnyRes(), **{field: value})


def test_several_images_can_have_their_base_alone():
    """As LLaVA-NeXT's train.py: padded to a square of the mean colour, no tiles, one newline."""
    both, image = tiling(several="base"), drawn(640, 427)
    index, tiles = both.features(Size(640, 427), True)
    assert tiles == 1 and index.tolist() == [*range(P), NEWLINE]
    np.testing.assert_array_equal(both.tiles(image, True), preprocess(image, S, "pad", CLIP_MEAN)[None])
    assert both.features(Size(640, 427), False).tiles == tiling().features(Size(640, 427), True).tiles == 5


def test_tiles_of_a_hostile_configuration_are_not_allocated():
    """A thin image keeps the resized one small, not the grid: 100 tiles of 8192 pixels would take 20 GB."""
    hostile = Tiling(AnyRes(grids=(Grid(10, 10),)), 8192, 1, CLIP_MEAN)
    with pytest.raises(UserError, match="81920 x 81920 pixels are more than"):
        hostile.tiles(Image.new("RGB", (1000, 1)), False)
