"""What a text answers after its thinking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.thinking import after_thinking

ANSWERS = st.text().filter(lambda text: "think" not in text.lower() and "thought" not in text.lower())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("No", "No"),
        (" No\n", " No\n"),  # as it is
        ("<think>\nIs it? Yes.\n</think>\n\nNo", "No"),
        ("Is it? Yes.\n</think>\n\nNo", "No"),  # the chat template ended with the opening mark
        ("<think>a</think>b<think>c</think> d", "d"),
        ("<think>a</think>", ""),
        ("<think>\nIs it? Yes.", None),
        ("<think>a</think>b <think>c", None),
        ("<think>a</thi", None),
        ("[THINK]a[/THINK]b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("<thought>a", None),
        ("<seed:think>a</seed:think>b", "b"),
        ("I think so </p>", "I think so </p>"),
        ("", ""),
    ],
)
def test_what_follows_the_thinking(text: str, answer: str | None):
    assert after_thinking(text) == answer


@given(st.text(), ANSWERS, st.booleans())
def test_no_thought_is_an_answer(thought: str, answer: str, opened: bool):
    text = f"{'<think>' * opened}{thought}</think>{answer}"
    assert after_thinking(text) == answer.strip()
    assert after_thinking(answer) == answer
    assert after_thinking(f"{answer}<think>") is None
