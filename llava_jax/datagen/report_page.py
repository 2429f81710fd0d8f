"""The report as one HTML file that needs nothing else: no script or style of elsewhere, no network.

Texts are escaped, and put in as text by the browser of samples. Should one get through all the same, the page's content
security policy keeps it from being run: only the page's own script is, which it knows by its hash.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from llava_jax.cli import short
from llava_jax.datagen.statistics import FIRST_WORDS, QUESTIONS, Lengths, Objects, Statistics, describe, tree
from llava_jax.datagen.sunburst import sunburst

BRANCHES = 20  # of the tree of first words, drawn
LISTED = 8  # listed
ROWS = 40  # of tables, at most
BINS, WIDTH = 20, 320  # of a histogram; pixels

Row = tuple[Any, ...]


def page(title: str, facts: Sequence[tuple[str, str]], statistics: Statistics, rejects: Counter, browser: dict) -> str:
    """The whole page.

    Args:
      facts: of the run: names and values.
      rejects: how many there are for each reason.
      browser: what `browser.js` shows: `entries`, `pictures` (data URIs by name), and `groups`, their names and sizes.
    """
    assets = jinja2.PackageLoader("llava_jax.datagen", "report_assets")
    templates = jinja2.Environment(loader=assets, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"shown": _shown, "short": short, "source_hash": _source_hash}
    templates.policies["json.dumps_kwargs"] = {}  # keys in their order
    style, script = (assets.get_source(templates, name)[0] for name in ("style.css", "browser.js"))
    lengths = sorted(statistics.lengths.items())
    questions, first_words = statistics.questions, statistics.first_words
    return templates.get_template("report.html").render(
        title=title,
        style=style,
        script=script,
        facts=facts,
        rejects=[(reason, n, _share(n, rejects.total())) for reason, n in rejects.most_common(ROWS)],
        lengths=[row for kind, of_kind in lengths for row in _length_rows(kind, of_kind)],
        histograms=[(kind, *_histogram(of_kind.answer_words)) for kind, of_kind in lengths],
        questions=[(kind, questions[kind], _share(questions[kind], questions.total())) for kind in QUESTIONS],
        drawing=sunburst(tree(first_words, BRANCHES), first_words.total(), FIRST_WORDS),
        first_words=tree(first_words, LISTED),
        objects=_object_rows(statistics.objects) if statistics.objects.samples else (),
        categories=_category_rows(statistics.objects),
        browser=browser,
    )


def _source_hash(text: str) -> str:
    """A script or style as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _shown(value: Any) -> str:
    match value:
        case float():
            return f"{value:,.1f}"
        case int():
            return f"{value:,}"
        case _:
            return short(str(value), 1000)


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
    """Values of a bar, and label, x, y, width and height of each bar; the last one has all that are larger."""
    largest = describe(numbers)["90 %"] * 1.5 + 1
    step = max(1, -(-int(largest) // BINS))
    counts = Counter(min(number // step, BINS - 1) for number in numbers)
    bar, most = WIDTH / BINS, max(counts.values(), default=1)
    bars = []
    for place in range(BINS):
        height = 90 * counts[place] / most
        values = f"{place * step} to {(place + 1) * step - 1}" if place < BINS - 1 else f"{place * step} and more"
        sizes = (f"{size:.1f}" for size in (place * bar, 92 - height, bar - 1, height))
        bars.append((f"{values}: {counts[place]}", *sizes))
    return step, bars


def _object_rows(objects: Objects) -> Iterator[Row]:
    boxed, covered = objects.boxed.total(), objects.covered.total()
    unsupported, supported = objects.unsupported.total(), objects.supported.total()
    yield "samples of pictures with captions or boxes", objects.samples, ""
    yield "categories in boxes that the sample names", covered, _share(covered, boxed)
    yield "objects in answers that no box or caption has", unsupported, _share(unsupported, unsupported + supported)
    yield "samples with such an object", objects.with_unsupported, _share(objects.with_unsupported, objects.samples)


def _category_rows(objects: Objects) -> Iterator[Row]:
    """The categories of which most is claimed without support."""
    for category in sorted({*objects.boxed, *objects.unsupported}, key=lambda c: (-objects.unsupported[c], c))[:ROWS]:
        boxed, unsupported = objects.boxed[category], objects.unsupported[category]
        claims = objects.supported[category] + unsupported
        covered = _share(objects.covered[category], boxed)
        yield category, boxed, covered, claims, unsupported, _share(unsupported, claims)
