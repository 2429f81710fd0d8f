"""Templates against the texts that published code trains on and the chat templates that tokenizers carry."""

import pytest
import qwen3
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.data.conversation import (
    check_system,
    check_thoughts,
    has_interleaved_images,
    place_images,
    place_prompt_images,
    render,
)
from llava_jax.data.templates import TEMPLATES, choose_template, get_template, stop_strings, with_im_start_end

POLITE_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
POLITE_HUMAN = POLITE_USER.replace("user", "human")
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
VISUAL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
LLAMA_2_START = "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as "
LLAMA_2_END = (
    "please don't share false information.\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>"
)
TURNS = [("user", "<image>\nq1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]

V0 = "\n\n### Human: {image}\nq1\n### Assistant: a1\n### Human: q2\n### Assistant: a2\n### "
V1 = " USER: {image}\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
MPT = (
    "<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image>\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
    "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>"
)
PUBLISHED = {
    "v0": POLITE_HUMAN + V0.format(image="<image>"),
    "llava_v0": POLITE_HUMAN + V0.format(image="<image>"),
    "v0_mmtag": MMTAG + V0.format(image="<Image><image></Image>"),
    "v1": POLITE_USER + V1.format(image="<image>"),
    "vicuna_v1": POLITE_USER + V1.format(image="<image>"),
    "llava_v1": POLITE_HUMAN + V1.format(image="<image>"),
    "v1_mmtag": MMTAG + V1.format(image="<Image><image></Image>"),
    "llava_llama_2": f"[INST] <<SYS>>\n{VISUAL}\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
    "mistral_instruct": "[INST] <image>\nq1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>",
    "mpt": MPT.format(
        system="A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers."
    ),
    "chatml_direct": MPT.format(system="Answer the questions."),
    "gemma": "<start_of_turn>user\n<image>\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
    "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n",
    "plain": "<image>a1\na2\n",
}

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["", "\n", " a ", "</s>", "###", "USER: hi", "{system}", "<image>\nwhat?"]
)
rounds = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def as_turns(pairs):
    return [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text(name):
    assert render(TURNS, get_template(name)).text == PUBLISHED[name]


def test_published_text_of_llama_2():
    text = render(TURNS, get_template("llama_2")).text
    assert text.startswith(LLAMA_2_START) and text.endswith(LLAMA_2_END)
    assert "while being safe.  Your answers should not include" in text and "positive in nature.\n\nIf a" in text


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=rounds, opened=st.booleans())
def test_spans_are_the_answers_and_their_end_marks(name, pairs, opened):
    template = get_template(name)
    turns = as_turns(pairs) + [("user", "q"), ("assistant", None)] * opened
    text, spans = render(turns, template)
    answers = [answer.strip() if template.strip else answer for _, answer in pairs]
    assert [text[start:end].replace(template.image, "<image>") for start, end in spans] == [
        template.lead + answer + template.end for answer in answers
    ]
    assert all(template.end.endswith(stop) or stop == template.end for stop in stop_strings(template))


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=rounds)
def test_a_prompt_is_the_beginning_of_its_training_text(name, pairs):
    template, turns = get_template(name), as_turns(pairs)
    prompt = render([*turns[:-1], ("assistant", None)], template).text
    text, spans = render(turns, template)
    assert text.startswith(prompt) and spans[-1][0] == len(prompt)


@pytest.mark.parametrize(("name", "jinja"), [("llama_3", LLAMA_3), ("zephyr", ZEPHYR)])
@given(pairs=rounds, system=st.none() | texts.filter(str.strip), opened=st.booleans())
def test_equals_the_published_chat_template(llama_tokenizer, name, jinja, pairs, system, opened):
    turns = as_turns(pairs) if system is None else [("system", system), *as_turns(pairs)]
    messages = [{"role": role, "content": text} for role, text in turns]
    turns += [("user", "q"), ("assistant", None)] * opened
    messages += [{"role": "user", "content": "q"}] * opened
    reference = llama_tokenizer.apply_chat_template(
        messages, chat_template=jinja, tokenize=False, add_generation_prompt=opened
    )
    assert render(turns, get_template(name)).text == reference.removeprefix("<s>")


BLOCK = "<think>\n\n</think>\n\n"


@given(pairs=rounds, system=st.none() | texts.filter(str.strip), opened=st.booleans())
def test_qwen3_equals_its_chat_template_with_thinking_off(llama_tokenizer, pairs, system, opened):
    """The one difference: here an empty block of thoughts stands before earlier answers, too."""
    pairs = [(question, answer.lstrip("\n")) for question, answer in pairs]
    turns = as_turns(pairs) if system is None else [("system", system), *as_turns(pairs)]
    turns += [("user", "q"), ("assistant", None)] * opened
    template, messages = get_template("qwen3"), [{"role": r, "content": t} for r, t in turns if t is not None]
    rendered = llama_tokenizer.apply_chat_template(
        messages, chat_template=qwen3.CHAT_TEMPLATE, tokenize=False, add_generation_prompt=opened, enable_thinking=False
    )
    text, spans = render(turns, template)
    assert text.count(template.reply) == len(spans) + opened + "".join(t for _, t in turns if t).count(template.reply)
    without = text
    for start, _ in reversed(spans if opened else spans[:-1]):
        assert text[:start].endswith(BLOCK)
        without = without[: start - len(BLOCK)] + without[start:]
    assert without == rendered


