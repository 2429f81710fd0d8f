"""Comparisons of runs: intervals against theory, the page against hostile texts, the whole command."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from boards import events
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import report_page
from llava_jax.evaluate.comparison import Interval, bootstrap, seed_of
from llava_jax.evaluate.outcomes import Outcome, write_outcomes

HOSTILE = "</pre><script>alert(1)</script><img src=http://x onerror=alert(1)>\"'&"


def outcome(number: int, score: float, of: float = 1.0, **more: Any) -> Outcome:
    return Outcome(str(number), (f"c{number % 2}",), score, of, **more)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs of 40 questions: right are half of the first's and three quarters of the second's, and 8 were judged."""
    paths = []
    for run, right in (("step_100", (0, 1)), ("step_200", (0, 1, 2))):
        directory = tmp_path / run
        directory.mkdir()
        write_outcomes(directory / "quiz.outcomes.jsonl", [outcome(i, i % 4 in right) for i in range(40)])
        judged = [outcome(i, 6 + len(right) + i % 2, 10, question=HOSTILE, answer=HOSTILE, image="a.png", judge="gpt-4",
                          judgement=HOSTILE, prompt_hash="h" * 64) for i in range(8)]  # fmt: skip
        write_outcomes(directory / "bench.outcomes.jsonl", [*judged, outcome(8, 0, 0)])
        paths.append(str(directory))
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "a.png")
    return paths


def test_intervals_are_those_of_theory():
    """Of 400 answers the width is that of the normal approximation; paired differences are much surer."""
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.6
    second = first | (rng.random(400) < 0.1)
    values, differences, _ = bootstrap(np.array([first, second], float), np.ones((2, 400)), 4000, [0])
    value, low, high = dataclasses.astuple(values[0])
    assert value == 100 * first.mean()
    error = 100 * np.sqrt(first.mean() * (1 - first.mean()) / 400)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.06)
    assert low < value < high and differences[1].low > 0
    assert differences[1].high - differences[1].low < (high - low) / 1.5
    assert differences[0] == Interval(0, 0, 0)
    assert bootstrap(np.array([first], float), np.ones((1, 400)), 4000, [0])[0][0] == values[0]


def test_ratios_and_failures():
    """Judged answers: the ratio of the sums, as `score` has it; what failed weighs nothing."""
    values, differences, _ = bootstrap(np.array([[7.0, 4.5, 0.0]]), np.array([[8.0, 9.0, 0.0]]), 500, seed_of(0, "a"))
    assert values[0].value == pytest.approx(100 * 11.5 / 17)
    assert 50 <= values[0].low < values[0].high <= 87.5
    assert bootstrap(np.zeros((1, 2)), np.zeros((1, 2)), 10, [0])[0] == [None]


