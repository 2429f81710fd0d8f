"""The report as one self-contained HTML file: table, chart, and questions with images and answers."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath

from llava_jax.cli import UserError, short, track
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import load_image, thumbnail
from llava_jax.evaluate.comparison import Case, Row
from llava_jax.evaluate.outcomes import Outcome

IMAGE_SIDE = 320  # pixels of the longer side
MAX_TEXT = 10_000  # characters
MAX_ROWS = 200  # of the table and the chart; report.json has all
MAX_CHARACTERS = 100_000_000  # of all questions, their images included


def _bounded(value: Any) -> Any:
    """Shortens texts. HTML, which has a class of its own, stays as it is."""
    return short(value, MAX_TEXT) if type(value) is str else value


_FOLDERS = [jinja2.PackageLoader("llava_jax.evaluate", "report_assets"), jinja2.PackageLoader("llava_jax", "style")]
TEMPLATES = jinja2.Environment(
    loader=jinja2.ChoiceLoader(_FOLDERS), autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_bounded
)


def page(
    runs: Sequence[str],
    rows: Sequence[Row],
    cases: Sequence[Case],
    judges: dict[str, Any],
    chart: bytes,
    images: epath.PathLike | None,
    limit: int,
) -> str:
    """The page, with at most `limit` questions and `MAX_CHARACTERS` of them; those on which the runs differ most come
    first. `images` is the folder of their images, or false for a page without images."""
    article = TEMPLATES.get_template("article.html")
    articles, groups, room = [], [], MAX_CHARACTERS
    for case in track(sorted(cases, key=lambda case: -case.spread)[:limit], "writing the page"):
        of_case = _groups(case)
        image = _image(case.outcomes[0], images)
        text = article.render(case=case, runs=runs, image=image, groups=json.dumps(of_case))
        if (room := room - len(text)) < 0:
            break
        articles.append(text)
        groups += of_case
    script = TEMPLATES.loader.get_source(TEMPLATES, "questions.js")[0]
    return TEMPLATES.get_template("report.html").render(
        runs=runs,
        rows=rows[:MAX_ROWS],
        judges=judges,
        chart=f"data:image/png;base64,{base64.b64encode(chart).decode()}",
        asked=len(cases),
        groups=list(dict.fromkeys(groups))[:MAX_ROWS],
        articles=articles,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _groups(case: Case) -> list[str]:
    categories = case.outcomes[0].categories[:MAX_ROWS]
    return [case.benchmark, *(short(f"{case.benchmark}: {category}") for category in categories)]


def _image(outcome: Outcome, images: epath.PathLike | None) -> str:
    """A small copy of a question's image, if it has one."""
    if not (images and outcome.image):
        return ""
    try:
        return thumbnail(load_image(image_path(images, outcome.image)), IMAGE_SIDE, quality=85)
    except UserError as error:
        raise UserError(f"question {outcome.question_id}: {error}") from error


def draw(runs: Sequence[str], rows: Sequence[Row]) -> bytes:
    """A PNG with a bar and its confidence interval for each category and run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(max(6.0, 0.35 * len(rows) * (len(runs) + 1)), 400.0), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        bars = [(place, row.values[run]) for place, row in enumerate(rows) if row.values[run]]
        values = [interval.value for _, interval in bars]
        errors = [
            [max(0.0, interval.value - interval.low) for _, interval in bars],
            [max(0.0, interval.high - interval.value) for _, interval in bars],
        ]
        places = [place + (number - (len(runs) - 1) / 2) * width for place, _ in bars]
        axes.bar(places, values, width, yerr=errors, capsize=2, label=_plain(run))
    axes.set_xticks(range(len(rows)), [_plain(short(f"{row.benchmark}\n{row.category}")) for row in rows])
    axes.tick_params(axis="x", labelrotation=45 if len(rows) > 6 else 0)
    axes.set_ylabel("percent, with 95% intervals")
    axes.legend(fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _plain(text: str) -> str:
    """The text without characters that matplotlib would typeset."""
    return text.replace("$", r"\$")
