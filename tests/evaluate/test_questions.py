"""Questions are read as training reads samples: keys, roles, encodings, counts of marks and images, errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data.sources import LlavaJson
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.in_training import request
from llava_jax.evaluate.predict_endpoint import messages
from llava_jax.evaluate.questions import Question, marked, read_questions

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
SAMPLE = {"id": 7, "image": "a.jpg", "conversations": TURNS}
LINE = {"question_id": 7, "image": "a.jpg", "text": "What is it?"}
ASKED = Question(7, "What is it?", ("a.jpg",))


def write(path, value, encoding="utf-8", lines=False):
    text = "\n".join(json.dumps(one, ensure_ascii=False) for one in value) if lines else json.dumps(value)
    path.write_text(text, encoding)
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        SAMPLE,
        {"id": 7, "images": ["a.jpg"], "conversations": TURNS},
        SAMPLE | {"conversations": [{"from": "gpt", "value": "Hello!"}, *TURNS]},
        {"id": 7, "images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>\nWhat is it?"}]},
        LINE,
        {"question_id": 7, "images": ["a.jpg"], "text": "<image>\nWhat is it?"},
        LINE | {"images": ["a.jpg"], "answer": "A cat.", "source": "x"},
    ],
)
def test_every_spelling_is_the_same_question(tmp_path, value, lines, encoding):
    path = write(tmp_path / "q.json", [value], encoding, lines)
    for own in (None, BENCHMARKS["vqav2"].questions):
        assert read_questions([path], "", own) == [ASKED]
    assert read_questions([path], "Briefly.") == [ASKED._replace(text="What is it?\nBriefly.")]


def test_what_stands_beside_the_text_and_is_not_asked_is_told(tmp_path, capsys):
    lines = [
        LINE | {"hint": "It is red.", "choices": ["a cat", "a dog"]},
        LINE | {"question_id": 8, "hint": "It purrs."},
    ]
    lines.append(LINE | {"question_id": 9, "question": "<image>\nWhat is it?", "options": ["is it", 3], "context": ""})
    path = write(tmp_path / "q.jsonl", lines, lines=True)
    assert len(read_questions([path], "")) == 3
    told = "`hint` (2), `choices` (1) beside the text of questions is not read, and no text says the same"
    assert capsys.readouterr().err == f"warning: {path}: {told}\n"


def test_system_prompts_are_asked_with(tmp_path):
    system = {"from": "system", "value": "Be brief."}
    values = [SAMPLE | {"system": "Be brief."}, SAMPLE | {"id": 8, "conversations": [system, *TURNS]}]
    asked = read_questions([write(tmp_path / "a.json", values)], "")
    asked += read_questions([write(tmp_path / "b.jsonl", [LINE | {"system_prompt": "Be brief."}], lines=True)], "")
    assert asked == [q._replace(system="Be brief.") for q in (ASKED, ASKED._replace(id=8), ASKED)]
    assert messages(ASKED._replace(images=(), system="Be brief."), "") == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]  # fmt: skip


def test_only_the_first_question_is_asked_with_its_own_images(tmp_path):
    later = [*TURNS, {"from": "human", "value": "<image>\nAnd this?"}, {"from": "gpt", "value": "A dog."}]
    value = SAMPLE | {"image": ["a.jpg", "b.jpg"], "conversations": later}
    assert read_questions([write(tmp_path / "a.json", [value])], "") == [ASKED]


@pytest.mark.parametrize("text", ["  What is it?", "What is it? \n", "\tWhat?", ""])
def test_texts_without_marks_are_kept_to_the_space(tmp_path, text):
    values = [LINE | {"text": text}]
    (asked,) = read_questions([write(tmp_path / "a.jsonl", values, lines=True)], "")
    assert asked.text == text and marked(asked) == f"<image>\n{text}"


def test_places_of_marks_are_kept(tmp_path):
    text = "Source: <image>\nTarget: <image>\nWhat changed?"
    value = {"question_id": 1, "images": ["a.jpg", "b.jpg"], "text": text}
    (asked,) = read_questions([write(tmp_path / "a.jsonl", [value], lines=True)], "Briefly.")
    assert asked.marked_text == f"{text}\nBriefly." and "<image>" not in asked.text
    assert asked.text.endswith("\nBriefly.") and asked.images == ("a.jpg", "b.jpg")


def test_a_model_that_saw_images_in_their_places_is_asked_so(tmp_path):
    text = "Source: <image>\nTarget: <image>"
    image = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(image)
    value = {"question_id": 1, "images": ["a.png", "a.png"], "text": text}
    (asked,) = read_questions([write(tmp_path / "a.jsonl", [value], lines=True)], "Briefly.")
    first = "<image>\n<image>\nSource: \nTarget:\nBriefly."
    assert marked(asked, image_position="as_is") == f"{text}\nBriefly."
    assert marked(asked) == marked(asked, image_position="random") == first
    assert marked(asked, image_last=True, image_position="as_is").endswith("\nBriefly.\n<image>\n<image>")
    assert request(asked, str(tmp_path), "as_is").turns == [("user", f"{text}\nBriefly.")]
    (message,) = messages(asked, str(tmp_path))
    assert [part.get("text", part["type"]) for part in message["content"]] == [
        "Source: ", "image_url", "\nTarget: ", "image_url", "\nBriefly."]  # fmt: skip
    (message,) = messages(asked._replace(marked_text="", text="What?"), str(tmp_path))
    assert [part.get("text", part["type"]) for part in message["content"]] == ["image_url", "image_url", "What?"]


FAULTS = [
    (LINE | {"text": "<image><image> What?"}, "question 7: 2 <image> in the text, but 1 images"),
    ({"question_id": 7, "text": "<image>\nWhat?"}, "question 7: 1 <image> in the text, but 0 images"),
    (LINE | {"images": ["b.jpg"]}, "question 7: `image` is"),
    (LINE | {"image": {"path": "a.jpg"}}, "question 7: `image` is neither"),
    (LINE | {"video": "a.mp4"}, "question 7: `video` is not read"),
    ({"question_id": 7, "image_path": "a.jpg", "text": "What?"}, "question 7: `image_path` is not read"),
    (LINE | {"text": "<image 1> What?"}, "question 7: its text holds <image 1>"),
    (LINE | {"text": None}, "question 7: its text is no text but null"),
    ({"text": "What?"}, "has no question_id or id"),
    (SAMPLE | {"image": None}, r"\(id 7\): 1 <image> in the text, but 0 images"),
    (SAMPLE | {"history": [["q", "a"]]}, r"\(id 7\): `history` is not read"),
    (SAMPLE | {"conversations": [TURNS[1]], "image": None}, r"\(id 7\): has no question"),
    ({"instruction": "q", "output": "a"}, "looks like a format of `instruction` and `output`"),
    ("What?", "is no object"),
]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(("value", "message"), FAULTS)
def test_faults_are_named_with_file_and_place(tmp_path, value, message, lines):
    path = write(tmp_path / "q.json", [value], lines=lines)
    with pytest.raises(UserError, match=rf"q.json: {'line 1' if lines else 'sample 0'}.*{message}"):
        read_questions([path], "")


@pytest.mark.parametrize("content", [
    json.dumps({"data": [SAMPLE]}, indent=1), json.dumps({"data": [SAMPLE]}), json.dumps(SAMPLE, indent=1), "[", "",
    "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
])  # fmt: skip
def test_files_that_training_refuses_are_refused_in_the_same_words(tmp_path, content):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(UserError) as ours:
        read_questions([str(tmp_path / "q.json")], "")
    with pytest.raises(UserError) as trainings:
        LlavaJson(tmp_path / "q.json")
    assert str(ours.value) == str(trainings.value)


texts = st.text(st.characters(codec="utf-8", exclude_characters="<["), max_size=20)


@given(st.lists(st.tuples(texts, st.integers(0, 2)), min_size=1, max_size=3), st.booleans())
def test_what_is_asked_is_what_training_would_see(tmp_path_factory, questions, lines):
    folder = tmp_path_factory.mktemp("questions")
    values = []
    for number, (text, images) in enumerate(questions):
        turns = [{"from": "human", "value": "<image>\n" * images + text}, {"from": "gpt", "value": "a"}]
        values.append({"id": str(number), "image": [f"{i}.jpg" for i in range(images)], "conversations": turns})
    path = write(folder / "q.json", values, lines=lines)
    asked = read_questions([path], "")
    for question, sample in zip(asked, LlavaJson(path), strict=True):
        assert question.images == sample.images and question.id == sample.id
        assert marked(question).split() == sample.turns[0][1].split()
