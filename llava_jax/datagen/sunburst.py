"""The sunburst of the first words of questions: a ring for each word, in which common words have wide arcs."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llava_jax.datagen.statistics import Branch

RING, HOLE = 85, 25  # pixels: width of a ring, radius of the middle
MIN_ANGLE = 0.01  # radians; narrower arcs are not drawn
MIN_LABELLED = 13  # pixels along an arc with a label


class Arc(NamedTuple):
    """An arc as attributes of SVG elements."""

    path: str
    fill: str
    title: str
    label: str  # empty where it would not fit
    transform: str  # of the label


def radius(depth: int) -> int:
    """The radius of a sunburst of so many rings, in pixels."""
    return HOLE + depth * RING + 2


def arcs(branches: Sequence[Branch], total: int) -> list[Arc]:
    """The arcs of all branches; `total` questions make the full circle."""
    return list(_arcs(branches, 0.0, 2 * math.pi / max(total, 1), 0, None, ""))


def _arcs(
    branches: Sequence[Branch], start: float, radians: float, ring: int, hue: float | None, before: str
) -> Iterator[Arc]:
    """The arcs of a ring from an angle on, each question so many radians wide, and of the rings outside of it."""
    for number, branch in enumerate(branches):
        width = branch.count * radians
        if width < MIN_ANGLE:
            continue
        own_hue = number * 137.5 % 360 if hue is None else hue
        words = f"{before} {branch.word}".strip()
        yield _arc(start, width, ring, own_hue, words, branch)
        yield from _arcs(branch.branches, start, radians, ring + 1, own_hue, words)
        start += width


def _arc(start: float, width: float, ring: int, hue: float, words: str, branch: Branch) -> Arc:
    inner, outer = HOLE + ring * RING, HOLE + (ring + 1) * RING
    width = min(width, 2 * math.pi - 1e-4)  # SVG does not draw an arc that ends where it begins
    stop, middle, centre = start + width, start + width / 2, (inner + outer) / 2
    large = int(width > math.pi)
    turn = math.degrees(middle) + (90 if middle > math.pi else -90)  # never upside down
    return Arc(
        f"M{_at(outer, start)} A{outer} {outer} 0 {large} 1 {_at(outer, stop)} "
        f"L{_at(inner, stop)} A{inner} {inner} 0 {large} 0 {_at(inner, start)} Z",
        f"hsl({hue:.0f},55%,{68 + 7 * ring}%)",  # light enough for dark labels
        f"{words}: {branch.count}",
        branch.word[:13] if width * centre >= MIN_LABELLED else "",
        f"translate({_at(centre, middle)}) rotate({turn:.1f})",
    )


def _at(distance: float, angle: float) -> str:
    """A point; angles are clockwise from the top."""
    return f"{distance * math.sin(angle):.1f},{-distance * math.cos(angle):.1f}"
