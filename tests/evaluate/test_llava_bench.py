"""Scores of reviews: hand-computed, and against the original's arithmetic written down again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks.llava_bench import score
from llava_jax.evaluate.benchmarks.llava_bench_reviews import Review, parse_scores

REVIEWS = [
    {"id": 1, "question_id": 0, "category": "llava_bench_conv", "content": "8 7\nFine.", "tuple": [8.0, 7.0]},
    {"id": 2, "question_id": 1, "category": "llava_bench_conv", "content": "I cannot tell.", "tuple": [-1, -1]},
    {"id": 3, "question_id": 2, "category": "llava_bench_detail", "content": "9,  4.5\nShort.", "tuple": [9, 4.5]},
]


def write(path: Path, reviews: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(review) + "\n" for review in reviews))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    evaluate.main(["score", "llava-bench", "--json", *args])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_failures_are_counted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "a.jsonl", REVIEWS)
    assert run(capsys, "--reviews", file) == {
        "all": {"relative": 67.65, "reference": 8.5, "model": 5.75, "n": 2, "failed": 1},
        "llava_bench_conv": {"relative": 87.5, "reference": 8.0, "model": 7.0, "n": 1, "failed": 1},
        "llava_bench_detail": {"relative": 50.0, "reference": 9.0, "model": 4.5, "n": 1, "failed": 0},
    }
    legacy = run(capsys, "--reviews", file, "--legacy")
    assert legacy["all"] == {"relative": 65.6, "reference": 5.333, "model": 3.5, "n": 3, "failed": 1}
    # The original's parser fails at the two spaces, so its arithmetic on its parse has two failures.
    again = run(capsys, "--reviews", file, "--legacy", "--reparse")
    assert again["llava_bench_detail"] == {"relative": 100.0, "reference": -1.0, "model": -1.0, "n": 1, "failed": 1}
    assert run(capsys, "--reviews", file, "--reparse")["all"]["n"] == 2


def test_reviews_of_the_80_questions_in_text_have_the_categories_of_these(tmp_path: Path, capsys):
    """As Vicuna's: reviews tell none."""
    questions = [{"question_id": i, "text": "?", "category": "generic" if i < 3 else "fermi"} for i in range(1, 5)]
    reviews = [{"question_id": i, "text": f"8 {i}\nSo.", "score": [8.0, i], "metadata": {}} for i in range(1, 5)]
    file = write(tmp_path / "review_alpaca-13b_vicuna-13b.jsonl", reviews)
    asked = write(tmp_path / "question.jsonl", questions)
    scores = run(capsys, "--reviews", file, "--questions", asked)
    assert {name: (values["relative"], values["n"]) for name, values in scores.items()} == {
        "all": (31.25, 4), "fermi": (43.75, 2), "generic": (18.75, 2),
    }  # fmt: skip
    assert list(run(capsys, "--reviews", file)) == ["all"]


def test_a_review_that_is_there_again_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "a.jsonl", [*REVIEWS, REVIEWS[0]])
    evaluate.main(["score", "llava-bench", "--json", "--reviews", file])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["all"]["n"] == 2
    assert "a.jsonl: line 4: repeats question 0 word for word; it counts once" in printed.err


def test_repeats_have_a_standard_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = []
    for run_, model in enumerate((6, 8, 7)):
        reviews = [{"question_id": i, "category": "conv", "tuple": [10, model]} for i in range(4)]
        files.append(write(tmp_path / f"{run_}.jsonl", reviews))
    expected = {"relative": 70.0, "reference": 10.0, "model": 7.0, "n": 12, "failed": 0, "std": 10.0}
    assert run(capsys, "--reviews", *files) == {"all": expected, "conv": expected}
    evaluate.main(["score", "llava-bench", "--reviews", *files])
    assert "std" in capsys.readouterr().out


def test_both_orders_tell_the_bias(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A judge that gives a point more to what stands first, by which one of two verdicts changes."""
    reviews = [
        {"question_id": 0, "tuple": [8, 6], "judge": "j", "prompt_hash": "h"},
        {"question_id": 0, "tuple": [7, 7], "swapped": True, "judge": "j", "prompt_hash": "h"},
        {"question_id": 1, "tuple": [9, 4], "judge": "j", "prompt_hash": "h"},
        {"question_id": 1, "content": "5 8", "swapped": True, "judge": "j", "prompt_hash": "h"},
    ]
    result = run(capsys, "--reviews", write(tmp_path / "a.jsonl", reviews))["all"]
    assert (result["reference"], result["model"], result["n"]) == (8.0, 5.5, 4)
    assert (result["position_bias"], result["order_agreement"]) == (1.0, 0.5)
    assert (result["judge"], result["prompt_hash"]) == ("j", "h")


def summarize(tuples: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Means rounded to three decimals, then their ratio to one: the published numbers."""
    stats = [round(x, 3) for x in np.asarray(tuples).mean(0).tolist()]
    return round(stats[1] / stats[0] * 100, 1), *stats


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda t: (t[0] / 2, t[1] / 2)), min_size=1),
       st.integers(0, 3))  # fmt: skip
