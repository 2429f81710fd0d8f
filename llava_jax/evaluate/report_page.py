"""The report as one HTML file with nothing from elsewhere: table, chart, and questions with pictures and answers."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath

from llava_jax.cli import UserError, track
from llava_jax.data.images import load_image
from llava_jax.data.names import image_path
from llava_jax.evaluate.comparison import Case, Row
from llava_jax.evaluate.outcomes import Outcome

PICTURE = 320  # pixels of the longer side


def page(
    runs: Sequence[str],
    rows: Sequence[Row],
    cases: Sequence[Case],
    judges: dict[str, Any],
    chart: bytes,
    images: epath.PathLike | None,
    limit: int,
) -> str:
    """The page. At most `limit` questions stand in it, those first on which the runs differ most; `images` is the
    folder of their pictures, None to leave them out."""
    chosen = sorted(cases, key=lambda case: -case.spread)[:limit]
    assets = jinja2.PackageLoader("llava_jax.evaluate", "report_assets")
    templates = jinja2.Environment(loader=assets, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["json"] = json.dumps
    return templates.get_template("report.html").render(
        runs=runs,
        rows=rows,
        judges=judges,
        chart=_data(chart, "png"),
        asked=len(cases),
        groups=dict.fromkeys(group for case in chosen for group in case.groups),
        cases=[(case, _picture(case.outcomes[0], images)) for case in track(chosen, "writing the page")],
    )


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
