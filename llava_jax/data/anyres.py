"""AnyRes (LLaVA-1.6): an image as tiles at a higher resolution, and the order of their features in the sequence.

The image is resized to fit the best of a few grids of tiles, padded with black and cut into tiles. The complete image,
stretched to one tile, comes first: the base. The features of the other tiles form one map; without the rows or columns
that are all padding, it follows the base row by row, each row with a learned newline at its end. In LLaVA-NeXT it is
`process_anyres_image` in llava/mm_utils.py and `prepare_inputs_labels_for_multimodal` in llava/model/llava_arch.py.

All but the pixels is a function of the image's size, in integers: transformers computes the same numbers, the original
loses a row or column of some images to rounding.

Shape letters: s tile side in pixels, g patches along a tile's side, P = g g, N features of an image.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data.features import NEWLINE, Features, Size
from llava_jax.data.images import preprocess, refuse_huge, resize, to_rgb

MERGES = ("spatial_unpad", "spatial", "flat")
MAX_GRIDS, MAX_TILES = 100, 100  # of a config, and of a grid


class Grid(NamedTuple):
    """Tiles of an image, without its base."""

    rows: int
    columns: int


# 1.6's grids as transformers reads its "image_grid_pinpoints". The original reads them as width and height, so that it
# tries 2 x 1 before 1 x 2: images with both sides of at most 336 pixels fit these equally well.
GRIDS = (Grid(1, 2), Grid(2, 1), Grid(2, 2), Grid(3, 1), Grid(1, 3))


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """How images become tiles and features.

    Attributes:
      grids: in the order in which they are tried: of those that fit an image equally well the first is taken.
      merge: "flat" has the features tile by tile, "spatial" row by row of the map, "spatial_unpad" without padding and
        with newlines.
      several: what images of a sample with more than one get: "tiles", or the "base" alone, padded to a square.
    """

    grids: tuple[Grid, ...] = GRIDS
    merge: str = "spatial_unpad"
    several: str = "tiles"

    def __post_init__(self) -> None:
        if not 0 < len(self.grids) <= MAX_GRIDS:
            raise ValueError(f"grids: there are {len(self.grids)}, not 1 to {MAX_GRIDS}")
        for grid in self.grids:
            is_grid = len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)
            if not is_grid or math.prod(grid) > MAX_TILES:
                raise ValueError(f"grids: {grid!r} is not rows and columns of at most {MAX_TILES} tiles")
        if self.merge not in MERGES:
            raise ValueError(f"merge is {self.merge!r}, not one of {', '.join(MERGES)}")
        if self.several not in ("tiles", "base"):
            raise ValueError(f"several is {self.several!r}, not 'tiles' or 'base'")

    @property
    def newline(self) -> bool:
        """Whether the model has a learned newline."""
        return self.merge == "spatial_unpad"

    @classmethod
    def from_dict(cls, values: dict) -> "AnyRes":
        return cls(**values | {"grids": tuple(Grid(*grid) for grid in values["grids"])})


def best_grid(size: Size, grids: tuple[Grid, ...], s: int) -> Grid:
    """The grid that keeps most pixels of an image, and of these the one with least padding.

    Raises UserError for an image so thin that no grid keeps any.
    """

    def kept_and_used(grid: Grid) -> tuple[int, int]:
        width, height = grid.columns * s, grid.rows * s
        scale = min(width / size.width, height / size.height)
        kept = min(int(size.width * scale) * int(size.height * scale), size.width * size.height)
        return kept, kept - width * height

    best = max(grids, key=kept_and_used)  # the first of equals
    if kept_and_used(best)[0] == 0:
        raise _too_thin(size)
    return best


def kept_map(size: Size, grid: Grid, g: int) -> tuple[int, int]:
    """(rows, columns) of the map of features that are left without padding; as much is cut on both sides."""
    rows, columns = grid.rows * g, grid.columns * g
    if size.width * rows > columns * size.height:  # wider than the map
        needed = size.height * columns // size.width
        return rows - (rows - needed) // 2 * 2, columns
    needed = size.width * rows // size.height
    return rows, columns - (columns - needed) // 2 * 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Images of a model with AnyRes as tiles, and the features of these.

    Attributes:
      anyres: the grids and the order.
      side: s, of a tile in pixels.
      patches: g, along the side of a tile.
      mean: of the normalization, in 0..1, with which a square base is padded.
      resample: the filter with which images are resized.
    """

    anyres: AnyRes
    side: int
    patches: int
    mean: tuple[float, float, float]
    resample: str = "bicubic"

    @property
    def most_tiles(self) -> int:
        """Tiles of an image at most, the base included."""
        return 1 + max(map(math.prod, self.anyres.grids))

    def most_tiles_in(self, positions: int) -> int:
        """Tiles of the images that so many positions hold, at most.

        Thin images have many tiles for their features: without padding, one row or one column of the map may be left.
        """
        g, P = self.patches, self.patches**2

        def tiles_in(grid: Grid) -> int:
            rows, columns = grid.rows * g, grid.columns * g
            of_map = min(columns + 1, 2 * rows) if self.anyres.newline else rows * columns
            return positions // (P + of_map) * (1 + math.prod(grid))

        return max(self.most_tiles, *map(tiles_in, self.anyres.grids))

    def features(self, size: Size, several: bool) -> Features:
        """The features of an image of this size; `several`: whether its sample has more than one.

        Raises UserError for an image so thin that all of it would be cut off.
        """
        alone = several and self.anyres.several == "base"
        return _features(self.anyres, None if alone else size, self.side, self.patches)

    def tiles(self, image: Image.Image, several: bool) -> np.ndarray:
        """An upright image as uint8[tiles, s, s, 3]. Raises UserError as `features` does."""
        if several and self.anyres.several == "base":
            return preprocess(image, self.side, "pad", self.mean, self.resample)[None]
        image = to_rgb(image)
        grid = best_grid(Size(*image.size), self.anyres.grids, self.side)
        return cut(image, grid, self.side, Image.Resampling[self.resample.upper()])


