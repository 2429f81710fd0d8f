"""The chat page and the reports share one style, and everyone can read and use them: contrast, labels, headings."""

import colorsys
import html.parser
import itertools
import re
from pathlib import Path

import pytest
from report_files import report, write_files

import llava_jax
from llava_jax.datagen.statistics import Branch
from llava_jax.datagen.sunburst import arcs
from llava_jax.evaluate import report_page
from llava_jax.evaluate.comparison import Case, Interval, Row
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.evaluate.suite import as_html

PACKAGE = Path(llava_jax.__file__).parent
BASE = (PACKAGE / "style/base.css").read_text()
CHAT = PACKAGE / "serve/static"
OWN = [CHAT / "style.css", PACKAGE / "datagen/report_assets/style.css", PACKAGE / "evaluate/report_assets/style.css"]
CONTRAST = 4.5  # of text, WCAG 2.2, 1.4.3
PAIRS = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", BASE)}
SURFACES = ("page", "raised", "bubble")
RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")

Colour = tuple[float, float, float]


def luminance(colour: Colour) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: Colour, other: Colour) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def colour(name: str, theme: int) -> Colour:
    return tuple(int(PAIRS[name][theme][start : start + 2], 16) / 255 for start in (1, 3, 5))


def texts(css: str) -> set[tuple[str, str]]:
    """Names of the colours of text and of what may be behind it, for each rule that sets one of them."""
    found = set()
    for selector, rule in RULE.findall(re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)):
        text = re.findall(r"(?<![\w-])(?:color|fill): var\(--([\w-]+)\)", rule)
        behind = re.findall(r"background: var\(--([\w-]+)\)", rule)
        if text or behind:
            found |= set(itertools.product(text or ["ink"], behind or SURFACES))
        literal = re.search(r"(?<![\w-])(?:color|fill|background): ?(?:#|rgb|hsl)", rule)
        assert not literal or selector.split()[-1] in ("video", "dialog::backdrop"), selector  # they have no text
    return found


def test_the_contrast_of_all_text_suffices_in_both_themes():
    assert len(PAIRS) >= 14
    pairs = texts(BASE).union(*(texts(file.read_text()) for file in OWN))
    # The text on arcs has a test of its own.
    pairs -= {("on-arc", surface) for surface in SURFACES}
    assert len(pairs) > 15 and ("ink", "page") in pairs and ("on-accent", "accent") in pairs
    low = {(text, behind, theme): round(contrast(colour(text, theme), colour(behind, theme)), 2)
           for text, behind in pairs for theme in (0, 1)}  # fmt: skip
    assert {key: ratio for key, ratio in low.items() if ratio < CONTRAST} == {}


def test_labels_of_arcs_can_be_read():
    branches = [Branch("a", 1, [Branch("b", 1, [Branch("c", 1, [])])]) for _ in range(300)]
    fills = {arc.fill for arc in arcs(branches, 300)}
    assert len(fills) > 300
    for hue, saturation, light in (map(float, re.findall(r"[\d.]+", fill)) for fill in fills):
        fill = colorsys.hls_to_rgb(hue / 360, light / 100, saturation / 100)
        assert contrast(fill, colour("on-arc", 0)) >= CONTRAST


class Page(html.parser.HTMLParser):
    """What a screen reader needs of a page: elements, their attributes, the text inside and the labels around them."""

    VOID = {"meta", "link", "input", "img", "br", "path", "rect", "circle"}

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str], bool]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        inside = [] if tag not in self.VOID else None
        labelled = any(name == "label" for name, _ in self.open)
        self.elements.append((tag, dict(attributes), inside or [], labelled))
        if inside is not None:
            self.open.append((tag, self.elements[-1][2]))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [], False))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for _, inside in self.open:
            inside.append(data)

    def named(self, *tags: str) -> list[tuple[dict, str, bool]]:
        return [(attributes, "".join(t).strip(), label) for tag, attributes, t, label in self.elements if tag in tags]


def chat_page(directory: Path) -> str:
    return (CHAT / "index.html").read_text()


def data_report(directory: Path) -> str:
    write_files(directory)
    return report(directory, "--captions", directory / "contexts.jsonl")


def evaluation_report(directory: Path) -> str:
    runs, half = ("a", "b"), Interval(50.0, 40.0, 60.0)
    row = Row("quiz", "all", 2, {"a": half, "b": half}, {"b": None}, {"b": None})
    case = Case("quiz", [Outcome("1", ("all",), 1, question="Who?", answer="I.", reference="You.") for _ in runs])
    return report_page.page(runs, [row], [case], {}, b"", None, 10)


def suite_page(directory: Path) -> str:
    return as_html("a: 2026", [{"benchmark": "quiz", "rule": "official", "score": 50.0}])


@pytest.mark.parametrize("make", [chat_page, data_report, evaluation_report, suite_page])
def test_pages_are_accessible(make, tmp_path):
    text = make(tmp_path)
    page = Page(text)
    assert page.named("html")[0][0]["lang"] == "en" and page.named("title")[0][1]
    assert any(attributes.get("name") == "viewport" for attributes, *_ in page.named("meta"))
    assert len(page.named("main")) == 1 and len(page.named("h1")) == 1 and page.named("h1")[0][1]
    levels = [int(tag[1]) for tag, *_ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    for attributes, _, labelled in page.named("input", "select", "textarea"):
        hidden = "hidden" in attributes and attributes.get("type") == "file"
        assert hidden or labelled or attributes.get("aria-label"), attributes
    assert all(inside or attributes.get("aria-label") for attributes, inside, _ in page.named("button"))
    assert all("alt" in attributes for attributes, *_ in page.named("img"))
    for attributes, *_ in page.named("svg"):
        assert attributes.get("aria-hidden") or (attributes["role"], bool(attributes["aria-label"])) == ("img", True)
    assert all(attributes.get("scope") for attributes, *_ in page.named("th"))
    # The one style: the reports have it inside, the chat page links it.
    assert BASE.rstrip() in text or 'href="static/base.css"' in text
