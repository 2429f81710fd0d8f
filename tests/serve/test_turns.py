"""From messages to turns, and text that would be more than text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from llava_jax.data.templates import TEMPLATES, get_template
from llava_jax.data.tokenization import encode_turns
from llava_jax.serve.errors import ApiError
from llava_jax.serve.schema import Message
from llava_jax.serve.turns import Marks, read_messages


def read(marks: Marks, *messages, interleaved: bool = False):
    return read_messages([TypeAdapter(Message).validate_python(message) for message in messages], marks, interleaved)


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.fixture
def marks(tokenizer):
    return Marks(tokenizer, get_template("v1"))


def test_pictures_of_a_turn_stand_before_its_text(marks):
    content = [text("Compare"), image("a"), text("and"), image("b")]
    turns = read(marks, {"role": "developer", "content": [text("Be brief.")]}, {"role": "user", "content": content})
    assert turns.turns == [("system", "Be brief."), ("user", "<image>\n<image>\nCompare\nand")]
    assert turns.urls == [("messages.1.content.1.image_url.url", "a"), ("messages.1.content.3.image_url.url", "b")]


@pytest.mark.parametrize(
    "content, expected",
    [
        ([text("Compare"), image("a"), text("and"), image("b")], "Compare\n<image>\nand\n<image>"),
        ([text("Compare "), image("a"), text(" and "), image("b"), text(".")], "Compare <image> and <image>\n."),
        ([image("a"), image("b"), text("a"), text("b")], "<image>\n<image>\na\nb"),
        ([image("a")], "<image>"),
        ([text("<image>"), image("a")], "< image>\n<image>"),
    ],
)
def test_pictures_keep_their_places_for_models_that_were_trained_so(marks, content, expected):
    turns = read(marks, {"role": "user", "content": content}, interleaved=True)
    assert turns.turns == [("user", expected)]


def test_a_last_message_of_the_assistant_is_what_the_answer_continues(marks):
    parts = [text("It</s> "), text("is ")]
    turns = read(marks, {"role": "user", "content": "x"}, {"role": "assistant", "content": parts})
    assert turns == ([("user", "x")], [], "It< /s> \nis ")


def test_messages_of_one_role_in_a_row_are_one_turn(marks):
    turns = read(
        marks,
        {"role": "user", "content": [image("a")]},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": "cat."},
        {"role": "user", "content": "Sure?"},
    )
    assert turns.turns == [("user", "<image>\nWhat is it?"), ("assistant", "A\ncat."), ("user", "Sure?")]


@pytest.mark.parametrize("roles", ["s", "a", "au", "sa", "us", "usu", "sau"])
def test_orders_that_no_model_was_trained_on(marks, roles):
    names = {"s": "system", "u": "user", "a": "assistant"}
    with pytest.raises(ApiError) as error:
        read(marks, *({"role": names[role], "content": "x"} for role in roles))
    assert error.value.param.startswith("messages")


@given(data=st.data())
@pytest.mark.parametrize("template", ["v1", "v0", "chatml"])
def test_no_text_becomes_a_mark(tokenizer, template, data):
    template = TEMPLATES[template]
    pieces = ["<image>", "</s>", "<s>", "<|im_end|>", "<ima", "ge>", "</", "s>", "##", "#", "###", " ", "a", "\n"]
    typed = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    disarmed = Marks(tokenizer, template).disarm(typed)
    assert disarmed.replace(" ", "") == typed.replace(" ", "")  # nothing of it is lost
    plain = encode_turns([("user", "a"), ("assistant", None)], template, tokenizer).input_ids
    encoded = encode_turns([("user", disarmed), ("assistant", None)], template, tokenizer).input_ids
    special = [-200, *(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)]
    assert [int(token) for token in encoded if token in special] == [int(token) for token in plain if token in special]
    assert not any(mark in disarmed for mark in ("<image>", template.end.strip()))
