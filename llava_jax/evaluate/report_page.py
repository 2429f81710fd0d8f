"""The report as one HTML file with nothing from elsewhere: table, chart, and questions with pictures and answers."""

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
from llava_jax.data.images import load_image
from llava_jax.evaluate.comparison import Case, Row
from llava_jax.evaluate.outcomes import Outcome

PICTURE = 320  # pixels of the longer side
LONGEST_TEXT = 10_000  # characters
MAX_ROWS = 200  # of the table and the chart; report.json has all
MAX_CHARACTERS = 100_000_000  # of all questions, their images included


def page(
    runs: Sequence[str],
    rows: Sequence[Row],
    cases: Sequence[Case],
    judges: dict[str, Any],
    chart: bytes,
    images: epath.PathLike | None,
    limit: int,
) -> str:
    """The page. At most `limit` questions stand in it, those first on which the runs differ most, and no more than
    `MAX_CHARACTERS` of them; `images` is the folder of their pictures, false to leave them out."""
    assets = jinja2.PackageLoader("llava_jax.evaluate", "report_assets")
    templates = jinja2.Environment(
        loader=assets, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_bounded
    )
    article = templates.get_template("article.html")
    articles, groups, room = [], [], MAX_CHARACTERS
    for case in track(sorted(cases, key=lambda case: -case.spread)[:limit], "writing the page"):
        of_case = _groups(case)
        picture = _picture(case.outcomes[0], images)
        text = article.render(case=case, runs=runs, picture=picture, groups=json.dumps(of_case))
        if (room := room - len(text)) < 0:
            break
        articles.append(text)
        groups += of_case
    script = assets.get_source(templates, "questions.js")[0]
    return templates.get_template("report.html").render(
        runs=runs,
        rows=rows[:MAX_ROWS],
        judges=judges,
        chart=_data(chart, "png"),
        asked=len(cases),
        groups=list(dict.fromkeys(groups))[:MAX_ROWS],
        articles=articles,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _bounded(value: Any) -> Any:
    """What stands in the page for a text; what is HTML by now, of a class of its own, stays as it is."""
    return short(value, LONGEST_TEXT) if type(value) is str else value


def _groups(case: Case) -> list[str]:
    categories = case.outcomes[0].categories[:MAX_ROWS]
    return [case.benchmark, *(short(f"{case.benchmark}: {category}") for category in categories)]


def _picture(outcome: Outcome, images: epath.PathLike | None) -> str:
    """A small copy of a question's picture, if it has one."""
    if not (images and outcome.image):
        return ""
    try:
        image = load_image(image_path(images, outcome.image))
    except UserError as error:
        raise UserError(f"question {outcome.question_id}: {error}") from error
    image.thumbnail((PICTURE, PICTURE))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=85)
    return _data(data.getvalue(), "jpeg")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
