"""Answers to turns, and what is wrong with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.data.samples import read_sample
from llava_jax.datagen.parsing import Fault, parse_conversation, parse_detail, parse_reasoning
from llava_jax.datagen.prompts import OURS, load_prompts
from llava_jax.datagen.rules import REPAIRS, detect_language, find_fault, find_refusal

TWO = "Question:\nWhat is it?\n===\nAnswer:\nA cat.\nIt sleeps.\n===\nQuestion:\nWhere?\n===\nAnswer:\nOn a mat."


def test_forms_of_the_authors():
    assert parse_conversation(TWO) == (("What is it?", "A cat.\nIt sleeps."), ("Where?", "On a mat."))
    assert parse_conversation(f"\n {TWO}\n===\n") == parse_conversation(TWO)
    assert parse_conversation(TWO.replace(":\n", ": ")) == parse_conversation(TWO)
    assert parse_reasoning("Question:\nWhy?\n===\nAnswer:\nSo.") == (("Why?", "So."),)
    assert parse_detail(" A cat.\n\nIt sleeps. ", "Describe it.") == (("Describe it.", "A cat.\n\nIt sleeps."),)


@pytest.mark.parametrize("kind", ["conversation", "reasoning", "detail"])
def test_our_own_examples_pass(kind: str):
    parse = {"conversation": parse_conversation, "reasoning": parse_reasoning, "detail": lambda t: parse_detail(t, "Q")}
    prompts = load_prompts(OURS / kind)
    assert len(prompts.shots) == (2 if kind == "conversation" else 3)
    for context, answer in prompts.shots:
        turns = parse[kind](answer)
        assert not isinstance(turns, Fault) and find_fault(turns, "en") is None
        assert ("\n\n" in context) == (kind != "conversation")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("===", "wrong-form"),
        ("Question:\n\n===\nAnswer:\nA cat.", "empty"),
        ("Question:\nWhat?\n===\nAnswer:", "empty"),
        ("A cat sleeps.", "wrong-form"),
        ("Question:\nWhat?", "wrong-form"),
        ("Answer:\nA cat.\n===\nQuestion:\nWhat?", "wrong-form"),
        ("Question:\nWhat?\nAnswer:\nA cat.", "wrong-form"),
        ("Question:\nWhat?\n\n**Answer:**\nA cat.", "wrong-form"),
        ("Question:\nWhat?\n===\nQuestion:\nWhere?\n===\nAnswer:\nA cat.", "wrong-form"),
        ("Sure! Here you are:\n" + TWO, "wrong-form"),
        (TWO + "\n===\nI hope this helps!", "wrong-form"),
        ("**Question:**\nWhat?\n===\n**Answer:**\nA cat.", "wrong-form"),
    ],
)
def test_other_forms_are_rejected(text: str, reason: str):
    fault = parse_conversation(text)
    assert isinstance(fault, Fault) and fault.reason == reason


def test_one_question_is_asked_for_or_none():
    assert parse_reasoning(TWO).reason == "wrong-form"
    assert parse_detail(TWO, "Q").reason == "wrong-form"
    assert parse_detail("\n", "Q").reason == "empty"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip)
pieces = st.lists(
    st.sampled_from(["Question:", "Answer:", "===", "\n", " ", "a", "=", "Question", ":", "**"]) | st.text()
)


@given(pieces.map("".join))
def test_any_text_gives_turns_or_a_fault(text: str):
    for turns in (parse_conversation(text), parse_reasoning(text), parse_detail(text, "Q")):
        if isinstance(turns, Fault):
            assert turns.reason in REPAIRS
        else:
            assert turns and all(part.strip() == part != "" for turn in turns for part in turn)
            assert find_fault(turns, None) is None or find_fault(turns, None).reason in REPAIRS


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_what_is_written_in_the_form_is_read_back(turns: list[tuple[str, str]]):
    if any(not part or "==" in part or ":" in part for turn in turns for part in turn):
        return
    text = "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in turns)
    assert parse_conversation(text) == tuple(turns)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("A cat <image> sleeps.", "marks"),
        ("A cat sleeps.</s>", "marks"),
        ("A cat sleeps.<|im_end|>", "marks"),
        ("A cat sleeps. [/INST]", "marks"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("As an AI language model, I see a cat.", "refusal"),
        ("I cannot see the picture.", "refusal"),
        ("I am unable to view images.", "refusal"),
        ("According to the captions, a cat sleeps.", "mentions-context"),
        ("Based on the provided descriptions, a cat sleeps.", "mentions-context"),
        ("The bounding box shows a cat.", "mentions-context"),
        ("A cat is at [0.12, 0.3, 0.5, 0.6].", "mentions-context"),
        ("The cat's left edge is at 0.125 of the width.", "mentions-context"),
        ("The sentences say that a cat sleeps.", "mentions-context"),
        ("The colour of the cat is not mentioned.", "mentions-context"),
        ("A cat sleeps on the", "cut-off"),
        ("Eine graue Katze schläft auf einer Matte vor dem Fenster, und draußen regnet es.", "wrong-language"),
        (
            "猫が窓の前のマットの上で寝ていて、外では雨が降っています。部屋の中は暖かそうで、とても気持ちよさそうに見えます。",
            "wrong-language",
        ),
    ],
)
def test_faults_have_names(answer: str, reason: str):
    assert find_fault((("What is it?", answer),), "en").reason == reason


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("<img>\nWhat is it?", "A cat."),
        ("[IMG]\nWhat is it?", "A cat."),
        ("What is in <image1>?", "A cat."),
        ("What is it?", "<image_placeholder> A cat."),
        ("What is it?", "<img>cat.jpg</img> A cat."),
    ],
)
def test_marks_that_no_reader_of_samples_takes_are_faults(question: str, answer: str):
    value = {"image": "a.jpg", "conversations": [{"from": "human", "value": f"<image>\n{question}"},
                                                 {"from": "gpt", "value": answer}]}  # fmt: skip
    assert read_sample(value).faults
    assert find_fault(((question, answer),), "en").reason == "marks"


@pytest.mark.parametrize(
    "answer",
    [
        "A cat sleeps in a cardboard box next to a list of groceries.",
        "The text on the sign says 'Stop'.",
        "The man looks sorry and cannot see the dog behind him.",
        "A receipt over $0.50 lies there.",
        "She is given flowers. The scene can be described as calm (it is evening).",
        "Un.",
        'He might say "Wait!"',
        "A man writes a sentence on a blackboard.",
    ],
)
def test_good_answers_have_none(answer: str):
    assert find_fault((("What is it?", answer),), "en") is None


def test_marks_in_questions_are_found_and_languages_can_be_chosen():
    assert find_fault((("What is <image>?", "A cat."),), "en").reason == "marks"
    german = "Eine graue Katze schläft auf einer Matte vor dem Fenster, und draußen regnet es."
    assert find_fault((("Was?", german),), "de") is None and find_fault((("Was?", german),), None) is None
    assert detect_language("Ja.") is None
    assert find_refusal("Sorry, I can't do that.") and not find_refusal("He says sorry.")
