"""The report as one HTML file that needs nothing else: no script or style of elsewhere, no network.

Texts are escaped, and put in as text by the browser of samples. Should one get through all the same, the page's content
security policy keeps it from being run: only the page's own script is, which it knows by its hash.
"""

import base64
import hashlib
import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from llava_jax.cli import short
from llava_jax.datagen.statistics import FIRST_WORDS, QUESTIONS, Branch, Objects, Statistics, describe, tree
from llava_jax.datagen.sunburst import sunburst

BRANCHES = 20  # of the tree of first words, drawn
LISTED = 8  # listed
ROWS = 40  # of tables, at most
QUESTIONS_RULE = """The first kind that fits, by the words behind the last comma. Yes or no: begins with a form of to
be, to do or to have, or with a modal verb."""
OBJECTS = """As CHAIR does it, by names alone: the words of a text are looked up in a table of COCO's categories, their
synonyms and plurals (and the names of other categories in the boxes). A category counts once a sample. A name in an
answer is supported if a box of the picture has its category, or a caption names it. Denied ones (“no dog”) are left
out, as are those within other things' names (“train station”). What can be seen in the picture, but is in no box and no
caption, counts as unsupported all the same."""
BROWSER = """drawn at random: in turn one of each kind, of those of each kind that claim objects without support, and of
each reason of rejection. Arrow keys go to the previous and the next one."""


