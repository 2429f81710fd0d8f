"""Marks, keys and formats of others are named; what people write about HTML is not taken for a mark."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.data.unsupported import doubtful_mark, explain_missing, foreign_mark, may_hold_marks, unread_keys

MARKS = {
    "<video>\nWhat happens?": "<video>",
    "<image>\n<audio>What is said?": "<audio>",
    "What is said here? <audio>": "<audio>",
    "Video: <Video>\nWhat happens?": "<Video>",
    "[IMG]\nWhat is it?": "[IMG]",
    "Picture 1: <img>a b.jpg</img>\nWhat is it?": "<img>a b.jpg</img>",
    "<img>https://example.com/a.jpg</img>": "<img>https://example.com/a.jpg</img>",
    "What is in <image1>?": "<image1>",
    "<image>\nCompare it with <image 2>.": "<image 2>",
    "<|image_1|>\nWhat is it?": "<|image_1|>",
    "<|image|>What is it?": "<|image|>",
    "<|vision_start|><|image_pad|><|vision_end|>What?": "<|vision_start|>",
    "<image_placeholder>\nWhat?": "<image_placeholder>",
    "<ImageHere>What?": "<ImageHere>",
    "<start_of_image> What?": "<start_of_image>",
    "(<image>./</image>)\nWhat?": "<image>./</image>",
    "[IMG_BREAK]What?": "[IMG_BREAK]",
    "<|AUDIO|>What?": "<|AUDIO|>",
    "<image:1> <image #2>\nWhich?": "<image:1>",
    "<video/>\nWhat happens?": "<video/>",
    "[VIDEO]\nWhat happens?": "[VIDEO]",
    "<video>\nWhen does <ref>the cat</ref> jump?": "<video>",
    "<img><IMG_CONTEXT></img>\nWhat?": "<IMG_CONTEXT>",
}


@pytest.mark.parametrize(("text", "mark"), MARKS.items())
def test_marks_of_other_formats_are_found(text, mark):
    assert foreign_mark(text, question=True) == mark and may_hold_marks(text)


@pytest.mark.parametrize("mark", ["<|image_1|>", "<image1>", "<img>a.jpg</img>", "<|video_pad|>"])
def test_what_can_only_be_a_mark_is_one_in_answers_too(mark):
    assert foreign_mark(f"It is {mark}.", question=False) == mark


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat is it?",
        "What is the <video> tag for?",
        "The `<img>` and `</img>` tags",
        '<img src="a.png"> is how HTML shows an image.',
        "<video>\n  <source src='a.mp4'>\n</video>\nWhy does it not play?",
        "```html\n<audio>\n```",
        "<video controls>\nWhy does it not play?",
        "a < b and image > c",
        "A box [0.1, 0.2, 0.3, 0.4] <b>bold</b>",
        "import <image.h>",
        "Is '<audio>' an element of HTML?",
        "[IMG]http://a/b.png[/IMG] is BBCode",
        "<item><img>http://a/b.jpg</img></item>\nParse this XML.",
        "<image1>a.jpg</image1>\nWhat is wrong with this XML?",
        "<img> and </img> are tags",
        "List<image> and vector<video> in C++ templates</T>",
        "labels = annotations[image_id][img_idx]",
        "[IMG](https://example.com/a.png)",
        "unsigned char pixels[IMG_HEIGHT][IMAGE_WIDTH], sound[AUDIO_LEN];",
        "![a cat]([IMAGE_URL]) [VIDEO_TITLE] a[IMG_END]",
        "<div>\n<img>\n<p>How do I center it?",
        "<audio>\n<source src=a.mp3>\ndoes not play",
        "Qwen2-VL pads with `<|image_pad|>`, and `<image1>` is Phi's.",
        "```\ndocker rmi <image1> <image2>\n```",
        "What does <img>${url}</img> do in this template?",
    ],
)
def test_ordinary_text_has_no_marks(text):
    assert foreign_mark(text, question=True) is None and doubtful_mark(text) is None


def test_answers_may_begin_with_tags_of_html():
    assert foreign_mark("<video> plays films, <audio> sound.", question=False) is None


@pytest.mark.parametrize("text", ["A script:\n[VIDEO] A beach.\n[AUDIO] Waves.", "[Video] How?", "[image]\nMenu"])
def test_brackets_in_lines_of_a_question_are_doubtful(text):
    assert foreign_mark(text, question=True) is None and doubtful_mark(text)


def test_a_tag_within_a_question_is_doubtful():
    text = "What happens in <video> after a minute?"
    assert foreign_mark(text, question=True) is None and doubtful_mark(text) == "<video>"


@given(st.text())
def test_text_that_the_quick_look_lets_pass_has_no_marks(text):
    if not may_hold_marks(text):
        assert foreign_mark(text, question=True) is doubtful_mark(text) is None


@given(st.text(st.characters(exclude_characters="<["), max_size=80))
def test_text_without_brackets_is_never_refused(text):
    assert not may_hold_marks(text) and foreign_mark(text, question=True) is None


def test_keys_that_carry_meaning_are_named_where_they_say_something():
    value = {"video": "a.mp4", "history": [["q", "a"]], "tools": "[]", "audio": None, "source": "x", "width": 3}
    assert [detail.split("`")[1] for detail in unread_keys(value, has_images=False)] == ["video", "history"]
    assert list(unread_keys({"image_path": "a.jpg"}, has_images=True)) == []
    (detail,) = unread_keys({"image_path": "a.jpg"}, has_images=False)
    assert "rename" in detail


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "`instruction` and `output`"),
        ({"question": "q", "answer": "a"}, "`question` and `answer`"),
        ({"prompt": "q", "completion": "a"}, "`prompt` and `completion`"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences"),
        ({"url": "x", "caption": "a"}, "`caption`"),
        ({"questions": [{"question_id": 1, "text": "q"}]}, "its `questions` holds a list of samples"),
        ({"data": [{"conversations": []}]}, "its `data` holds a list of samples"),
        ({"texts": [{"user": "q", "assistant": "a"}]}, "its `texts` is a list of objects of user, assistant"),
        ({"id": "x"}, "its keys are id"),
        ({}, "its keys are none"),
    ],
)
def test_formats_are_recognised(value, words):
    assert words in explain_missing(value)