def test_answers_with_thoughts_are_refused_where_the_template_says_there_are_none():
    turns = [("user", "q <think>"), ("assistant", "<think>\nHm.\n</think>\n\nA cat.")]
    check_thoughts(turns, get_template("chatml"))
    check_thoughts([turns[0], ("assistant", "A cat.")], get_template("qwen3"))
    with pytest.raises(UserError, match="an answer has <think> or </think>, but template qwen3 opens .* chatml"):
        check_thoughts(turns, get_template("qwen3"))


def test_a_system_turn_comes_before_every_default():
    turns = [("system", "Be brief."), *TURNS]
    assert render(turns, get_template("v1"), "other").text == "Be brief." + V1.format(image="<image>")
    assert render(TURNS, get_template("v1"), "").text == V1.format(image="<image>").lstrip()


def test_im_start_end_stands_next_to_the_image():
    template = get_template("v1_mmtag")
    assert "USER: <Image><im_start><image><im_end></Image>\nq1" in render(TURNS, with_im_start_end(template, True)).text
    assert with_im_start_end(template, False) is template


def test_images_first():
    turns = [("user", " look at <image>\n and <image> "), ("assistant", "a"), ("user", "<image>"), ("user", "q ")]
    assert place_images(turns, "first", 0, "id") == (
        ("user", "<image>\n<image>\nlook at \n and"),
        ("assistant", "a"),
        ("user", "<image>"),
        ("user", "q "),
    )
    assert place_images(turns, "as_is", 0, "id") == tuple(turns)


def test_images_of_a_prompt_stand_where_the_model_saw_them():
    turns = [("system", "<b>"), ("user", " at <image>\n and <image> "), ("assistant", "a"), ("user", "<image>\n  q ")]
    assert place_prompt_images(turns, "as_is") == turns
    for position in ("first", "random"):
        placed = place_prompt_images(turns, position)
        assert placed[1] == place_images(turns, "first", 0, "id")[1]
        assert [placed[i] for i in (0, 2, 3)] == [turns[i] for i in (0, 2, 3)]  # whose text keeps its white space


def test_random_order_is_even_and_a_function_of_seed_and_id():
    turns = [("user", "<image>\nq"), ("assistant", "a"), ("user", "q2\n<image>")]
    placed = [place_images(turns, "random", 3, str(i)) for i in range(400)]
    assert placed == [place_images(turns, "random", 3, str(i)) for i in range(400)]
    assert {turns[0][1] for turns in placed} == {"<image>\nq", "q\n<image>"}
    assert 150 < sum(turns[0][1].startswith("q") for turns in placed) < 250
    assert {turns[2][1] for turns in placed} == {"<image>\nq2"}
    assert placed != [place_images(turns, "random", 4, str(i)) for i in range(400)]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("assistant", "a")], "turn 1"),
        ([("user", "q"), ("user", "q")], "turn 2"),
        ([("user", "q"), ("system", "s")], "turn 2"),
        ([("user", None)], "turn 1 has no text"),
        ([("user", "q"), ("assistant", None), ("user", "q")], "turn 2 has no text"),
    ],
)
def test_turns_out_of_order(turns, message):
    with pytest.raises(UserError, match=message):
        render(turns, get_template("v1"))


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="did you mean vicuna_v1"):
        get_template("vicunav1")
    with pytest.raises(UserError, match="choose from v0, llava_v0"):
        get_template("?")
    with pytest.raises(UserError, match="choose from random, first, as_is"):
        place_images(TURNS, "last", 0, "id")


def test_another_template_than_the_checkpoints_warns(capsys):
    assert choose_template(None, "v1") is choose_template("vicuna_v1", "v1") is get_template("v1")
    choose_template("v0", "llava_v0")
    assert not capsys.readouterr().err
    assert choose_template("llava_v1", "v1").name == "llava_v1"
    assert "template v1, not llava_v1" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "stop"), [("v0", "###"), ("v1", "</s>"), ("llama_2", "</s>"), ("plain", "\n")])
def test_stop_strings(name, stop):
    assert stop_strings(get_template(name)) == [stop]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_is_rendered_or_refused(name):
    turns = [("system", "Be brief."), *TURNS]
    template = get_template(name)
    try:
        check_system(turns, template)
    except UserError as error:
        assert name == "plain" and "template plain has no place for a system prompt" in str(error)
    else:
        assert "Be brief." in render(turns, template).text
    check_system(TURNS, template)
    check_system([("system", ""), *TURNS], template)


@pytest.mark.parametrize("seed", range(4))
def test_a_system_prompt_changes_no_place_of_an_image(seed):
    for position in ("first", "random", "as_is"):
        alone = place_images(TURNS, position, seed, "x")
        assert place_images([("system", "s"), *TURNS], position, seed, "x") == (("system", "s"), *alone)


@pytest.mark.parametrize(
    ("text", "interleaved"),
    [
        ("Source: <image>\nTarget: <image>\nWhat?", True),
        ("<image> and <image>", True),
        ("<image>\n<image>\nCompare", False),
        ("Compare <image>\n <image>", False),
        ("Before <image> after", False),
        ("none", False),
    ],
)
def test_text_between_images(text, interleaved):
    assert has_interleaved_images([("user", "q"), ("assistant", "a"), ("user", text)]) is interleaved
    assert not has_interleaved_images([("user", "<image>\nq"), ("assistant", "a"), ("user", "b\n<image>")])