def page(title: str, facts: Sequence[tuple[str, str]], statistics: Statistics, rejects: Counter, browser: dict) -> str:
    """The whole page.

    Args:
      facts: of the run: names and values.
      rejects: how many there are for each reason.
      browser: what `browser.js` shows: `entries`, `pictures` (data URIs by name), and `groups`, their names and sizes.
    """
    style, script = _asset("style.css"), _asset("browser.js")
    policy = (
        f"default-src 'none'; img-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{_table(("", ""), facts)}
{_rejects(rejects)}
<h2>Lengths and turns</h2>
{_lengths(statistics)}
<h2>Kinds of questions</h2>
{_questions(statistics.questions)}
<h2>First words of questions</h2>
{_first_words(statistics)}
<h2>Objects</h2>
{_objects(statistics.objects)}
<h2>Samples</h2>
{_browser(browser)}
<script type="application/json" id="data">{_json(browser)}</script>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("llava_jax.datagen").joinpath("report_assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(value: Any) -> str:
    """JSON that may stand in HTML: nothing in it ends the element or begins another."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(_shown(cell))}</{tag}>" for cell in row)

    lines = [cells("th", head)] if any(head) else []
    lines += [cells("td", row) for row in rows]
    return "\n".join(["<table>", *(f"<tr>{line}</tr>" for line in lines), "</table>"])


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


def _rejects(rejects: Counter) -> str:
    if not rejects:
        return ""
    total = rejects.total()
    rows = [(reason, count, _share(count, total)) for reason, count in rejects.most_common(ROWS)]
    return f"<h2>Rejected</h2>\n{_table(('reason', 'contexts', 'of the rejected'), rows)}"


def _lengths(statistics: Statistics) -> str:
    rows = []
    for kind, lengths in sorted(statistics.lengths.items()):
        for what, numbers in (
            ("questions a sample", lengths.questions),
            ("words a question", lengths.question_words),
            ("words an answer", lengths.answer_words),
        ):
            rows.append((kind, what, len(numbers), *describe(numbers).values()))
    table = _table(("kind", "", "number", "mean", "median", "90 %", "most"), rows)
    histograms = "\n".join(
        f"<div><b>{html.escape(kind)}</b>: words an answer{_histogram(lengths.answer_words)}</div>"
        for kind, lengths in sorted(statistics.lengths.items())
    )
    return f'{table}\n<div class="columns">{histograms}</div>'


def _histogram(numbers: Sequence[int], bins: int = 20, width: int = 320, height: int = 110) -> str:
    """An SVG of how the numbers are spread; the last bar has all that are larger."""
    largest = describe(numbers)["90 %"] * 1.5 + 1
    step = max(1, -(-int(largest) // bins))
    counts = Counter(min(number // step, bins - 1) for number in numbers)
    most = max(counts.values(), default=1)
    bar = width / bins
    bars = []
    for place in range(bins):
        tall = 90 * counts[place] / most
        label = f"{place * step} to {(place + 1) * step - 1}" if place < bins - 1 else f"{place * step} and more"
        bars.append(
            f'<rect class="bar" x="{place * bar:.1f}" y="{92 - tall:.1f}" width="{bar - 1:.1f}" height="{tall:.1f}">'
            f"<title>{label}: {counts[place]}</title></rect>"
        )
    axis = f'<text x="0" y="106">0</text><text x="{width}" y="106" text-anchor="end">{(bins - 1) * step}+</text>'
    return f'<br><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(bars)}{axis}</svg>'


def _questions(questions: Counter) -> str:
    rows = [(kind, questions[kind], _share(questions[kind], questions.total())) for kind in QUESTIONS]
    return f"<p>{QUESTIONS_RULE}</p>\n{_table(('kind', 'questions', ''), rows)}"


def _first_words(statistics: Statistics) -> str:
    total = statistics.first_words.total()
    drawing = sunburst(tree(statistics.first_words, BRANCHES), total, FIRST_WORDS)
    return f'<div class="columns">\n{drawing}\n<div>{_list(tree(statistics.first_words, LISTED))}</div>\n</div>'


def _list(branches: Sequence[Branch]) -> str:
    def line(branch: Branch) -> str:
        return f'{html.escape(short(branch.word))} <span class="count">{branch.count:,}</span>'

    return "\n".join(
        f"<details><summary>{line(branch)}</summary>{_list(branch.branches)}</details>"
        if branch.branches
        else f'<div class="leaf">{line(branch)}</div>'
        for branch in branches
    )


def _objects(objects: Objects) -> str:
    if not objects.samples:
        return "<p>Not known: captions and boxes were not given, or are of other pictures.</p>"
    boxed, covered = objects.boxed.total(), objects.covered.total()
    unsupported, claimed = objects.unsupported.total(), objects.unsupported.total() + objects.supported.total()
    facts = [
        ("samples of pictures with captions or boxes", objects.samples, ""),
        ("categories in boxes that the sample names", covered, _share(covered, boxed)),
        ("objects in answers that no box or caption has", unsupported, _share(unsupported, claimed)),
        ("samples with such an object", objects.with_unsupported, _share(objects.with_unsupported, objects.samples)),
    ]
    categories = sorted({*objects.boxed, *objects.unsupported}, key=lambda c: (-objects.unsupported[c], c))[:ROWS]
    rows = []
    for category in categories:
        claims = objects.supported[category] + objects.unsupported[category]
        rows.append(
            (
                category,
                objects.boxed[category],
                _share(objects.covered[category], objects.boxed[category]),
                claims,
                objects.unsupported[category],
                _share(objects.unsupported[category], claims),
            )
        )
    head = ("category", "samples with a box", "that name it", "samples that claim it", "without support", "share")
    return f"<p>{OBJECTS}</p>\n{_table(('', 'number', 'share'), facts)}\n{_table(head, rows)}"


def _browser(browser: dict) -> str:
    options = "\n".join(
        f'<option value="{html.escape(group)}">{html.escape(group)} ({shown:,} of {total:,})</option>'
        for group, (shown, total) in browser["groups"].items()
    )
    return f"""<p>{len(browser["entries"]):,} of them, {BROWSER}</p>
<noscript><p>The browser needs JavaScript.</p></noscript>
<div id="controls">
<select id="group"><option value="">all</option>
{options}</select>
<label><input type="checkbox" id="unsupported"> with unsupported objects</label>
<label><input type="checkbox" id="boxes" checked> boxes</label>
<input type="search" id="search" placeholder="search">
<button id="previous">previous</button><span id="place"></span><button id="next">next</button>
</div>
<div id="sample"></div>"""
