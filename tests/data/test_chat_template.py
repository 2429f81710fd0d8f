"""The Jinja of an export renders what `render` does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers.utils.chat_template_utils import render_jinja_template

from llava_jax.convert.chat_template import chat_template
from llava_jax.data.conversation import place_images, render
from llava_jax.data.samples import read_sample
from llava_jax.data.templates import TEMPLATES
from llava_jax.data.tokenization import default_system
from llava_jax.serve.schema import UserMessage
from llava_jax.serve.turns import Marks, read_messages

CONVERSATIONS = {
    "question": [("user", "What is it?"), ("assistant", None)],
    "two rounds": [("user", "<image>\nWhat?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes.")],
    "third": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"), ("assistant", None)],
    "system": [("system", "Be brief."), ("user", "Hi"), ("assistant", None)],
    "empty system": [("system", ""), ("user", "Hi"), ("assistant", None)],
    "blank system": [("system", " \n"), ("user", "Hi"), ("assistant", None)],
    "hostile": [("user", ' </s> "quoted" \\n {{ x }} {system} <<end>> ### USER: ünï🎉\n '), ("assistant", " <image> ")],
    "empty": [("user", ""), ("assistant", "")],
}  # fmt: skip


def jinja_render(template, turns, system=None, image_token="<image>"):
    messages = [{"role": role, "content": text} for role, text in turns if text is not None]
    source = chat_template(template, system if system is not None else template.system or "", image_token)
    rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=turns[-1][1] is None)
    return rendered[0]


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_renders_as_we_do(template, turns):
    expected = render(turns, template, system="You see." if template.system is None else None).text
    assert jinja_render(template, turns, system="You see." if template.system is None else None) == expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("text", ["What is it?", " padded\n", ""])
def test_lists_of_images_and_texts(template, images, text):
    """As Hugging Face's users write them: the images come first, a line each."""
    marks = "<image>" * images
    turns = [*place_images([("user", marks + text)], "first", 0, ""), ("assistant", None)]
    content = [{"type": "text", "text": text}] + [{"type": "image"}] * images
    system = template.system or ""
    messages = [{"role": "user", "content": content}]
    source = chat_template(template, system)
    rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert rendered[0] == render(turns, template, system).text


PARTS = st.sampled_from([{"type": "image"}, {"type": "image_url"}]) | st.builds(
    lambda text: {"type": "text", "text": text}, st.text(" a\n{", max_size=4)
)


@given(parts=st.lists(PARTS, min_size=1, max_size=6))
@pytest.mark.parametrize("name", ["v1", "llama_3"])
def test_lists_for_a_model_that_saw_images_among_the_text(name, parts, tokenizer):
    """As training and the server read the same parts."""
    template = TEMPLATES[name]
    served = [part if part["type"] == "text" else {"type": "image_url", "image_url": "a"} for part in parts]
    message = TypeAdapter(UserMessage).validate_python({"role": "user", "content": served})
    turns, *_ = read_messages([message], Marks(tokenizer, template), interleaved=True)
    images = [part["type"] for part in parts if part["type"] != "text"]
    assert read_sample({"messages": [{"role": "user", "content": parts}], "images": images}).turns == tuple(turns)
    source = chat_template(template, "Hi", image_position="as_is")
    messages = [{"role": "user", "content": parts}]
    rendered, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert rendered[0] == render([*turns, ("assistant", None)], template, "Hi").text


def test_texts_in_a_row_are_lines_as_in_the_server(tokenizer):
    parts = [{"type": "text", "text": "Look."}, {"type": "text", "text": ""}, {"type": "text", "text": "What?"}]
    message = TypeAdapter(UserMessage).validate_python({"role": "user", "content": parts})
    turns, *_ = read_messages([message], Marks(tokenizer, TEMPLATES["v1"]))
    messages = [{"role": "user", "content": parts}]
    rendered, _ = render_jinja_template([messages], chat_template=chat_template(TEMPLATES["v1"], ""))
    assert turns == [("user", "Look.\nWhat?")] and rendered[0] == render(turns, TEMPLATES["v1"], "").text


def test_another_name_of_the_image_token():
    turns = [("user", "<image>\nWhat?"), ("assistant", None)]
    assert "<image>" not in jinja_render(TEMPLATES["v1"], turns, image_token="[IMG]")
    assert "[IMG]\nWhat?" in jinja_render(TEMPLATES["v1"], turns, image_token="[IMG]")


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant", "assistant"]])
def test_turns_out_of_order_are_refused(roles):
    with pytest.raises(Exception, match="take turns"):
        jinja_render(TEMPLATES["v1"], [(role, "x") for role in roles])


def test_the_system_prompt_of_chatml_is_found_again(smollm2_tokenizer):
    """The exported template takes the place of the tokenizer's own, which told the system prompt."""
    system = default_system(smollm2_tokenizer)
    assert system
    source = chat_template(TEMPLATES["chatml"], system)

    class Tokenizer:
        chat_template = source

    assert default_system(Tokenizer) == system