class Page(HTMLParser):
    """The tags of a page, their attributes, and its texts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def scalars(board: Path) -> dict[str, tuple[int, float]]:
    """Step and value by tag, of the one file of a board."""
    return {value.tag: (event.step, value.simple_value) for event in events(board) for value in event.summary.value}


def test_report(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    args = ["report", *runs, "--output", str(output), "--images", str(tmp_path), "--resamples", "200", "--json"]
    evaluate.main(args)
    first = capsys.readouterr().out
    report = json.loads(first)
    rows = {(row["benchmark"], row["category"]): row for row in report["rows"]}
    assert list(rows) == [
        ("bench", "all"),
        ("bench", "c0"),
        ("bench", "c1"),
        ("quiz", "all"),
        ("quiz", "c0"),
        ("quiz", "c1"),
    ]
    quiz = rows["quiz", "all"]
    assert quiz["values"]["step_100"]["value"] == 50 and quiz["values"]["step_200"]["value"] == 75
    assert quiz["differences"]["step_200"]["value"] == 25 and quiz["differences"]["step_200"]["low"] > 0
    assert rows["bench", "c1"]["values"]["step_100"]["value"] == pytest.approx(90)
    assert report["judges"] == {"bench": [{"judge": "gpt-4", "prompt_hash": "h" * 64}]}
    assert json.loads((output / "report.json").read_text()) == report
    assert Image.open(output / "chart.png").format == "PNG"
    assert scalars(output / "tensorboard" / "step_200")["quiz/all"] == (200, 75)
    evaluate.main(args)
    assert capsys.readouterr().out == first  # seeded
    evaluate.main(["report", *runs])
    assert re.search(r"quiz +all +40 +50\.0 \[\d+\.\d, \d+\.\d\] +75\.0 ", capsys.readouterr().out)


def test_the_page_is_whole_and_harmless(tmp_path: Path, runs: list[str]):
    evaluate.main(["report", *runs, "--output", str(tmp_path), "--images", str(tmp_path), "--resamples", "10"])
    page = Page((tmp_path / "report.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1 and names.count("article") == 49
    sources = [attributes.get("src") for tag, attributes in page.tags if tag in ("img", "script", "link")]
    assert len([source for source in sources if source]) == 1 + 8  # the chart and the pictures
    assert all(source.startswith("data:image/") for source in sources if source)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(page.texts).count(HOSTILE) == 8 * (1 + 2 * 2)  # question, and of each run answer and judgement
    spreads = [float(attributes["data-spread"]) for tag, attributes in page.tags if tag == "article"]
    assert spreads == sorted(spreads, reverse=True) and spreads[0] == 100 and spreads[-1] == 0
    evaluate.main(["report", *runs, "--output", str(tmp_path), "--resamples", "10", "--limit", "3"])
    text = (tmp_path / "report.html").read_text()
    assert text.count("<article") == 3 and "3 questions, those on which the runs differ most; 49 were asked" in text


def test_the_page_is_bounded_and_runs_its_own_script_alone(tmp_path: Path, runs: list[str], monkeypatch):
    huge = "x" * 10**6
    for run in runs:
        asked = [outcome(i, 1, question=huge, answer=huge, reference=huge, judgement=huge) for i in range(4)]
        many = Outcome(huge, tuple(f"c{i}" for i in range(1000)), 1, question="a")
        write_outcomes(Path(run) / "huge.outcomes.jsonl", [*asked, many])
    args = ["report", *runs, "--output", str(tmp_path / "out"), "--images", str(tmp_path), "--resamples", "2"]
    evaluate.main(args)
    text = (tmp_path / "out/report.html").read_text()
    assert len(text) < 2_000_000 and text.count("<article") == 54 and text.count("<tr>") == 1 + 200
    page = Page(text)
    assert all(json.loads(tags["data-groups"]) for tag, tags in page.tags if tag == "article")
    policy = next(tags["content"] for tag, tags in page.tags if tag == "meta" and "http-equiv" in tags)
    script = re.search("<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; img-src data:;" in policy and f"script-src 'sha256-{digest}'" in policy
    monkeypatch.setattr(report_page, "MAX_CHARACTERS", 200_000)
    evaluate.main(args)
    text = (tmp_path / "out/report.html").read_text()
    assert len("".join(re.findall("<article.*?</article>", text, re.DOTALL))) <= 200_000
    assert 0 < text.count("<article") < 54 and "; 54 were asked" in text


@pytest.mark.parametrize("name", tiny.OUTSIDE + tiny.IRREGULAR)
def test_images_outside_the_folder_and_what_is_no_file(tmp_path: Path, runs: list[str], name: str):
    (tmp_path / "images").mkdir()
    tiny.add_irregular(tmp_path / "images")
    for run in runs:
        write_outcomes(Path(run) / "bench.outcomes.jsonl", [outcome(7, 1, image=name)])
    with pytest.raises(UserError, match="^question 7: image "):
        evaluate.main(["report", *runs, "--output", str(tmp_path / "out"), "--images", str(tmp_path / "images")])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_compared(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture[str]):
    quiz = Path(runs[1]) / "quiz.outcomes.jsonl"
    lines = quiz.read_text().splitlines(keepends=True)
    quiz.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="step_200: lacks 1 of 40 questions of quiz that others have, 0 the first"):
        evaluate.main(["report", *runs])
    evaluate.main(["report", *runs, "--partial", "--resamples", "10"])
    assert re.search(r"quiz +all +39 ", capsys.readouterr().out)
    quiz.write_text(lines[0] + lines[0])
    with pytest.raises(UserError, match="line 2: question 0 is there a second time"):
        evaluate.main(["report", *runs])
    quiz.write_text('{"question_id": "0", "score": 1}\n')
    with pytest.raises(UserError, match="line 1: is no outcome"):
        evaluate.main(["report", *runs])
    with pytest.raises(UserError, match="has no \\*.outcomes.jsonl"):
        evaluate.main(["report", str(tmp_path)])
    with pytest.raises(UserError, match="given twice"):
        evaluate.main(["report", runs[0], runs[0]])
    bench = Path(runs[0]) / "bench.outcomes.jsonl"
    quiz.write_text("".join(lines))
    bench.write_text(bench.read_text().replace("gpt-4", "gpt-5"))
    evaluate.main(["report", *runs, "--resamples", "10"])
    assert "different judges" in capsys.readouterr().err


def test_scores_write_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The percentages of the report are those of the scores, failures and all."""
    reviews = [
        {"question_id": 0, "category": "conv", "content": "8 7", "tuple": [8, 7], "judge": "j", "prompt_hash": "h"},
        {"question_id": 1, "category": "conv", "content": "?", "tuple": [-1, -1], "judge": "j", "prompt_hash": "h"},
        {"question_id": 2, "category": "detail", "content": "9 4", "tuple": [9, 4], "judge": "j", "prompt_hash": "h"},
    ]
    questions = [{"question_id": i, "image": f"{i}.jpg", "text": f"Question {i}?"} for i in range(3)]
    for name, lines in (("reviews", reviews), ("questions", questions)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = str(tmp_path / "bench.outcomes.jsonl")
    evaluate.main(["score", "llava-bench", "--reviews", str(tmp_path / "reviews"), "--questions",
                   str(tmp_path / "questions"), "--outcomes", where, "--json"])  # fmt: skip
    scores = json.loads(capsys.readouterr().out)
    evaluate.main(["report", str(tmp_path), "--json", "--resamples", "10"])
    report = json.loads(capsys.readouterr().out)
    for row in report["rows"]:
        assert round(row["values"][tmp_path.name]["value"], 2) == scores[row["category"]]["relative"]
    assert '"question": "Question 0?", "image": "0.jpg"' in Path(where).read_text()
    with pytest.raises(UserError, match="has to be called BENCHMARK.outcomes.jsonl"):
        write_outcomes(tmp_path / "x.jsonl", [])
