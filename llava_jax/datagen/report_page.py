"""The report as one HTML file, which loads nothing: no other file, no network.

The template escapes all texts, and the script of the sample browser inserts them as text. In addition the page's
content security policy allows only the page's own script, by its hash.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from llava_jax.cli import short
from llava_jax.datagen.statistics import FIRST_WORDS, QUESTIONS, Lengths, Objects, Statistics, describe, tree
from llava_jax.datagen.sunburst import arcs, radius

BRANCHES, LISTED = 20, 8  # of a node of the tree of first words: drawn, listed
MAX_ROWS = 40  # of a table
BINS, WIDTH = 20, 320  # of a histogram; pixels

Row = tuple[Any, ...]


def page(title: str, facts: Sequence[tuple[str, str]], statistics: Statistics, rejects: Counter, browser: dict) -> str:
    """The HTML of the page.

    Args:
      facts: names and values of the first table.
      rejects: the number of rejects for each reason.
      browser: the data of `browser.js`: `entries`, `thumbnails` (data URIs by name), `groups` (names and sizes).
    """
    assets = jinja2.ChoiceLoader(
        [jinja2.PackageLoader(*place) for place in (("llava_jax.datagen", "report_assets"), ("llava_jax", "style"))]
    )
    templates = jinja2.Environment(loader=assets, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"shown": _shown, "short": short, "source_hash": _source_hash}
    templates.policies["json.dumps_kwargs"] = {}  # keys in their order
    base, own, script = (assets.get_source(templates, name)[0] for name in ("base.css", "style.css", "browser.js"))
    lengths = sorted(statistics.lengths.items())
    questions, first_words = statistics.questions, statistics.first_words
    return templates.get_template("report.html").render(
        title=title,
        style=base + own,
        script=script,
        facts=facts,
        rejects=[(reason, n, _share(n, rejects.total())) for reason, n in rejects.most_common(MAX_ROWS)],
        lengths=[row for kind, of_kind in lengths for row in _length_rows(kind, of_kind)],
        histograms=[(kind, *_histogram(of_kind.answer_words)) for kind, of_kind in lengths],
        questions=[(kind, questions[kind], _share(questions[kind], questions.total())) for kind in QUESTIONS],
        arcs=arcs(tree(first_words, BRANCHES), first_words.total()),
        radius=radius(FIRST_WORDS),
        first_words=tree(first_words, LISTED),
        objects=_object_rows(statistics.objects) if statistics.objects.samples else (),
        categories=_category_rows(statistics.objects),
        browser=browser,
    )


def _source_hash(text: str) -> str:
    """The hash of a script or style for a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else short(str(value), 1000)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _length_rows(kind: str, lengths: Lengths) -> Iterator[Row]:
    for what, numbers in (
        ("questions a sample", lengths.questions),
        ("words a question", lengths.question_words),
        ("words an answer", lengths.answer_words),
    ):
        yield kind, what, len(numbers), *describe(numbers).values()


def _histogram(numbers: Sequence[int]) -> tuple[int, list[Row]]:
    """The width of a bin, and label, x, y, width and height of each bar. The last bin has all larger numbers, too."""
    largest = describe(numbers)["90 %"] * 1.5 + 1
    step = max(1, -(-int(largest) // BINS))
    counts = Counter(min(number // step, BINS - 1) for number in numbers)
    bar, highest = WIDTH / BINS, max(counts.values(), default=1)
    bars = []
    for place in range(BINS):
        height = 90 * counts[place] / highest
        values = f"{place * step} to {(place + 1) * step - 1}" if place < BINS - 1 else f"{place * step} and more"
        sizes = (f"{size:.1f}" for size in (place * bar, 92 - height, bar - 1, height))
        bars.append((f"{values}: {counts[place]}", *sizes))
    return step, bars


def _object_rows(objects: Objects) -> Iterator[Row]:
    boxed, covered = objects.boxed.total(), objects.covered.total()
    unsupported, supported = objects.unsupported.total(), objects.supported.total()
    yield "samples with images that have captions or boxes", objects.samples, ""
    yield "categories in boxes that the sample names", covered, _share(covered, boxed)
    yield "objects in answers that no box or caption has", unsupported, _share(unsupported, unsupported + supported)
    yield "samples with such an object", objects.with_unsupported, _share(objects.with_unsupported, objects.samples)


def _category_rows(objects: Objects) -> Iterator[Row]:
    """The categories with the most unsupported claims."""
    categories = sorted({*objects.boxed, *objects.unsupported}, key=lambda c: (-objects.unsupported[c], c))
    for category in categories[:MAX_ROWS]:
        boxed, unsupported = objects.boxed[category], objects.unsupported[category]
        claims = objects.supported[category] + unsupported
        covered = _share(objects.covered[category], boxed)
        yield category, boxed, covered, claims, unsupported, _share(unsupported, claims)
