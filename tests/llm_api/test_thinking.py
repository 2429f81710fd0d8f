"""What a text answers after its thinking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.llm_api.thinking import after_thinking, says_nothing

NAMES = ("think", "thought", "reasoning", "channel")
ANSWERS = st.text().filter(lambda text: not any(name in text.lower() for name in NAMES))


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
        ("<reasoning>a</reasoning>\nb", "b"),
        ("<think>a</think >b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("<|channel|>analysis<|message|>a", None),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|>b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
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


@pytest.mark.parametrize("text", ["", " \n", "\u200b", "\ufeff\u3000\u00ad", "\u2060 \t"])
def test_what_cannot_be_seen_says_nothing(text: str):
    assert says_nothing(text) and not says_nothing(text + "é") and not says_nothing("。")