def test_legacy_is_the_original_arithmetic(scores: list[tuple[float, float]], failed: int):
    reviews = [Review(str(i), None, s, False, None, None) for i, s in enumerate([*scores, *[None] * failed])]
    wanted = [*scores, *[(-1, -1)] * failed]
    if round(float(np.mean([s[0] for s in wanted])), 3) == 0:
        return
    legacy, ours = score(reviews, legacy=True)["all"], score(reviews)["all"]
    assert (legacy["relative"], legacy["reference"], legacy["model"]) == summarize(wanted)
    assert (legacy["failed"], legacy["n"], ours["n"]) == (failed, len(wanted), len(scores))
    assert ours["relative"] == pytest.approx(100 * sum(s[1] for s in scores) / sum(s[0] for s in scores))


@pytest.mark.parametrize(("content", "scores", "exactly"), [
    ("8 7\nwhy", (8, 7), (8, 7)), ("8,7", (8, 7), (8, 7)), ("8.5, 7", (8.5, 7), None), ("8  7", (8, 7), None),
    (" 8 7", (8, 7), None), ("8 7 6", None, None), ("Scores: 8 7", None, None), ("", None, None), ("8", None, None),
    ("-1 -1", None, None), ("nan 5", None, None), ("Assistant 1: 8\n7", None, None),
])  # fmt: skip
def test_parser(content: str, scores: Any, exactly: Any):
    assert parse_scores(content) == scores
    assert parse_scores(content, exactly=True) == exactly


@pytest.mark.parametrize(("damage", "message"), [
    (lambda text: text.replace('"question_id": 2', '"question_id": 0'), "line 3: question 0 was reviewed in line 1"),
    (lambda text: text[:-20], "line 3: the last one, is cut off"),
    (lambda text: text.replace("}\n", "\n", 1), "line 1: is no JSON"),
    (lambda text: text.replace("Fine", "Fin\u00e9").encode("latin-1"), "line 1: is not UTF-8"),
    (lambda text: text.encode("utf-16")[:-1], "is no UTF-16: truncated data"),
    (lambda text: text.replace("[9, 4.5]", '"9 4"'), "question 2: its tuple 9 4 is not two numbers"),
    (lambda text: text.replace('"question_id": 1,', ""), "line 2: has no question_id"),
    (lambda text: text.replace('"question_id": 1,', '"question_id": null,'), "line 2: question_id is null"),
    (lambda text: "[1, 2]\n", "is no JSON object"),
    (lambda text: "\n", "holds no reviews"),
    (lambda text: text.splitlines()[1], "none of the 1 reviews has scores"),
])  # fmt: skip
def test_damage_is_named(tmp_path: Path, damage: Any, message: str):
    file = tmp_path / "a.jsonl"
    damaged = damage(Path(write(file, REVIEWS)).read_text().replace("\\u00e9", "\u00e9"))
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(UserError, match=message):
        evaluate.main(["score", "llava-bench", "--reviews", str(file)])


def test_incomplete_sets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole, part = write(tmp_path / "a.jsonl", REVIEWS), write(tmp_path / "b.jsonl", REVIEWS[:2])
    questions = write(tmp_path / "q.jsonl", [{"question_id": i, "text": "?"} for i in range(3)])
    with pytest.raises(UserError, match="b.jsonl: has no review of 1 of 3 questions, 2 the first"):
        run(capsys, "--reviews", whole, part)
    with pytest.raises(UserError, match="has no review of 1 of 3"):
        run(capsys, "--reviews", part, "--questions", questions)
    assert run(capsys, "--reviews", part, "--questions", questions, "--partial")["all"]["missing"] == 1
    more = write(tmp_path / "c.jsonl", [*REVIEWS, {"question_id": "x", "tuple": [1, 1]}])
    with pytest.raises(UserError, match="reviews question x"):
        run(capsys, "--reviews", more, "--questions", questions)


def test_scoring_is_fast_and_without_jax(tmp_path: Path):
    """Ten thousand reviews; what makes it slow to start would be JAX."""
    reviews = [{"question_id": i, "category": f"c{i % 3}", "tuple": [9, 5]} for i in range(10_000)]
    code = (
        "import sys; from llava_jax.evaluate.__main__ import main; main(sys.argv[1:]); "
        "assert not {'jax', 'transformers', 'openai'} & set(sys.modules)"
    )
    args = ["score", "llava-bench", "--json", "--reviews", write(tmp_path / "a.jsonl", reviews)]
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["all"]["n"] == 10_000
