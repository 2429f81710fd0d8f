"""ScienceQA as LLaVA JSON: texts as the published converter writes them, written down by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_jax.cli import UserError
from llava_jax.data.sources import LlavaJson
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.benchmarks.scienceqa_questions import convert, sample
from llava_jax.evaluate.questions import marked, read_questions

PROBLEM: dict[str, Any] = {
    "question": "Which  is it?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "Look. ", "image": "image.png",
    "grade": "grade2", "subject": "natural science", "lecture": "Cats\nmeow.", "solution": "Answer: it barks.",
}  # fmt: skip
BARE = PROBLEM | {"hint": "", "image": None, "lecture": "", "solution": ""}
QCM = "Which is it?\nContext: Look.\nOptions: (A) a cat (B) a dog"


@pytest.mark.parametrize(("form", "question", "answer"), [
    ("QCM-A", QCM, "The answer is B."),
    ("QCM-ALE", QCM, "The answer is B. BECAUSE: Cats\nmeow. it barks."),  # `Answer: ` goes wherever it stands
    ("QCM-AE", QCM, "The answer is B. BECAUSE: it barks."),
    ("QCM-LEA", QCM, "Cats\nmeow. it barks. The answer is B."),
    ("QCM-ELA", QCM, "it barks. Cats\nmeow. The answer is B."),
    ("QCM-LEPA", QCM, "LECTURE: Cats\nmeow.\nSOLUTION: Answer: it barks.\n###\nANSWER: B."),
    ("CQM-A", "Context: Look.\nQuestion: Which is it?\nOptions: (A) a cat (B) a dog", "The answer is B."),
    ("QCML-A", QCM + "\nBECAUSE: Cats\nmeow.", "The answer is B."),
    ("QCLEM-A", QCM.replace("\nOptions", "\nBECAUSE: Cats\nmeow. Answer: it barks.\nOptions"), "The answer is B."),
])  # fmt: skip
def test_formats(form, question, answer):
    assert convert(PROBLEM, form) == (question, answer)


@pytest.mark.parametrize(("problem", "question"), [
    (PROBLEM | {"question": " Which  is it?"}, "<image>\nContext: Look.\n Which  is it?\nA. a cat\nB. a dog"),
    (PROBLEM | {"hint": ""}, "<image>\nWhich  is it?\nA. a cat\nB. a dog"),
    (PROBLEM | {"image": None}, "Context: Look.\nWhich  is it?\nA. a cat\nB. a dog"),
    (BARE, "Which  is it?\nA. a cat\nB. a dog"),
])  # fmt: skip
def test_the_format_of_the_release(problem, question):
    """That of its llava_test_CQM-A.json."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "B"}]
    image = {"image": "7/image.png"} if problem["image"] else {}
    assert sample("7", problem, "v1.5") == {"id": "7"} | image | {"conversations": turns}


def test_questions_of_the_release_are_asked_for_a_letter(arguments, tmp_path):
    evaluate.main([*arguments, "--split=train", "--format=v1.5"])
    benchmark = BENCHMARKS["scienceqa"]
    asked = read_questions([str(tmp_path / "out.json")], benchmark.suffix)
    assert asked[1].text == (
        "Context: Look.\nWhich  is it?\nA. a cat\nB. a dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert marked(asked[1]).startswith("<image>\nContext: ") and asked[1].images == ("1/image.png",)


def test_what_a_problem_lacks_leaves_as_little_as_in_the_published_data():
    question = "Which is it?\nContext: N/A\nOptions: (A) a cat (B) a dog"
    assert convert(BARE, "QCM-LEPA") == (question, "###\nANSWER: B.")
    assert convert(BARE, "QCM-LEA") == (question, " The answer is B.")
    assert convert(BARE, "QCM-ALE") == (question, "The answer is B.")
    assert convert(BARE, "QCMLE-A") == (question, "The answer is B.")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "problems.json").write_text(json.dumps({"1": PROBLEM, "2": BARE, "3": BARE}))
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["2", "1"], "test": ["3"], "bad": ["4"]}))
    paths = {"problems": "problems.json", "splits": "splits.json", "output": "out.json"}
    return ["questions", "scienceqa", *(f"--{name}={tmp_path / file}" for name, file in paths.items())]


def test_written_data_is_llava_json(arguments, tmp_path):
    evaluate.main([*arguments, "--split=train"])
    first, second = LlavaJson(tmp_path / "out.json")
    assert (first.id, first.images, second.id, second.images) == ("2", (), "1", ("1/image.png",))
    assert second.turns[0] == ("user", QCM + "\n<image>")


def test_a_problem_without_texts_is_named(arguments, tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps({"3": BARE | {"lecture": None}}))
    with pytest.raises(UserError, match="problem 3: its lecture is no text"):
        evaluate.main([*arguments, "--split=test"])


@pytest.mark.parametrize(("more", "message"), [
    (["--split=bad"], "has no problem 4, which split bad of .* names"),
    (["--split=dev"], "has no split dev .it has train, test, bad"),
    (["--split=test", "--format=QCM"], "--format QCM: is not of the kind"),
    (["--split=test", "--format=QCM-LAE"], "--format QCM-LAE: is not of the kind"),
])  # fmt: skip
def test_mistakes(arguments, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([*arguments, *more])
    assert not (tmp_path / "out.json").exists()
