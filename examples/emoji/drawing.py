"""Emoji as images: on white, and in variations that stand for vendors who are not there.

Vendors differ in position, size, tilt, side, colours and in how flat they paint: variations differ in the same.
"""

import random

import numpy as np
from PIL import Image, ImageChops, ImageFilter

SIDE = 64  # pixels of the vendors' images
GREY = np.full((3, 3), 1 / 3, np.float32)


def on_white(image: Image.Image) -> Image.Image:
    """RGBA -> RGB."""
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def variation(image: Image.Image, order: random.Random, side: int = SIDE) -> Image.Image:
    """An RGB image that was moved, scaled, turned, mirrored, coloured and flattened by chance."""
    paint = Image.fromarray(recolour(np.asarray(image), order))
    if order.random() < 0.3:
        paint = paint.filter(ImageFilter.MedianFilter(order.choice((3, 5))))  # flat, as Twitter's are
    placed = paint.transform((side, side), Image.Transform.AFFINE, placement(image.size, order, side),
                             Image.Resampling.BICUBIC, fillcolor="white")  # fmt: skip
    return placed.filter(ImageFilter.GaussianBlur(order.uniform(0, 0.8))) if order.random() < 0.3 else placed


def placement(size: tuple[int, int], order: random.Random, side: int) -> tuple[float, ...]:
    """An affine map from places in the new image to places in the old one, as PIL takes it."""
    turn, stretch = order.gauss(0, 0.15), order.gauss(0, 0.06)  # radians; logarithm
    zoom = order.uniform(0.85, 1.25)  # above 1 the emoji becomes smaller
    mirrored = order.choice((-1, 1))
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    scale = np.diag([mirrored * np.exp(stretch), np.exp(-stretch)]) * zoom * np.array(size)[:, None] / side
    matrix = scale @ rotation
    centre = np.array(size) / 2 + np.array([order.gauss(0, 0.04), order.gauss(0, 0.04)]) * size
    offset = centre - matrix @ np.array([side / 2, side / 2])
    return (*matrix[0], offset[0], *matrix[1], offset[1])


def recolour(pixels: np.ndarray, order: random.Random) -> np.ndarray:
    """uint8[H, W, 3] in other colours; white stays white."""
    hue, saturation = order.gauss(0, 0.15), order.uniform(0.6, 1.5)
    matrix = saturation * (hue_rotation(hue) - GREY) + GREY
    ink = (255 - pixels.astype(np.float32)) @ matrix.T.astype(np.float32)
    ink *= np.array([order.uniform(0.8, 1.2) for _ in range(3)], np.float32) * order.uniform(0.8, 1.2)
    return (255 - ink).clip(0, 255).astype(np.uint8)


def hue_rotation(angle: float) -> np.ndarray:
    """[3, 3]: turns colours about the axis of greys, by radians."""
    cos, sin = np.cos(angle), np.sin(angle) / np.sqrt(3)
    skew = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return cos * np.eye(3) + (1 - cos) * GREY + sin * skew


def between(first: Image.Image, second: Image.Image, order: random.Random) -> Image.Image:
    """A drawing between those of two vendors."""
    return ImageChops.blend(first, second, order.uniform(0, 1))
