"""Own questions: what is compared, labels in all their forms, ids that repeat."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks.exact import normal
from llava_jax.evaluate.questions import read_questions


def lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def sample(ident: Any, question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": ident, "image": "a.jpg", "conversations": turns} | more


def answered(**texts: str) -> list[dict[str, Any]]:
    return [{"question_id": ident, "prompt": "?", "text": text} for ident, text in texts.items()]


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(answers: list[dict[str, Any]], labels: Any, *more: str) -> dict[str, Any]:
        (tmp_path / "answers.jsonl").write_text(lines(*answers))
        name = "labels.jsonl" if isinstance(labels, str) else "labels.json"
        (tmp_path / name).write_text(labels if isinstance(labels, str) else json.dumps(labels))
        args = [f"--answers={tmp_path / 'answers.jsonl'}", f"--labels={tmp_path / name}", "--json", *more]
        evaluate.main(["score", "exact", *args])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("labels", [
    [sample("a", "What?", "A cat.", category="animals"), sample("b", "Who?", "a man", category="people"),
     sample("c", "Which?", "Dog", category="animals")],
    lines({"question_id": "a", "answer": "A cat.", "category": "animals"},
          {"question_id": "b", "answer": ["woman", "a man"], "category": "people"},
          {"question_id": "c", "answer": "Dog", "category": "animals"}),
])  # fmt: skip
def test_labels_of_either_form(score, labels):
    scores = score(answered(a=" a  CAT", b="A man.", c="the dog"), labels)
    assert scores == {"accuracy": 66.67, "by_category": {"animals": 50.0, "people": 100.0}, "total": 3}


def test_without_categories_and_numbers_as_answers(score):
    assert score(answered(a="2", b="3"), lines({"id": "a", "answer": 2}, {"id": "b", "answer": 2})) == {
        "accuracy": 50.0, "total": 2,
    }  # fmt: skip


def test_a_category_may_be_zero(score):
    labels = lines(*({"question_id": i, "answer": "yes", "category": i} for i in (0, 1)))
    assert score(answered(**{"0": "yes", "1": "no"}), labels)["by_category"] == {"0": 100.0, "1": 0.0}


def test_an_answer_that_says_nothing_is_wrong(score):
    assert score(answered(a="", b="..."), lines({"id": "a", "answer": "2"}, {"id": "b", "answer": "x"})) == {
        "accuracy": 0.0, "total": 2, "empty": 1,
    }  # fmt: skip


def test_the_same_id_twice_is_told_by_the_prompt(score, tmp_path: Path):
    """As where ids are those of images."""
    labels = [sample("a", "What?", "cat"), sample("a", "What? Or who?", "dog")]
    answers = [{"question_id": "a", "prompt": "What? Or who?\nShortly.", "text": "dog"},
               {"question_id": "a", "prompt": "What?\nShortly.", "text": "dog"}]  # fmt: skip
    assert score(answers, labels) == {"accuracy": 50.0, "total": 2}
    assert [question.text for question in read_questions([str(tmp_path / "labels.json")], "")] == [
        "What?", "What? Or who?",
    ]  # fmt: skip
    with pytest.raises(UserError, match="question a: Why. has none of the 2 labels"):
        score([*answers, {"question_id": "a", "prompt": "Why?", "text": "dog"}], labels)


@pytest.mark.parametrize(("labels", "message"), [
    (lines({"question_id": "a", "text": "What?"}), "line 1: has no answer"),
    (lines({"question_id": "a", "answer": ""}), "line 1: the right answer to question a is empty"),
    (lines({"question_id": "a", "answer": []}), "line 1: the right answer to question a is empty"),
    (lines({"question_id": "a", "answer": None}), "line 1: the right answer is neither a text nor a list"),
    (lines({"question_id": "a", "answer": "x"}, {"question_id": "a", "answer": "y"}), "line 2: .* another label"),
    ([{"id": "a", "conversations": [{"from": "human", "value": "What?"}]}], "sample 0 .id a.: has no answer"),
    ([sample("a", "What? <image>", "x")], ".id a.: 2 <image> in the text, but 1 images"),
])  # fmt: skip
def test_labels_that_are_none_are_named(score, labels, message):
    with pytest.raises(UserError, match=message):
        score(answered(a="x"), labels)


def test_the_first_answer_of_several_is_right(score):
    more = [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "dog"}]
    first = sample("a", "What?", "cat")
    assert score(answered(a="cat"), [first | {"conversations": first["conversations"] + more}])["accuracy"] == 100.0


@given(st.text())
def test_what_is_compared_does_not_change_when_compared_again(text: str):
    assert normal(normal(text)) == normal(f" {text} ") == normal(text)
