"""The VQA challenges' normalisation, against their code's logic written down again, mark by mark."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.evaluate.vqa_answers import CONTRACTIONS, NUMBERS, official, soft_accuracy, submitted

PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]


def reference_marks(text: str, comma: str) -> str:
    out = text
    for mark in PUNCTUATION:
        if (mark + " " in text or " " + mark in text) or re.search(comma, text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, int(re.UNICODE))  # the flag stands where the count goes


def reference_words(text: str) -> str:
    out = []
    for word in text.lower().split():
        word = NUMBERS.get(word, word)
        if word not in ["a", "an", "the"]:
            out.append(word)
    return " ".join(CONTRACTIONS.get(word, word) for word in out)


def reference_official(text: str) -> str:
    return reference_words(reference_marks(text.replace("\n", " ").replace("\t", " ").strip(), r"(\d)(\,)(\d)"))


def reference_submitted(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return reference_words(reference_marks(text.replace("\n", " ").replace("\t", " ").strip(), r"(?<=\d)(\,)+(?=\d)"))


texts = st.text(alphabet="aAthe two.,0159'-/ \n\t?!s" + string.punctuation, max_size=30) | st.lists(
    st.sampled_from(["The", "none", "dont", "youre", "two", "1,000", "2.5", "e.g.", "dog's", "a/b", "x -y", "." * 40])
).map(" ".join)  # fmt: skip


@given(texts)
def test_normalisation_is_the_challenges(text: str):
    assert official(text) == reference_official(text)
    assert submitted(text) == reference_submitted(text)


@pytest.mark.parametrize(("text", "as_official", "as_submitted"), [
    ("The Two dogs.", "2 dogs", "2 dogs"),
    ("1,000", "1000", "1000"),
    ("2.5", "2.5", "2.5"),
    ("black-and-white", "black and white", "black and white"),
    ("black -white", "black white", "black white"),
    ("the dog's", "dog's", "dog 's"),
    ("dont", "don't", "don't"),
    ("none", "0", "0"),
    ("." * 33, ".", "."),  # the 33rd full stop stays
])  # fmt: skip
def test_known_answers(text, as_official, as_submitted):
    assert (official(text), submitted(text)) == (as_official, as_submitted)


def test_tables_are_whole():
    assert CONTRACTIONS["somebody'd"] == "somebodyd" and CONTRACTIONS["Im"] == "I'm"
    assert NUMBERS["none"] == NUMBERS["zero"] == "0" and NUMBERS["ten"] == "10" and len(NUMBERS) == 12


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=10), st.sampled_from("abcd"))
def test_soft_accuracy_leaves_out_each_in_turn(people: list[str], answer: str):
    turns = [min(1, sum(other == answer for j, other in enumerate(people) if j != i) / 3) for i in range(len(people))]
    assert soft_accuracy(answer, people) == pytest.approx(sum(turns) / len(turns))
