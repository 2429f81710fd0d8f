"""The first words of questions, drawn: a ring for each word, the next one outside of it, as wide as they are common."""

import html
import math
from collections.abc import Iterator, Sequence

from llava_jax.datagen.statistics import Branch

RING = 85  # pixels
HOLE = 25
NARROWEST = 0.01  # radians: what would be narrower isn't drawn
LABELLED = 13  # pixels along the arc


def sunburst(branches: Sequence[Branch], total: int, depth: int) -> str:
    """An SVG of them; `total` is how many make the whole circle."""
    radius = HOLE + depth * RING + 2
    arcs = "\n".join(_arcs(branches, 0.0, 2 * math.pi / max(total, 1), 0, None, ""))
    return (
        f'<svg viewBox="{-radius} {-radius} {2 * radius} {2 * radius}" width="{2 * radius}" height="{2 * radius}" '
        f'role="img" aria-label="first words of questions">\n{arcs}\n</svg>'
    )


def _arcs(
    branches: Sequence[Branch], start: float, radians: float, ring: int, hue: float | None, before: str
) -> Iterator[str]:
    """The arcs of branches from an angle on, each question that many radians wide, and of what follows on them."""
    for number, branch in enumerate(branches):
        width = branch.count * radians
        if width < NARROWEST:
            continue
        own_hue = number * 137.5 % 360 if hue is None else hue
        words = f"{before} {branch.word}".strip()
        yield _arc(start, width, ring, own_hue, words, branch)
        yield from _arcs(branch.branches, start, radians, ring + 1, own_hue, words)
        start += width


def _arc(start: float, width: float, ring: int, hue: float, words: str, branch: Branch) -> str:
    inner, outer = HOLE + ring * RING, HOLE + (ring + 1) * RING
    width = min(width, 2 * math.pi - 1e-4)  # an arc that ends where it begins is none
    stop = start + width
    large = int(width > math.pi)
    path = (
        f"M{_at(outer, start)} A{outer} {outer} 0 {large} 1 {_at(outer, stop)} "
        f"L{_at(inner, stop)} A{inner} {inner} 0 {large} 0 {_at(inner, start)} Z"
    )
    title = html.escape(f"{words}: {branch.count}")
    arc = f'<path d="{path}" fill="hsl({hue:.0f},55%,{62 + 9 * ring}%)"><title>{title}</title></path>'
    middle = (start + stop) / 2
    radius = (inner + outer) / 2
    if width * radius < LABELLED:
        return arc
    turn = math.degrees(middle) - 90
    if middle > math.pi:  # not upside down
        turn += 180
    place = f'transform="translate({_at(radius, middle)}) rotate({turn:.1f})"'
    return f'{arc}<text {place} text-anchor="middle" dy="4">{html.escape(branch.word[:13])}</text>'


def _at(radius: float, angle: float) -> str:
    """A point, angles being clockwise from the top."""
    return f"{radius * math.sin(angle):.1f},{-radius * math.cos(angle):.1f}"
