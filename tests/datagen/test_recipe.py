"""What is asked next, and the verdicts."""

from pathlib import Path

import pytest

from llava_jax.cli import UserError
from llava_jax.datagen.contexts import Box, Context
from llava_jax.datagen.instructions import DETAILED
from llava_jax.datagen.prompts import OURS, Prompts, load_prompts
from llava_jax.datagen.recipe import KINDS, Recipe, Verdict, next_step
from llava_jax.llm_api.ledger import ACCEPTED, Answer

CONTEXT = Context("7", "a.jpg", ("A cat.", "A cat sleeps."), (Box("cat", 0.1, 0.2, 0.3, 0.4),))
GOOD = "Question:\nWhat?\n===\nAnswer:\nA cat."


def recipe(kind: str = "conversation", **more: object) -> Recipe:
    return Recipe(kind, load_prompts(OURS / kind), boxes=kind != "conversation", **more)


def answer(text: str, finish_reason: str = "stop") -> Answer:
    return Answer(text, finish_reason, 10, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_system_examples_and_query(kind: str):
    request = next_step(recipe(kind), CONTEXT, [])
    shots = recipe(kind).prompts.shots
    assert (request.task, request.attempt) == ("7", 0)
    assert [message["role"] for message in request.messages] == ["system", *["user", "assistant"] * len(shots), "user"]
    assert request.messages[-1]["content"] == CONTEXT.text(boxes=kind != "conversation")
    assert [message["content"] for message in request.messages[1:-1]] == [text for shot in shots for text in shot]


def test_good_answers_are_accepted():
    step = next_step(recipe(), CONTEXT, [answer(GOOD)])
    assert step == Verdict(ACCEPTED, turns=(("What?", "A cat."),), attempts=(ACCEPTED,))
    instructions = {
        next_step(recipe("detail", seed=seed), CONTEXT, [answer("A cat.")]).turns[0][0] for seed in range(100)
    }
    assert instructions <= set(DETAILED) and len(instructions) > 10


def test_bad_answers_are_asked_for_again_then_rejected():
    answers = []
    for attempt, text in enumerate(("A cat.", "Question:\nWhat?")):
        answers.append(answer(text))
        request = next_step(recipe(), CONTEXT, answers)
        assert request.attempt == attempt + 1
        told, complaint = request.messages[-2:]
        assert told == {"role": "assistant", "content": text} and "form" in complaint["content"]
    assert next_step(recipe(), CONTEXT, [*answers, answer(GOOD)]).attempts == ("wrong-form", "wrong-form", ACCEPTED)
    verdict = next_step(recipe(), CONTEXT, [*answers, answer("I'm sorry, but I can't.")])
    assert verdict.reason == "refusal" and verdict.attempts == ("wrong-form", "wrong-form", "refusal")
    assert next_step(recipe(attempts=1), CONTEXT, answers[:1]).reason == "wrong-form"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (answer(GOOD, "length"), "cut-off"),
        (answer(GOOD, "content_filter"), "refusal"),
        (answer(""), "empty"),
        (answer(GOOD.replace("A cat.", "The captions say so.")), "mentions-context"),
        (answer(GOOD.replace("A cat.", "A <image> cat.")), "marks"),
        (
            answer(GOOD.replace("A cat.", "Eine Katze schläft auf dem Sofa, und ein Hund sitzt daneben.")),
            "wrong-language",
        ),
    ],
)
def test_every_fault_is_explained_to_the_model(given: Answer, reason: str):
    assert next_step(recipe(attempts=1), CONTEXT, [given]).reason == reason
    first, again = next_step(recipe(), CONTEXT, []), next_step(recipe(), CONTEXT, [given])
    assert again.messages[: len(first.messages)] == first.messages
    if given.text:
        assert "{" not in again.messages[-1]["content"]
    else:
        assert again.messages == first.messages  # servers take no empty message


def test_a_directory_of_prompts(tmp_path: Path):
    (tmp_path / "system_message.txt").write_text("Write.\n")
    for i in (0, 1):
        (tmp_path / f"00{i}_caps.txt").write_text(f"Captions {i}")
        (tmp_path / f"00{i}_conv.txt").write_text(f"Answer {i}")
    assert load_prompts(tmp_path) == Prompts("Write.", (("Captions 0", "Answer 0"), ("Captions 1", "Answer 1")))
    identity = recipe()._replace(prompts=load_prompts(tmp_path)).identity()
    assert identity != recipe().identity() and {**identity, "prompts": ""} == {**recipe().identity(), "prompts": ""}
    (tmp_path / "002_conv.txt").write_text("Answer 2")
    with pytest.raises(UserError, match="002_conv.txt: has no 002_caps.txt"):
        load_prompts(tmp_path)
    (tmp_path / "000_conv.txt").unlink()
    with pytest.raises(UserError, match="000_conv.txt: No such file"):
        load_prompts(tmp_path)
    with pytest.raises(UserError, match="system_message.txt"):
        load_prompts(tmp_path / "none")
