"""The report as one HTML file with nothing from elsewhere: table, chart, and questions with pictures and answers."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from llava_jax.cli import UserError, short, track
from llava_jax.data.images import load_image
from llava_jax.data.names import image_path
from llava_jax.evaluate.bootstrap import Interval
from llava_jax.evaluate.comparison import Case, Row
from llava_jax.evaluate.outcomes import Outcome

PICTURE = 320  # pixels of the longer side
LONGEST_TEXT = 10_000  # characters
MAX_ROWS = 200  # of the table and the chart; report.json has all
MAX_CHARACTERS = 100_000_000  # of all questions, their images included

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } td small { color: #777 }
form { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ddd }
article { margin: 1.5rem 0; padding: 1rem; border: 1px solid #ddd; border-radius: .4rem }
.answers { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column; gap: 1rem }
.answers > div, .reference { background: #f6f6f6; padding: .6rem; border-radius: .3rem; overflow-wrap: anywhere }
pre { white-space: pre-wrap; font: inherit; margin: .3rem 0 } img { max-width: 100% } h3 { margin: 0 0 .4rem }
"""
SCRIPT = """
const form = document.querySelector("form"), articles = [...document.querySelectorAll("article")];
function show() {
  const group = form.group.value, words = form.words.value.toLowerCase();
  const points = form.differ.checked ? Math.max(Number(form.points.value), Number.MIN_VALUE) : 0;
  let shown = 0;
  for (const article of articles) {
    const visible = Number(article.dataset.spread) >= points && article.textContent.toLowerCase().includes(words)
      && (!group || JSON.parse(article.dataset.groups).includes(group));
    article.hidden = !visible;
    shown += visible;
  }
  document.querySelector("output").textContent = `${shown} of ${articles.length} questions`;
}
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
show();
"""


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
    chosen, articles, room = [], [], MAX_CHARACTERS
    for case in track(sorted(cases, key=lambda case: -case.spread)[:limit], "writing the page"):
        article = _article(case, runs, images)
        if (room := room - len(article)) < 0:
            break
        chosen.append(case)
        articles.append(article)
    left_out = f", those on which the runs differ most; {len(cases)} were asked" if len(chosen) < len(cases) else ""
    groups = list(dict.fromkeys(group for case in chosen for group in _groups(case)))[:MAX_ROWS]
    judged = "".join(
        f"<p>{_text(benchmark)} was judged by {_text(judge['judge'])}, prompt hash <code>{_text(judge['prompt_hash'])}"
        "</code></p>" for benchmark, known in judges.items() for judge in known
    )  # fmt: skip
    options = "".join(f'<option value="{_text(group)}">{_text(group)}</option>' for group in groups)
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{script}'; base-uri 'none'; form-action 'none'">
<title>{_text(" and ".join(runs))}</title><style>{STYLE}</style></head><body>
<h1>{_text(" and ".join(runs))}</h1>
{_table(runs, rows)}
{judged}
<img alt="The same as bars" src="{_data(chart, "png")}">
<h2>{len(chosen)} questions{left_out}</h2>
<form><select name="group"><option value="">all</option>{options}</select>
<label><input type="checkbox" name="differ"> only where the runs differ</label>
<label>by at least <input type="number" name="points" value="1" min="0" step="any" style="width: 5em"> points</label>
<input type="search" name="words" placeholder="with these words"> <output></output></form>
{"".join(f"{article}{chr(10)}" for article in articles)}<script>{SCRIPT}</script>
</body></html>
"""


def _groups(case: Case) -> list[str]:
    categories = case.outcomes[0].categories[:MAX_ROWS]
    return [case.benchmark, *(short(f"{case.benchmark}: {category}") for category in categories)]


def _table(runs: Sequence[str], rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{_text(run)}</th>" for run in runs) + "".join(
        f"<th>{_text(run)} more</th>" for run in runs[1:]
    )
    body = "\n".join(
        f"<tr><td>{_text(row.benchmark)}</td><td>{_text(row.category)}</td><td>{row.questions}</td>"
        + "".join(_cell(interval, "") for interval in row.values)
        + "".join(_cell(interval, "+") for interval in row.differences[1:]) + "</tr>"
        for row in rows[:MAX_ROWS]
    )  # fmt: skip
    return f"<table><tr><th>benchmark</th><th>category</th><th>questions</th>{head}</tr>\n{body}</table>"


def _cell(interval: Interval | None, sign: str) -> str:
    if interval is None:
        return "<td>-</td>"
    return f"<td>{interval.value:{sign}.1f} <small>{interval.low:{sign}.1f} to {interval.high:{sign}.1f}</small></td>"


def _article(case: Case, runs: Sequence[str], images: epath.PathLike | None) -> str:
    first = case.outcomes[0]
    picture = f'<img alt="" src="{_picture(first, images)}">' if images and first.image else ""
    reference = f'<div class="reference"><b>reference</b>{_pre(first.reference)}</div>' if first.reference else ""
    answers = "".join(_answer(run, outcome) for run, outcome in zip(runs, case.outcomes, strict=True))
    groups = html.escape(json.dumps(_groups(case)))
    return f"""<article data-spread="{case.spread:.6g}" data-groups="{groups}">
<h3>{_text(case.benchmark)} {_text(first.question_id)} <small>{_text(", ".join(first.categories))}</small></h3>
{picture}{_pre(first.question)}{reference}
<div class="answers">{answers}</div></article>"""


def _answer(run: str, outcome: Outcome) -> str:
    score = "not scored" if outcome.percent is None else f"{outcome.score:g} of {outcome.of:g}"
    judgement = f"<details><summary>judgement</summary>{_pre(outcome.judgement)}</details>" if outcome.judgement else ""
    return f"<div><b>{_text(run)}</b>: {score}{_pre(outcome.answer)}{judgement}</div>"


def _pre(text: str) -> str:
    return f"<pre>{_text(text)}</pre>" if text else ""


def _text(text: str) -> str:
    return html.escape(short(str(text), LONGEST_TEXT))


def _picture(outcome: Outcome, images: epath.PathLike) -> str:
    """A small copy of a question's picture."""
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