@functools.lru_cache(maxsize=4096)
def _features(anyres: AnyRes, size: Size | None, s: int, g: int) -> Features:
    """Those of an image of this size, or of a base alone."""
    P, grid = g * g, best_grid(size, anyres.grids, s) if size else Grid(0, 0)
    base, tiles = np.arange(P), P + np.arange(math.prod(grid) * P)
    if size is None:
        index = np.append(base, [NEWLINE] * anyres.newline)
    elif anyres.merge == "flat":
        index = np.append(base, tiles)
    else:
        image_map = tiles.reshape(grid.rows, grid.columns, g, g).swapaxes(1, 2).reshape(grid.rows * g, grid.columns * g)
        if anyres.newline:
            rows, columns = kept_map(size, grid, g)
            if not rows or not columns:
                raise _too_thin(size)
            top, left = (image_map.shape[0] - rows) // 2, (image_map.shape[1] - columns) // 2
            kept = image_map[top : top + rows, left : left + columns]
            image_map = np.pad(kept, ((0, 0), (0, 1)), constant_values=NEWLINE)
        index = np.append(base, image_map)
    index = index.astype(np.int32)
    index.flags.writeable = False
    return Features(index, 1 + math.prod(grid))


def fitted(size: Size, grid: Grid, s: int) -> Size:
    """The size of an image that is resized to fit a grid, with its aspect ratio."""
    width, height = grid.columns * s, grid.rows * s
    if (scale := width / size.width) < height / size.height:
        return Size(width, min(math.ceil(size.height * scale), height))
    return Size(min(math.ceil(size.width * (height / size.height)), width), height)


def cut(image: Image.Image, grid: Grid, s: int, kernel: Image.Resampling) -> np.ndarray:
    """The base and the tiles of an upright RGB image, row by row: uint8[1 + rows columns, s, s, 3]."""
    new = fitted(Size(*image.size), grid, s)
    width, height = grid.columns * s, grid.rows * s
    refuse_huge(width, height)  # which the model's configuration alone decides
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new.height) // 2, (width - new.width) // 2
    canvas[top : top + new.height, left : left + new.width] = resize(image, *new, kernel)
    parts = canvas.reshape(grid.rows, s, grid.columns, s, 3).swapaxes(1, 2).reshape(-1, s, s, 3)
    return np.concatenate([np.asarray(resize(image, s, s, kernel))[None], parts])


def _too_thin(size: Size) -> UserError:
    return UserError(f"{size.width} x {size.height} pixels are too thin for AnyRes: crop it or remove it")
