"""The benchmarks of the v1.5 release on fixtures of our own, their scores computed by hand."""

import base64
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import read_run
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.evaluate.score import score as scores

SHORT = "\nAnswer the question using a single word or phrase."


def write(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def answer(ident: Any, text: str, prompt: str = "?", **more: Any) -> dict[str, Any]:
    return {"question_id": ident, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "m"} | more


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Scores answers, which are objects or the content of a file, as the command prints them."""

    def run(name: str, answers: Any, labels: Any, *more: str) -> dict[str, Any]:
        content = jsonl(answers) if isinstance(answers, list) else answers
        file = write(tmp_path / "answers.jsonl", content)
        given = labels if isinstance(labels, list) else [labels]
        evaluate.main(["score", name, f"--answers={file}", "--json", *more, "--labels", *map(str, given)])
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return run


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": i, "answer_confidence": "yes"} for i, text in enumerate(answers, 1)]


VQAV2 = {"annotations": [
    {"question_id": 1, "answer_type": "yes/no", "question_type": "is", "answers": people(*["yes"] * 10)},
    {"question_id": 2, "answer_type": "number", "question_type": "how", "answers": people(*["2"] * 3, *["3"] * 7)},
    {"question_id": 3, "answer_type": "other", "question_type": "what", "answers": people("A cat", *["the dog."] * 9)},
    {"question_id": 4, "answer_type": "other", "question_type": "what", "answers": people(*["The Beach"] * 10)},
]}  # fmt: skip


def test_vqav2(tmp_path: Path, score):
    answers = [answer(1, "Yes"), answer(2, "Two."), answer(3, "cat"), answer(4, "the beach")]
    # 1: as all. 2: of ten times leaving one out, 3 leave two who agree (2/3), 7 three (1). 3: one of ten alone agrees:
    # 9/10 x 1/3. 4: people agree, so their answers keep article and case, and ours, which lost them, differs.
    assert score("vqav2", answers, write(tmp_path / "labels.json", VQAV2)) == {
        "accuracy": 55.0, "by_kind": {"number": 90.0, "other": 15.0, "yes/no": 100.0}, "total": 4,
    }  # fmt: skip


VIZWIZ = [
    {"image": "a.jpg", "question": "?", "answer_type": "unanswerable", "answers": people(*["unanswerable"] * 10)},
    {"image": "b.jpg", "question": "?", "answer_type": "other", "answers": people(*["soup can"] * 2, *["can"] * 8)},
    {"image": "c.jpg", "question": "?", "answer_type": "other", "answers": people("can", *["the can"] * 9)},
]


def test_vizwiz(tmp_path: Path, score):
    answers = [answer("a.jpg", "Unanswerable"), answer("b.jpg", "soup-can"), answer("c.jpg", "The can.")]
    # b: 2/10 x 1/3 + 8/10 x 2/3. c: the answer loses its article and what people said does not: one of ten says the
    # same, 9/10 x 1/3.
    expected = {"accuracy": 63.33, "by_kind": {"other": 45.0, "unanswerable": 100.0}, "total": 3}
    labels = write(tmp_path / "labels.json", VIZWIZ)
    assert score("vizwiz", answers, labels) == expected
    asked = [{"question_id": i, "image": f"val/{label['image']}", "text": "?"} for i, label in enumerate(VIZWIZ)]
    questions = write(tmp_path / "questions.jsonl", jsonl(asked))
    by_number = [line | {"question_id": i} for i, line in enumerate(answers)]
    assert score("vizwiz", by_number, labels, "--questions", questions) == expected
    with pytest.raises(UserError, match="line 1: question 0 .*has none of the 3 labels"):
        score("vizwiz", by_number, labels)
    out = submit(tmp_path, "vizwiz", by_number, f"--labels={questions}")
    assert json.loads(out.read_text())[2] == {"image": "c.jpg", "answer": "can"}
    with pytest.raises(UserError, match="line 1: 0 names no image: --labels with the questions"):
        submit(tmp_path, "vizwiz", by_number)


TEXTVQA = {"data": [
    {"question_id": 7, "image_id": "ab", "question": "What brand?", "answers": ["nokia"] * 10},
    {"question_id": 8, "image_id": "ab", "question": "What is the year?", "answers": ["1998"] * 2 + ["98"] * 8},
]}  # fmt: skip


@pytest.mark.parametrize("answers", [
    [answer("ab", "Nokia.", f"What brand?\nReference OCR token: NOKIA, 98{SHORT}"),
     answer("ab", "1998", f"What is the year?\nReference OCR token: {SHORT}")],
    [answer("ab", "NOKIA", "OCR tokens: NOKIA, 98. Question: what brand? Short answer:"),
     answer("ab", "1998", f"What is the year?{SHORT}")],
    json.dumps([{"question_id": 8, "answer": "1998"}, {"question_id": 7, "answer": "nokia"}]),
    json.dumps({"7": "NOKIA", "8": "1998"}),
])  # fmt: skip
def test_textvqa_by_picture_and_question_or_by_id(tmp_path: Path, score, answers):
    assert score("textvqa", answers, write(tmp_path / "l.json", TEXTVQA)) == {"accuracy": 80.0, "total": 2}


def test_textvqa_asked_twice_about_a_picture(tmp_path: Path, score):
    entry = TEXTVQA["data"][0]
    labels = write(tmp_path / "l.json", {"data": [entry, entry | {"question_id": 9, "answers": ["sony"] * 10}]})
    twice = [answer("ab", "nokia", f"What brand?{SHORT}")] * 2
    assert score("textvqa", twice, labels) == {"accuracy": 50.0, "total": 2}
    with pytest.raises(UserError, match="line 3: question ab: what brand. was answered in .*line 1 already"):
        score("textvqa", [*twice, answer("ab", "sony", f"What brand?{SHORT}")], labels)
    # Asked once, as `predict` asks what a file of questions repeats, it counts for both.
    outcomes = tmp_path / "textvqa.outcomes.jsonl"
    assert score("textvqa", twice[:1], labels, f"--outcomes={outcomes}") == {"accuracy": 50.0, "total": 2}
    assert len(read_run(str(tmp_path))["textvqa"]) == 2


GQA = {
    "q1": {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}},
    "q2": {"imageId": "n1", "question": "Red or blue?", "answer": "red", "types": {"structural": "choose"}},
    "q3": {"imageId": "n2", "question": "What is it?", "answer": "fire hydrant", "types": {"structural": "query"}},
}


def test_gqa(tmp_path: Path, score):
    answers = [answer("q1", "Yes"), answer("q2", "blue"), answer("q3", "Fire hydrant..")]
    expected = {"accuracy": 66.67, "by_kind": {"binary": 50.0, "open": 100.0}, "total": 3}
    assert score("gqa", answers, write(tmp_path / "labels.json", GQA)) == expected


def pope(ident: int, thing: str, label: str, image: str = "COCO_val2014_1.jpg") -> dict[str, Any]:
    return {"question_id": ident, "image": image, "text": f"Is there a {thing} in the image?", "label": label}


@pytest.fixture
def pope_labels(tmp_path: Path) -> list[str]:
    random = [pope(1, "cat", "yes"), pope(2, "dog", "no"), pope(3, "car", "yes"), pope(4, "bus", "no")]
    popular = [pope(1, "cat", "yes"), pope(2, "man", "no")]
    return [write(tmp_path / f"coco_pope_{name}.json", jsonl(lines))
            for name, lines in (("random", random), ("popular", popular))]  # fmt: skip


# By hand. random: yes (the `No` of a later sentence is none), yes, no, no: one each of tp, fp, fn, tn. popular: right.
POPE_TEXTS = {"random": ["Yes. No doubt", "yes, sure", "It is not there.", "no"], "popular": ["yes", "No, there isn't"]}
POPE_SCORES = {
    "f1": 75.0, "accuracy": 75.0, "precision": 75.0, "recall": 75.0, "yes_ratio": 50.0,
    "by_category": {
        "popular": {"f1": 100.0, "accuracy": 100.0, "precision": 100.0, "recall": 100.0, "yes_ratio": 50.0, "total": 2},
        "random": {"f1": 50.0, "accuracy": 50.0, "precision": 50.0, "recall": 50.0, "yes_ratio": 50.0, "total": 4},
    },
    "total": 6,
}  # fmt: skip


def asked_questions(tmp_path: Path, labels: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Questions as the release has them: ids of all samplings, in another order than the labels; and answers."""
    questions, answers = [], []
    for file in labels:
        category = Path(file).stem.removeprefix("coco_pope_")
        for line, text in zip(Path(file).read_text().splitlines(), POPE_TEXTS[category], strict=True):
            value = json.loads(line)
            ident = 1000 + len(questions)
            questions.append(value | {"question_id": ident, "text": value["text"] + SHORT, "category": category})
            answers.append(answer(ident, text, value["text"] + SHORT))
    return write(tmp_path / "llava_pope_test.jsonl", jsonl(questions[::-1])), answers[::-1]


def test_pope_is_joined_by_what_was_asked(tmp_path: Path, score, pope_labels):
    questions, answers = asked_questions(tmp_path, pope_labels)
    assert score("pope", answers, pope_labels, "--questions", questions) == POPE_SCORES


def test_pope_of_another_version(tmp_path: Path, score, pope_labels):
    """A version lacks a question and has another instead: an order would be off from there on."""
    questions, answers = asked_questions(tmp_path, pope_labels)
    other = [pope(1, "cat", "yes"), pope(2, "cow", "no"), pope(3, "car", "yes"), pope(4, "bus", "no")]
    write(Path(pope_labels[0]), jsonl(other))
    with pytest.raises(UserError, match="question random .*dog.* has none of the 6 labels: are they of another"):
        score("pope", answers, pope_labels, "--questions", questions)
    result = score("pope", answers, pope_labels, "--questions", questions, "--partial")
    assert (result["total"], result["missing"], result["unknown"]) == (5, 1, 1)
    assert result["by_category"]["random"]["accuracy"] == 66.67


def test_pope_of_a_version_with_another_text(tmp_path: Path, score):
    """Some labels of the published files say `imange`, and the release's questions may not."""
    labels = [pope(1, "orange", "yes") | {"text": "Is there an orange in the imange?"}, pope(2, "cat", "no")]
    asked = [pope(7, "orange", "yes"), pope(8, "cat", "no")]
    files = [
        write(tmp_path / name, jsonl(lines)) for name, lines in (("coco_pope_random.json", labels), ("q.jsonl", asked))
    ]
    result = score("pope", [answer(7, "yes"), answer(8, "no")], files[0], "--questions", files[1])
    assert (result["f1"], result["total"]) == (100.0, 2)


def test_the_average_of_pope_is_not_of_rounded_numbers(tmp_path: Path, score):
    """Accuracies of 1/3, 1/3 and 1, whose mean is 55.555...: that of 33.33, 33.33 and 100 would be 55.55."""
    files, answers = [], []
    for category, texts in (("adversarial", "nyn"), ("popular", "nyn"), ("random", "ynn")):
        lines = [pope(1, "cat", "yes"), pope(2, "dog", "no"), pope(3, "man", "no")]
        files.append(write(tmp_path / f"coco_pope_{category}.json", jsonl(lines)))
        answers += [answer(i, {"y": "Yes", "n": "No"}[text], category=category) for i, text in enumerate(texts, 1)]
    result = score("pope", answers, files)
    assert [result[name] for name in ("f1", "accuracy", "yes_ratio")] == [33.33, 55.56, 33.33]


def test_pope_by_id(score, pope_labels):
    answers = [answer(i, text, category=category) for category, texts in POPE_TEXTS.items()
               for i, text in enumerate(texts, 1)]  # fmt: skip
    assert score("pope", answers, pope_labels) == POPE_SCORES
    with pytest.raises(UserError, match="line 1: question 1 may be of random or popular: give --questions"):
        score("pope", [answer(1, "yes")], pope_labels)
    alone = score("pope", [answer(i, text) for i, text in enumerate(POPE_TEXTS["random"], 1)], pope_labels[0])
    assert alone["by_category"] == {"random": POPE_SCORES["by_category"]["random"]}


@pytest.fixture(params=["folder", "tool"])
def mme_labels(request, tmp_path: Path) -> str:
    """MME's folder, whose categories have one of two layouts; or that of its tool."""
    entries = [("existence", "1", ("Is there a cat?", "Yes"), ("Is there a dog?", "No")),
               ("existence", "2", ("Is there a car?", "Yes"), ("Is there a bus?", "No")),
               ("code_reasoning", "a", ("Is it 5?", "Yes"), ("Is it 6?", "No"))]  # fmt: skip
    root = tmp_path / "mme"
    if request.param == "folder":
        for category, picture, *asked in entries:
            folder = root / category if category == "existence" else root / category / "questions_answers_YN"
            write(folder / f"{picture}.txt", "\n".join(f"{q}  Please answer yes or no.\t{a}" for q, a in asked) + "\n")
            pictures = root / category if category == "existence" else root / category / "images"
            write(pictures / f"{picture}.png", "")
    else:
        for category in ("existence", "code_reasoning"):
            rows = [f"{picture}.png\t{q} Please answer yes or no.\t{a}\tyes"
                    for c, picture, *asked in entries if c == category for q, a in asked]  # fmt: skip
            write(root / f"{category}.txt", "\n".join(rows))
    return str(root)


MME_ANSWERS = [
    answer(f"{place}.png", text, f"{question} Please answer yes or no.{SHORT}")
    for place, question, text in [
        ("existence/1", "Is there a cat?", "Yes, there is"), ("existence/1", "Is there a dog?", "no."),
        ("existence/2", "Is there a car?", "Yes"), ("existence/2", "Is there a bus?", "It is not"),
        ("code_reasoning/a", "Is it 5?", "maybe"), ("code_reasoning/a", "Is it 6?", "No"),
    ]
]  # fmt: skip


def test_mme(score, mme_labels):
    # existence: 3 of 4 answers, 1 of 2 pictures: "it is not" begins with neither yes nor no. code: 1 of 2, and 0 of 1.
    assert score("mme", MME_ANSWERS, mme_labels) == {
        "perception": 125.0,
        "cognition": 50.0,
        "by_category": {
            "code_reasoning": {"acc": 50.0, "acc+": 0.0, "score": 50.0},
            "existence": {"acc": 75.0, "acc+": 50.0, "score": 125.0},
        },
        "total": 6,
        "failed": 2,
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category",
             "comment", "split"]  # fmt: skip
    lines = ["\t".join(names)] + ["\t".join(str(row.get(name, "")) for name in names) for row in rows]
    return "\n".join(lines) + "\n"


PIXEL = base64.b64encode(b"picture").decode()
BASE = [
    {"index": 3, "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "answer": "A", "category": "one",
     "image": PIXEL, "split": "dev"},
    {"index": 5, "question": "Who?", "hint": "nan", "A": "he", "B": "she", "C": "it", "answer": "C", "category": "two",
     "image": PIXEL, "split": "dev"},
]  # fmt: skip


def test_mmbench_rotations_in_rows(tmp_path: Path, score):
    turned = [BASE[0] | {"index": 1_000_003, "A": "dog", "B": "cat", "answer": "B", "image": 3},
              BASE[1] | {"index": 1_000_005, "A": "she", "B": "it", "C": "he", "answer": "B", "image": 5}]  # fmt: skip
    labels = write(tmp_path / "mmbench.tsv", table(BASE + turned))
    answers = [answer(3, "A"), answer(1_000_003, "The answer is cat"), answer(5, "C."), answer(1_000_005, "C")]
    assert score("mmbench", answers, labels) == {
        "circular": 50.0, "single": 75.0, "by_category": {"one": 100.0, "two": 0.0}, "questions": 2, "total": 4,
        "failed": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match="has no answer to 1 of 4 questions, 1000005 the first"):
        score("mmbench", answers[:3], labels)
    asked = read_questions([labels], "Go.", BENCHMARKS["mmbench"].questions)
    assert asked[0] == Question(3, "Look.\nWhich?\nA. cat\nB. dog\nGo.", (b"picture",), {})
    assert asked[3].text == "Who?\nA. she\nB. it\nC. he\nGo." and asked[3].images == (b"picture",)


def test_mmbench_rotations_in_answers(tmp_path: Path, score):
    labels = write(tmp_path / "mmbench.tsv", table(BASE))
    asked = read_questions([labels], "", BENCHMARKS["mmbench"].questions)
    assert [(q.id, q.extra["round_id"]) for q in asked] == [(3, 0), (3, 1), (5, 0), (5, 1), (5, 2)]
    right = {(3, 0): "A", (3, 1): "B", (5, 0): "C", (5, 1): "B", (5, 2): "I cannot tell A from B"}
    answers = [answer(q.id, right[q.id, q.extra["round_id"]], q.text, **q.extra) for q in asked]
    assert score("mmbench-cn", answers, labels) == {
        "circular": 50.0, "single": 80.0, "by_category": {"one": 100.0, "two": 0.0}, "questions": 2, "total": 5,
        "failed": 1,
    }  # fmt: skip


SEED = {
    "question_type": {"Scene Understanding": 1, "Action Recognition": 10},
    "questions": [
        {"question_id": str(i), "question_type_id": kind, "data_type": medium, "data_id": f"{i}.jpg", "answer": right,
         "question": "Which?", "choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z"}
        for i, kind, medium, right in ((101, 1, "image", "A"), (102, 1, "image", "B"), (103, 10, "video", "D"))
    ],
}  # fmt: skip


def test_seed(tmp_path: Path, score):
    labels = write(tmp_path / "seed.json", SEED)
    answers = [
        answer(101, "A"),
        answer(102, "B. x"),
        answer("103", "C"),
    ]  # published numbers take the bare letter alone
    assert score("seed", answers, labels) == {
        "accuracy": 33.33, "image": 50.0, "video": 0.0,
        "by_kind": {"Action Recognition": 0.0, "Scene Understanding": 50.0}, "total": 3, "failed": 1,
    }  # fmt: skip
    asked = read_questions([labels], "", BENCHMARKS["seed"].questions)
    assert (asked[0].text, asked[0].images, len(asked)) == ("Which?\nA. w\nB. x\nC. y\nD. z", ("101.jpg",), 2)


def test_seed_as_published_has_a_question_twice(tmp_path: Path, score, capsys):
    """Rows and answers that repeat others word for word are one each; those that differ are none."""
    twice = write(tmp_path / "seed.json", SEED | {"questions": [*SEED["questions"], SEED["questions"][0]]})
    answers = [answer(101, "A"), answer(102, "A"), answer(101, "A", answer_id="y"), answer(103, "D")]
    assert score("seed", answers, twice) == {
        "accuracy": 66.67, "image": 50.0, "video": 100.0,
        "by_kind": {"Action Recognition": 100.0, "Scene Understanding": 50.0}, "total": 3, "failed": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match="line 3: question 101 was answered in line 1 already, and otherwise"):
        score("seed", [*answers[:2], answer(101, "B"), answers[3]], twice)
    other = SEED["questions"][0] | {"answer": "B"}
    differing = write(tmp_path / "other.json", SEED | {"questions": [*SEED["questions"], other]})
    capsys.readouterr()
    with pytest.raises(UserError, match="questions 3: question 101 has another label before"):
        score("seed", answers, differing)
    assert len(read_questions([twice], "", BENCHMARKS["seed"].questions)) == 2
    assert "seed.json: question number 3: repeats question 101 word for word; it counts once" in capsys.readouterr().err
    out = submit(tmp_path, "seed", answers, f"--labels={twice}")
    assert [json.loads(line)["question_id"] for line in out.read_text().splitlines()] == [101, 102, 103]


MM_VET = {
    "v1_0": {"imagename": "v1_0.png", "question": "What?", "answer": "x", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_1.jpg", "question": "Why?", "answer": "y", "capability": ["rec"]},
    "v1_2": {"imagename": "v1_2.jpg", "question": "Who?", "answer": "z", "capability": ["rec", "ocr"]},
}


@pytest.mark.parametrize("grades", [
    [{"question_id": "v1_0", "grade": 1.0}, {"question_id": 1, "content": "0.2\nRather not."},
     {"question_id": "v1_2", "content": "I cannot grade this."}],
    json.dumps({"v1_0": {"content": ["1.0", "1"], "score": [1.0, 1.0]}, "v1_1": {"content": ["0.2"]},
                "v1_2": {"score": [-1]}}),
])  # fmt: skip
def test_mm_vet(tmp_path: Path, score, grades):
    assert score("mm-vet", grades, write(tmp_path / "mm-vet.json", MM_VET)) == {
        "score": 60.0, "by_capability": {"math": 100.0, "ocr": 100.0, "rec": 20.0}, "total": 2, "failed": 1,
    }  # fmt: skip


@pytest.mark.parametrize("answers", [
    [answer(i, text) for i, text in enumerate(("1 cat", "x is 7", "0.5"))],
    json.dumps({"v1_0": "1 cat", "v1_1": "x is 7", "v1_2": "0.5"}),
    [{"question_id": i, "grade": 1.0} for i in range(2)] + [answer(2, "a cat")],
])  # fmt: skip
def test_answers_to_mm_vet_are_no_grades(tmp_path: Path, score, answers):
    with pytest.raises(UserError, match="has no grade: first have the answers graded by `judge mm-vet "):
        score("mm-vet", answers, write(tmp_path / "mm-vet.json", MM_VET))


def test_judgements_of_mm_vet_without_any_grade_are_no_score(tmp_path: Path, score):
    failed = [{"question_id": i, "grade": -1, "content": "I cannot."} for i in range(3)]
    with pytest.raises(UserError, match="line 1: has no grade, nor has any other of the 3 judgements"):
        score("mm-vet", failed, write(tmp_path / "mm-vet.json", MM_VET))


@pytest.mark.parametrize("name", ["pope", "easy-vqa"])
def test_questions_are_no_answers(tmp_path: Path, score, name):
    asked = [pope(1, "cat", "yes"), pope(2, "dog", "no")]
    with pytest.raises(UserError, match="line 1: is a question, not an answer"):
        score(name, asked, write(tmp_path / "coco_pope_random.json", jsonl(asked)))
    with pytest.raises(UserError, match="line 1: is a question, not an answer"):
        submit(tmp_path, "vqav2", [asked[0] | {"text": f"Is there a cat?{SHORT}"}])


def test_what_was_said_is_told_from_what_is_right(tmp_path: Path, score):
    """Others keep both in a line: `answer` beside `prediction` or `response` is what is right."""
    said = [{"question_id": "q1", "answer": "yes", "prediction": "no"}, {"question_id": "q2", "answer": "blue"},
            {"question_id": "q3", "answer": "fire hydrant", "response": "hydrant"}]  # fmt: skip
    assert score("gqa", said, write(tmp_path / "labels.json", GQA))["accuracy"] == 0.0


def test_easy_vqa(tmp_path: Path, score):
    asked = [("what is the shape?", "circle"), ("is there a red shape?", "no"), ("is there a circle?", "yes")]
    samples = [{"id": f"{i}", "image": "0.png", "conversations": [{"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": right}]} for i, (question, right) in enumerate(asked)]  # fmt: skip
    labels = write(tmp_path / "questions.json", samples)
    assert score("easy-vqa", json.dumps({"0": "circle", "1": "yes", "2": "yes"}), labels) == {
        "accuracy": 66.67, "by_kind": {"is it that colour": 0.0, "is it that shape": 100.0, "shape": 100.0}, "total": 3,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- in reports


def reported(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> dict[str, float]:
    """What `report` says of a run, by category, in percent."""
    evaluate.main(["report", str(tmp_path), "--json", "--resamples", "10"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    return {
        row["category"]: round(row["values"][tmp_path.name]["value"], 2) for row in rows if row["benchmark"] == name
    }


def test_mme_in_a_report(tmp_path: Path, score, mme_labels, capsys):
    """A category's score is in percent of 200, perception's and cognition's of what their categories can have: here one
    each, 125 and 50 of 200, whichever has more pictures."""
    outcomes = tmp_path / "mme.outcomes.jsonl"
    score("mme", MME_ANSWERS, mme_labels, f"--outcomes={outcomes}")
    assert reported(tmp_path, capsys, "mme") == {
        "all": 43.75, "perception": 62.5, "existence": 62.5, "cognition": 25.0, "code_reasoning": 25.0,
    }  # fmt: skip
    first = json.loads(outcomes.read_text().splitlines()[-1])
    assert (first["question_id"], first["score"], first["of"]) == ("existence/2", 0.5, 2.0)
    assert first["answer"] == "Yes\n\nIt is not" and first["reference"] == "yes\n\nno"
    assert first["question"].startswith("Is there a car? ") and "Is there a bus?" in first["question"]


@pytest.mark.parametrize(("name", "labels", "given", "right"), [
    ("vqav2", VQAV2, [answer(i, "x") for i in range(1, 5)], ["yes", "3", "the dog.", "The Beach"]),
    ("textvqa", TEXTVQA, json.dumps({"7": "x", "8": "x"}), ["nokia", "98"]),
    ("pope", jsonl([pope(1, "cat", "yes"), pope(2, "dog", "no")]), [answer(1, "x"), answer(2, "x")], ["yes", "no"]),
])  # fmt: skip
def test_outcomes_tell_what_is_right(tmp_path: Path, score, name, labels, given, right):
    outcomes = tmp_path / f"{name}.outcomes.jsonl"
    score(name, given, write(tmp_path / "coco_pope_random.json", labels), f"--outcomes={outcomes}")
    assert [json.loads(line)["reference"] for line in outcomes.read_text().splitlines()] == right


def test_textvqa_in_a_report(tmp_path: Path, score, capsys):
    """Both questions have the id of their picture."""
    answers = [answer("ab", "nokia", f"What brand?{SHORT}"), answer("ab", "x", f"What is the year?{SHORT}")]
    score("textvqa", answers, write(tmp_path / "l.json", TEXTVQA), f"--outcomes={tmp_path / 'textvqa.outcomes.jsonl'}")
    assert reported(tmp_path, capsys, "textvqa") == {"all": 50.0}


def test_mmbench_in_a_report(tmp_path: Path, score, capsys):
    """A question counts once, and its numbers are the circular ones."""
    labels = write(tmp_path / "mmbench.tsv", table(BASE))
    right = {(3, 0): "A", (3, 1): "B", (5, 0): "C", (5, 1): "B", (5, 2): "B"}
    answers = [answer(ident, text, round_id=turn) for (ident, turn), text in right.items()]
    scores = score("mmbench", answers, labels, f"--outcomes={tmp_path / 'mmbench.outcomes.jsonl'}")
    assert reported(tmp_path, capsys, "mmbench") == {"all": 50.0, "one": 100.0, "two": 0.0}
    assert (scores["circular"], scores["by_category"]) == (50.0, {"one": 100.0, "two": 0.0})


def test_outcomes_come_into_a_folder_of_their_own_and_after_the_score(tmp_path: Path, capsys):
    labels, answers = write(tmp_path / "l.json", GQA), write(tmp_path / "a.json", dict.fromkeys(GQA, "yes"))
    args = ["score", "gqa", f"--answers={answers}", f"--labels={labels}", "--json"]
    outcomes = tmp_path / "runs/a/eval/gqa.outcomes.jsonl"
    evaluate.main([*args, f"--outcomes={outcomes}"])
    assert len(outcomes.read_text().splitlines()) == 3
    printed = capsys.readouterr().out
    for name, message in (("gqa.jsonl", "has to be called"), ("l.json/gqa.outcomes.jsonl", "cannot be written")):
        with pytest.raises(UserError, match=message):
            evaluate.main([*args, f"--outcomes={tmp_path / name}"])
        assert capsys.readouterr().out == printed


# ------------------------------------------------------------------------------------------ questions' own files


def test_questions_of_the_benchmarks_own_files(tmp_path: Path):
    def asked(name: str, value: Any) -> Question:
        file = write(tmp_path / f"{name}.json", value)
        return read_questions([file], BENCHMARKS[name].suffix, BENCHMARKS[name].questions)[0]

    vqav2 = {"data_subtype": "test-dev2015", "questions": [{"image_id": 1, "question": "Is it?", "question_id": 10}]}
    assert asked("vqav2", vqav2) == Question(10, "Is it?" + SHORT, ("COCO_test2015_000000000001.jpg",))
    assert asked("gqa", GQA) == Question("q1", "Is it red?" + SHORT, ("n1.jpg",))
    vizwiz = asked("vizwiz", [{"image": "a.jpg", "question": "What?"}])
    middle = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert vizwiz == Question("a.jpg", f"What?{middle}{SHORT}", ("a.jpg",))
    assert asked("textvqa", TEXTVQA) == Question("ab", "What brand?" + SHORT, ("ab.jpg",))
    assert asked("mm-vet", MM_VET) == Question("v1_0", "What?", ("v1_0.png",))


def test_texts_of_the_release_stay_as_they_are(tmp_path: Path):
    line = {"question_id": 1, "image": "a.jpg", "text": "  What is this? \nSay it. "}
    (asked,) = read_questions([write(tmp_path / "a.jsonl", jsonl([line]))], "")
    assert asked.text == line["text"]


def test_questions_of_the_release_stay_as_they_are(tmp_path: Path):
    line = {"question_id": 1, "image": "a.jpg", "text": "<image>\nIs it?" + SHORT, "category": "default"}
    sample = {"id": "2", "conversations": [{"from": "human", "value": "Which?\n<image>"}], "image": "b.jpg"}
    (first,) = read_questions([write(tmp_path / "a.jsonl", jsonl([line]))], BENCHMARKS["pope"].suffix)
    (second,) = read_questions([write(tmp_path / "b.json", [sample])], "")
    assert first == Question(1, "Is it?" + SHORT, ("a.jpg",), {"category": "default"})
    assert second == Question("2", "Which?", ("b.jpg",), marked_text="Which?\n<image>")


def test_a_question_of_a_published_file_may_be_there_twice(tmp_path: Path, capsys):
    """As 49914 in SEED-Bench's."""
    line = {"question_id": 49914, "image": "a.jpg", "text": "Is it?"}
    (asked,) = read_questions([write(tmp_path / "a.jsonl", jsonl([line, line]))], "")
    assert asked.id == 49914
    assert "a.jsonl: question number 2: repeats question 49914 word for word" in capsys.readouterr().err
    with pytest.raises(UserError, match="b.jsonl: question number 2: question 49914 is there twice, with other images"):
        read_questions([write(tmp_path / "b.jsonl", jsonl([line, line | {"image": "b.jpg"}]))], "")


def test_questions_of_pope_and_mme(pope_labels, mme_labels):
    asked = read_questions(pope_labels, "Go.", BENCHMARKS["pope"].questions)
    assert len(asked) == 6 and asked[0].extra == {"category": "coco_pope_random"}
    if (Path(mme_labels) / "existence").exists():
        asked = read_questions([mme_labels], "Go.", BENCHMARKS["mme"].questions)
        assert (asked[0].id, asked[0].images) == ("code_reasoning/a.png", ("code_reasoning/images/a.png",))
        assert asked[0].text == "Is it 5?\nGo."  # the release's words stand in place of MME's
        right = BENCHMARKS["mme"].read_labels([mme_labels], [], [])
        asked = read_questions([mme_labels], BENCHMARKS["mme"].suffix, BENCHMARKS["mme"].questions)
        assert {right.key(Line("", answer(q.id, "yes", q.text))) for q in asked} == set(right)


# --------------------------------------------------------------------------------------------------------- submissions


def submit(tmp_path: Path, name: str, answers: list[dict[str, Any]], *more: str) -> Path:
    file = write(tmp_path / "answers.jsonl", jsonl(answers))
    evaluate.main(["submission", name, f"--answers={file}", f"--output={tmp_path / 'out'}", *more])
    return tmp_path / "out"


@pytest.mark.parametrize(("name", "ident", "expected"), [
    ("vqav2", 1, [{"question_id": 1, "answer": "2 dogs"}]),
    ("vizwiz", "a.jpg", [{"image": "a.jpg", "answer": "2 dogs"}]),
    ("gqa", "q1", [{"questionId": "q1", "prediction": "the two dogs"}]),
    ("mm-vet", "v1_3", {"v1_3": "The two dogs."}),
    ("seed", 4, {"question_id": 4, "prediction": "The two dogs."}),
])  # fmt: skip
def test_submissions(tmp_path: Path, name, ident, expected):
    assert json.loads(submit(tmp_path, name, [answer(ident, "The two dogs.")]).read_text()) == expected
    assert json.loads(submit(tmp_path, name, [answer(ident, "The two dogs.")] * 2).read_text()) == expected
    with pytest.raises(UserError, match="was answered in"):
        submit(tmp_path, name, [answer(ident, "The two dogs."), answer(ident, "A cat.")])


POPE_ANSWER = answer(7, "yes", "Is there a cat in the image?", category="adversarial")
SEED_ANSWER = answer(7, "B", "Which?\nAnswer with the option's letter from the given choices directly.")
MMBENCH_ANSWER = answer(7, "B", "Which?", round_id=1)


@pytest.mark.parametrize(("name", "line", "message"), [
    ("vqav2", answer("v1_7", "yes"), "line 1: question v1_7 has no id of vqav2: are the answers to another benchmark"),
    ("vqav2", MME_ANSWERS[0], "question existence/1.png has no id of vqav2"),
    ("vizwiz", MME_ANSWERS[0], "question existence/1.png has no id of vizwiz"),
    ("gqa", answer("VizWiz_test_1.jpg", "yes"), "question VizWiz_test_1.jpg has no id of gqa"),
    ("mm-vet", answer(262144, "yes"), "question 262144 has no id of mm-vet"),
    ("seed", answer("201307251", "yes", f"Is it?{SHORT}"), "was asked to 'Answer the question using a single word"),
    ("vqav2", POPE_ANSWER, "line 1: question 7 is POPE's, as all others are"),
    ("vqav2", POPE_ANSWER | {"category": "default"}, "line 1: question 7 is POPE's, as all others are"),
    ("gqa", answer("0054c91397f2fe05", "x"), "question 0054c91397f2fe05 has no id of gqa"),
    ("gqa", SEED_ANSWER, "question 7 was asked to 'Answer with the option's letter"),
    ("seed", MMBENCH_ANSWER, "question 7 has a round_id, as answers to MMBench have"),
])  # fmt: skip
def test_a_submission_refuses_answers_to_another_benchmark(tmp_path: Path, name, line, message):
    with pytest.raises(UserError, match=message):
        submit(tmp_path, name, [line])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "own"), [
    ("vqav2", jsonl([{"question_id": 1, "image": "a.jpg", "text": "?"}])),
    ("vizwiz", jsonl([{"question_id": 1, "image": "a.jpg", "text": "?"}])),
    ("gqa", json.dumps(GQA)), ("seed", json.dumps(SEED)), ("mm-vet", json.dumps(MM_VET)), ("mmbench", table(BASE)),
    ("textvqa", json.dumps(TEXTVQA)),
])  # fmt: skip
def test_a_submission_has_but_the_benchmarks_questions(tmp_path: Path, name, own):
    """Where these are given, ids tell, and nothing is left out."""
    file = write(tmp_path / ("own.tsv" if name == "mmbench" else "own.json"), own)
    with pytest.raises(UserError, match="line 1: .* has no question .*: are the answers to another benchmark"):
        submit(tmp_path, name, [POPE_ANSWER], f"--labels={file}")
    assert not (tmp_path / "out").exists()


def test_a_submission_tells_what_is_not_answered(tmp_path: Path, capsys):
    submit(tmp_path, "gqa", [answer("q1", "yes")], f"--labels={write(tmp_path / 'gqa.json', GQA)}")
    assert "warning: 2 of 3 questions of" in capsys.readouterr().err


def test_submissions_of_others_answers(tmp_path: Path):
    """Fields have other names there; what is missing or no text is named."""
    out = submit(tmp_path, "gqa", [{"questionId": "q1", "prediction": "Yes."}])
    assert json.loads(out.read_text()) == [{"questionId": "q1", "prediction": "yes"}]
    with pytest.raises(UserError, match="line 1: has no question_id or questionId"):
        submit(tmp_path, "seed", [{"text": "A"}, {"text": "B"}])
    with pytest.raises(UserError, match="line 1: the answer is no text but 3"):
        submit(tmp_path, "vqav2", [{"question_id": 1, "text": 3}])


def test_a_submission_to_vqav2_has_all_questions(tmp_path: Path):
    """The server takes the whole of test2015 alone: what was not asked has an empty answer."""
    asked = [{"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in (1, 2)]
    questions = write(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", jsonl(asked))
    out = submit(tmp_path, "vqav2", [answer(2, "Two.")], f"--labels={questions}")
    assert json.loads(out.read_text()) == [{"question_id": 2, "answer": "2"}, {"question_id": 1, "answer": ""}]


def test_a_submission_to_textvqa_has_its_ids(tmp_path: Path):
    own = write(tmp_path / "textvqa.json", {"data": [entry | {"answers": []} for entry in TEXTVQA["data"]]})
    out = submit(tmp_path, "textvqa", [answer("ab", "1998.", f"What is the year?{SHORT}")], f"--labels={own}")
    assert json.loads(out.read_text()) == [{"question_id": 8, "image_id": "ab", "answer": "1998"}]
    with pytest.raises(UserError, match="line 1: .* has no question ab: why."):
        submit(tmp_path, "textvqa", [answer("ab", "x", f"Why?{SHORT}")], f"--labels={own}")


def test_mmbench_submission(tmp_path: Path):
    own = write(tmp_path / "mmbench.tsv", table(BASE))
    answers = [answer(3, "A\x0b"), answer(5, "B")]  # what no sheet can hold is left out
    out = submit(tmp_path, "mmbench", answers, f"--labels={own}")
    rows = list(openpyxl.load_workbook(io.BytesIO(out.read_bytes())).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert [(row[0], row[6]) for row in rows[1:]] == [(3, "A"), (5, "B")]


def test_mme_submission(tmp_path: Path, mme_labels):
    out = submit(tmp_path, "mme", MME_ANSWERS, f"--labels={mme_labels}")
    lines = (out / "existence.txt").read_text().splitlines()
    assert len(lines) == 4 and lines[0].split("\t")[2:] == ["yes", "Yes, there is"]
    with pytest.raises(UserError, match="is there already"):
        submit(tmp_path, "mme", MME_ANSWERS, f"--labels={mme_labels}")


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("name", "labels", "message"), [
    ("vqav2", {"questions": []}, "has no annotations: is it a file of another kind or version"),
    ("vqav2", {"annotations": {}}, "annotations is no list"),
    ("gqa", [1], "is no object of questions by id"),
    ("textvqa", {"data": [{"image_id": "a", "question": "?"}]}, "data 0: has no answers"),
    ("pope", jsonl([pope(1, "cat", "maybe")]), "line 1: the label is maybe, neither yes nor no"),
    ("pope", jsonl([pope(1, "cat", "yes"), pope(2, "cat", "no")]), "line 2: .*has another label before"),
    ("mme", "", "is no folder"),
    ("mmbench", table([BASE[0] | {"answer": "C"}]), "line 2: question 3: its answer 'C' is none of its options"),
    ("mmbench", "question\nx\n", "line 2: has no index"),
    ("mmbench", "index\tquestion\n", "has no rows"),
    ("seed", {"questions": []}, "has no question_type"),
    ("mmbench", table(BASE).replace("she", "sh\u00e9").encode("latin-1"), "line 3: is not UTF-8 .byte 0xe9"),
    ("pope", jsonl([pope(1, "cat", "yes")]).encode("utf-16")[:-1], "is no UTF-16: truncated data"),
    ("textvqa", {"data": [{"image_id": "a", "question": "?", "answers": [1]}]}, "data 0: its answers are no texts"),
    ("easy-vqa", [{"id": "1", "conversations": [{"from": "human", "value": "?"}]}], ".id 1.: has no answer to its"),
    ("easy-vqa", [{"id": "1", "conversations": [{"value": "?"}]}], "sample 0 .id 1.: turn 1 is from null"),
    ("gqa", {"q": {"answer": 1, "types": {"structural": "query"}}}, "question q: its answer is no text but 1"),
    ("sciencequa", {}, "sciencequa: is no such benchmark; choose from easy-vqa"),
])  # fmt: skip
def test_labels_of_another_kind_are_named(tmp_path: Path, score, name, labels, message):
    with pytest.raises(UserError, match=message):
        score(name, [answer(1, "yes")], write(tmp_path / "labels.json", labels))


def test_mme_of_another_encoding_is_named(tmp_path: Path, score, mme_labels):
    file = next(Path(mme_labels).rglob("*.txt"))
    file.write_bytes(file.read_bytes() + "Is it a caf\u00e9?\tYes".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{file.name}: line [0-9]+: is not UTF-8 .byte 0xe9"):
        score("mme", MME_ANSWERS, mme_labels)


VALID = {
    "vqav2": VQAV2, "vizwiz": VIZWIZ, "textvqa": TEXTVQA, "gqa": GQA, "seed": SEED, "mm-vet": MM_VET,
    "easy-vqa": [{"id": "a", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "red"}]}],
    "exact": [{"question_id": "a", "answer": ["red", "crimson"], "category": "colour"}, {"id": "1", "answer": 2}],
}  # fmt: skip
anything = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.none(), max_size=2) | st.just({})
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, Any]:
    """A benchmark and its labels, of which one value became anything or is gone."""
    name = draw(st.sampled_from(sorted(VALID)))
    labels = inner = json.loads(json.dumps(VALID[name]))
    while True:
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if isinstance(inner[key], dict | list) and inner[key] and draw(st.booleans()):
            inner = inner[key]
        else:
            break
    if draw(st.booleans()):
        del inner[key]
    else:
        inner[key] = draw(anything)
    return name, labels


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged(), st.sampled_from(["1", "a.jpg", "7", "q1", "101", "v1_0", "a"]), anything | st.just("yes"))
def test_damaged_labels_are_scored_or_told(tmp_path: Path, labels: tuple[str, Any], ident: str, text: Any):
    """Whatever is wrong with one value ends in numbers or in one line."""
    name, value = labels
    answers = write(tmp_path / "a.jsonl", jsonl([answer(ident, text)]))
    with contextlib.suppress(UserError):
        scores(name, answers, [write(tmp_path / "l.json", value)], [], partial=True)


def test_scoring_imports_no_jax(tmp_path: Path):
    labels = write(tmp_path / "labels.json", VQAV2)
    answers = write(tmp_path / "a.json", {str(i): "yes" for i in range(1, 5)})
    code = (
        "import sys; from llava_jax.evaluate.__main__ import main; main(sys.argv[1:]); "
        "assert not {'jax', 'transformers', 'openai', 'openpyxl'} & set(sys.modules)"
    )
    args = ["score", "vqav2", "--answers", answers, "--labels", labels]
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert "25.00" in result.stdout
