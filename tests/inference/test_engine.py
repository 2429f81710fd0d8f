"""Many answers at a time against one at a time, what is computed again and what is not, and how answers end."""

import dataclasses
import re
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.data.anyres import AnyRes
from llava_jax.inference import batch
from llava_jax.inference.answer import Answer, EngineClosed, EngineError, QueueFull
from llava_jax.inference.constraints import ConstraintFailed, Constraints
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import Generator
from llava_jax.inference.programs import CHUNK_SIZES, ENCODE, PIECE, PIECES
from llava_jax.inference.prompts import ContextExceeded, PromptEncoder
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import build
from tests.inference.test_generate import CONFIG, IMAGES, TEMPLATE, generator, params, question, tokenizer

SHORT = Sampling(max_new_tokens=12)
REPORTED = Sampling(max_new_tokens=12, logprobs=0)
LONG = Sampling(max_new_tokens=400)


def make(config: LlavaConfig = CONFIG, **options) -> Engine:
    model = build(config, jax.tree.map(jnp.copy, params()))
    return Engine(model, PromptEncoder(config, tokenizer(), TEMPLATE), **{"slots": 4, "queue": 200} | options)


def page_bytes(engine: Engine) -> int:
    return sum(entry.nbytes // len(entry) for entry in jax.tree.leaves(engine._programs.cache))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = make()
    assert not engine.ready
    engine.warm_up()
    assert engine.ready
    yield engine
    engine.close(drain=False)


def text(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


def collect(answer: Answer) -> tuple[str, list[float]]:
    """Its text, and the log probabilities of its tokens."""
    pieces = list(answer)
    return "".join(p.text for p in pieces), [entry.logprob for p in pieces for entry in p.token_logprobs]


def ask(engine: Engine, request: Request, sampling: Sampling = SHORT) -> str:
    return text(engine.submit(request, sampling))


def ragged(count: int) -> list[Request]:
    """Prompts of 30 to 300 tokens with no, one or two pictures, alone or after an answer."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(count):
        words = rng.choice(["red", "white", "What colour", "🦙", "Is it", "\n", "blue?"], rng.integers(1, 60))
        images = [IMAGES[i] for i in rng.integers(0, len(IMAGES), rng.integers(0, 3))]
        marks = "<image>\n" * len(images)
        turns = [("user", marks + " ".join(words))]
        if rng.random() < 0.3:
            turns += [("assistant", "It is red."), ("user", " ".join(words[:5]))]
        requests.append(Request(turns, images))
    return requests


def test_200_ragged_prompts_are_answered_together_as_one_by_one(engine):
    requests, sampling = ragged(200), Sampling(max_new_tokens=8, logprobs=0)

    together = [collect(answer) for answer in [engine.submit(request, sampling) for request in requests]]
    alone = [collect(engine.submit(request, sampling)) for request in requests]
    assert [text for text, _ in together] == [text for text, _ in alone]
    for (_, logprobs), (_, others) in zip(together, alone, strict=True):
        np.testing.assert_allclose(logprobs, others, rtol=0, atol=1e-5)
    assert len({text for text, _ in alone}) > 100


def test_answers_wait_for_pages_and_stay_the_same(engine):
    """Three slots with three pages of 256 positions, where two answers need two each: one waits, between two tokens or
    before its prompt."""
    small = make(slots=3, cache_bytes=3 * page_bytes(engine))
    small.warm_up()
    assert small.stats().pages == 3 < engine.stats().pages == 12
    sampling = Sampling(max_new_tokens=150, ignore_eos=True)
    requests = [question("🦙 " * number) for number in (30, 29, 12)] + ragged(9)
    lengths = [len(engine.prepare(request).tokens) for request in requests]
    assert sum(length <= 256 < length + 150 for length in lengths) >= 2
    used, decode = [], small._programs.decode

    def watched(slots, *rest):
        used.append((small.stats().pages_used, (slots.positions < small._programs.positions).sum(), small.stats().busy))
        return decode(slots, *rest)

    small._programs.decode = watched
    together = [text(answer) for answer in [small.submit(request, sampling) for request in requests]]
    assert together == [ask(engine, request, sampling) for request in requests]
    assert max(pages for pages, *_ in used) == 3 and any(computed < busy for _, computed, busy in used)
    assert small.stats().pages_used == 0
    small.close()


LONGER = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, max_position_embeddings=2048))


def wait_for_all(engine: Engine, seconds: float = 120.0) -> None:
    """Waits until all answers have ended."""
    began = time.monotonic()
    while engine.stats().busy + engine.stats().queued:
        assert time.monotonic() - began < seconds, "answers wait for each other"
        time.sleep(0.01)
    assert not engine.stats().failed


@pytest.mark.parametrize("seed", range(2))
def test_no_answer_waits_forever(engine, seed):
    """Random prompts, some of which continue or repeat others, on as few pages as eight slots can have. Prompts are
    joined wherever they may be, and some answers are cancelled."""
    small = make(LONGER, slots=8, cache_bytes=9 * page_bytes(engine))
    small._programs.joins = set(CHUNK_SIZES)
    rng, texts = np.random.default_rng(seed), []
    for _ in range(60):
        begun = texts[rng.integers(len(texts))] if texts and rng.random() < 0.5 else ""
        texts.append((begun + "".join(rng.choice(list("abc \n"), rng.integers(1, 700))))[:1100])
    answers = [
        small.submit(question(text), Sampling(max_new_tokens=int(rng.integers(1, 600)), ignore_eos=True))
        for text in texts
    ]
    for answer in rng.choice(answers, 5):
        answer.cancel()
    wait_for_all(small)
    for answer in answers:
        assert answer.finish_reason == "cancelled" or answer.completion_tokens == answer.sampling.max_new_tokens
    assert small.stats().pages == 9 and small.stats().pages_used == 0
    small.close()


def test_an_answer_that_waits_for_a_page_gets_it_before_new_prompts(engine):
    """A long one beside many short ones, which take the other pages until the queue is empty."""
    small = make(LONGER, slots=8, context=1024, cache_bytes=8 * page_bytes(engine))
    ended: list[int] = []

    def submit(number: int, most: int) -> None:
        def sink(piece: object) -> None:
            if piece is None:
                ended.append(number)

        small.submit(question(str(number)), Sampling(max_new_tokens=most, ignore_eos=True), sink)

    for number in range(120):
        submit(number, 100 if number else 900)
    wait_for_all(small)
    assert ended.index(0) < 0.8 * len(ended)
    small.close()


def test_memory_that_is_too_small_for_one_answer_is_refused():
    with pytest.raises(
        UserError, match=r"^512 positions take .* GB .* at least, .* lower --context or raise --cache-mb$"
    ):
        make(slots=1, cache_bytes=1)


def test_answers_are_those_of_the_generator(engine):
    requests = ragged(12)
    answers = [engine.submit(request, SHORT) for request in requests]
    assert [text(answer) for answer in answers] == generator().answer(requests, SHORT)
    sampled = Sampling(temperature=1.3, top_p=0.9, top_k=50, seed=5, max_new_tokens=12)
    assert ask(engine, requests[0], sampled) == generator().answer(requests[:1], sampled)[0]


def test_each_answer_is_sampled_in_its_own_way(engine):
    request = question("<image>\nWhat colour is it?", IMAGES[0])
    ways = [
        Sampling(max_new_tokens=n, temperature=t, seed=s) for n, t, s in [(9, 0, 0), (5, 1, 1), (9, 1, 1), (9, 1, 2)]
    ]
    alone = [ask(engine, request, way) for way in ways]
    together = [text(answer) for answer in [engine.submit(request, way) for way in ways]]
    assert together == alone
    assert len(set(alone)) == 4 and alone[2].startswith(alone[1])
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):
        assert ask(engine, request, Sampling(max_new_tokens=9, temperature=2.0, **limit)) == alone[0]


def test_stop_strings_end_an_answer_wherever_tokens_end(engine):
    request = question("<image>\nWhat colour is it?", IMAGES[0])
    whole = ask(engine, request, Sampling(max_new_tokens=40))
    for start in (4, 9, 15):
        stop = whole[start : start + 5].strip()
        answer = engine.submit(request, Sampling(max_new_tokens=40, stop=("never this", stop)))
        assert text(answer) == whole[: whole.index(stop)].strip()
        assert answer.finish_reason == "stop" and answer.completion_tokens < 40


def test_the_next_turn_computes_neither_earlier_turns_nor_the_picture_again(engine, monkeypatch):
    first = question("<image>\nWhat colour is it? " + "white " * 40, Image.new("RGB", (20, 20), (3, 7, 9)))
    encoded = []
    encode = engine._programs.encode
    monkeypatch.setattr(engine._programs, "encode", lambda *arguments: (encoded.append(1), encode(*arguments)))
    before = engine.stats()
    answer = ask(engine, first)
    follow_up = Request([*first.turns, ("assistant", answer), ("user", "Why?")], first.images)
    second = engine.submit(follow_up, REPORTED)
    reused, logprobs = collect(second)
    assert len(encoded) == 1
    length = len(engine.prepare(first).tokens)
    assert length - 2 <= second.prefix_tokens < second.prompt_tokens
    assert engine.stats().prefix_tokens - before.prefix_tokens >= length - 2
    assert reused == generator().answer([follow_up], SHORT)[0]
    engine.clear_caches()
    anew = engine.submit(follow_up, REPORTED)
    text_anew, logprobs_anew = collect(anew)
    assert anew.prefix_tokens == 0 and text_anew == reused
    np.testing.assert_allclose(logprobs, logprobs_anew, rtol=0, atol=1e-5)


def test_another_picture_is_another_prefix(engine):
    requests = [question("<image>\nWhat colour is it?", picture) for picture in IMAGES]
    answers = [engine.submit(request, SHORT) for request in requests]
    before_picture = int(np.argmax(generator().prompts.encode(requests[0]).image_feature_index >= 0))
    assert [text(answer) for answer in answers] == generator().answer(requests, SHORT)
    again = engine.submit(requests[2], SHORT)
    assert text(again) == generator().answer(requests[2:3], SHORT)[0]
    assert again.prefix_tokens == again.prompt_tokens - 1
    assert all(answer.prefix_tokens >= before_picture - 1 for answer in answers[1:])


def test_cancelling_frees_the_slot_and_the_others_go_on(engine):
    before = engine.stats()
    answers = [engine.submit(question(f"Story {i}"), LONG) for i in range(4)]
    waiting = engine.submit(question("Hello"), SHORT)
    next(iter(answers[0]))
    answers[0].cancel()
    assert text(waiting) == generator().answer([question("Hello")], SHORT)[0]
    ended = [text(answer) is not None and answer.finish_reason for answer in answers]
    assert ended == ["cancelled", "length", "length", "length"]
    assert all(answer.completion_tokens == LONG.max_new_tokens for answer in answers[1:])
    after = engine.stats()
    assert after.cancelled - before.cancelled == 1 and after.busy == after.queued == 0


def test_who_is_cancelled_in_the_queue_or_in_a_prompt_never_begins(engine, monkeypatch):
    prefill, pieces, submitted = engine._programs.prefill, [], threading.Event()

    def prefill_one_and_cancel(*arguments):
        submitted.wait()
        pieces.append(arguments)
        reading.cancel()
        return prefill(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine._programs, "prefill", prefill_one_and_cancel)
        reading = engine.submit(question("🦙" * 100), SHORT)
        submitted.set()
        assert text(reading) == ""
    assert len(pieces) == 1 and reading.prompt_tokens > 256
    assert (reading.finish_reason, reading.completion_tokens) == ("cancelled", 0)

    running = [engine.submit(question(f"Story {i}"), LONG) for i in range(4)]
    waiting = engine.submit(question("Hello"), SHORT)
    waiting.cancel()
    assert text(waiting) == ""
    assert engine.stats().busy == 4 and waiting.finish_reason == "cancelled"
    for answer in running:
        answer.cancel()
    assert ask(engine, question("Hello")) == generator().answer([question("Hello")], SHORT)[0]


def test_one_prompt_asked_several_times_at_once_is_computed_once(engine, monkeypatch):
    encode, encoded, picture = engine._programs.encode, [], Image.new("RGB", (20, 20), (5, 9, 2))
    monkeypatch.setattr(engine._programs, "encode", lambda *arguments: (encoded.append(1), encode(*arguments)))
    request = question("<image>\nWhat colour is it? " + "white " * 60, picture)
    answers = [engine.submit(request, Sampling(1.0, seed=seed, max_new_tokens=12)) for seed in range(3)]
    texts = [text(answer) for answer in answers]
    assert len(encoded) == 1
    assert [answer.prefix_tokens for answer in answers[1:]] == [answers[0].prompt_tokens - 1] * 2
    assert texts == [generator().answer([request], answer.sampling)[0] for answer in answers]


@pytest.fixture
def prefills(engine, monkeypatch) -> list[tuple[int, int]]:
    """The shapes of the dispatches of `prefill`, whose first waits for the event in `started`."""
    shapes, prefill = [], engine._programs.prefill

    def counted(chunk, report):
        engine.reached.set()
        engine.started.wait()
        shapes.append(chunk.tokens.shape)
        return prefill(chunk, report)

    engine.reached, engine.started = threading.Event(), threading.Event()
    monkeypatch.setattr(engine._programs, "prefill", counted)
    return shapes


def test_prompts_that_wait_are_computed_in_one_dispatch(engine, prefills, monkeypatch):
    monkeypatch.setattr(engine._programs, "joins", set(CHUNK_SIZES))  # also where last bits are others

    def ask_together(*requests: Request) -> list[tuple[str, list[float]]]:
        engine.clear_caches()
        prefills.clear()
        engine.reached.clear()
        engine.started.clear()
        hello = engine.submit(question("Hello"), REPORTED)
        engine.reached.wait()  # else some of the others could enter the batch with it
        answers = [engine.submit(request, REPORTED) for request in requests]
        engine.started.set()
        collect(hello)
        return [collect(answer) for answer in answers]

    texts = ["It is white. " * 27, "What colour? " * 27, "Is it red or blue? " * 11]
    requests = [question(f"{number} {text}") for number, text in enumerate(texts)]
    together = ask_together(*requests)
    assert prefills[1:] == [(PIECES, PIECE), (1, 128)]  # two of them fit
    for request, (text, logprobs) in zip(requests, together, strict=True):
        ((alone, expected),) = ask_together(request)
        assert text == alone
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    images = [question(f"<image>\n{number} {text}", IMAGES[number]) for number, text in enumerate(texts)]
    beside_images = ask_together(*images)
    assert (PIECES, PIECE) in prefills
    assert [text for text, _ in beside_images] == [ask_together(request)[0][0] for request in images]
    several = ask_together(requests[0], requests[0], requests[1])  # what is asked twice is computed once
    assert [text for text, _ in several] == [together[0][0], together[0][0], together[1][0]]


def test_prompts_are_joined_only_where_that_gives_the_same_bits(engine, prefills):
    engine.started.set()
    programs, tokens = engine._programs, np.arange(100, dtype=np.int32)
    pieces = programs._probe_prompt((PIECES, PIECE), tokens)
    assert {size for size in CHUNK_SIZES if programs._probe_prompt((1, size), tokens) == pieces} == programs.joins
    engine.clear_caches()  # the probes wrote into them


def test_a_prepared_prompt_is_tokenized_and_its_images_are_read_once_for_all_answers(engine, monkeypatch):
    calls = []

    def counted(name):
        method = getattr(engine.base.prompts, name)
        return lambda *arguments: (calls.append(name), method(*arguments))[1]

    for name in ("encode", "read"):
        monkeypatch.setattr(engine.base.prompts, name, counted(name))
    prompt = engine.prepare(question("<image>\nIs it <image>?", IMAGES[0], IMAGES[1]))
    assert engine.room(prompt) > 12
    answers = [engine.submit(prompt, Sampling(1.0, seed=seed, max_new_tokens=12)) for seed in range(3)]
    texts = [text(answer) for answer in answers]
    assert calls == ["encode", "read", "read"]
    assert texts == [generator().answer([prompt.request], answer.sampling)[0] for answer in answers]


def test_logprobs_are_those_of_the_tokens(engine):
    answer = engine.submit(question("Say something."), Sampling(max_new_tokens=10, logprobs=3))
    entries = [entry for piece in answer for entry in piece.token_logprobs]
    assert len(entries) == answer.completion_tokens == 10
    assert all(entry.logprob == entry.top[0].logprob and entry.token == entry.top[0].token for entry in entries)
    assert all(len(entry.top) == 3 and entry.logprob < 0 for entry in entries)
    whole = b"".join(entry.bytes for entry in entries).decode(errors="replace")
    assert whole.strip("\ufffd \n") == ask(engine, question("Say something."), Sampling(max_new_tokens=10)).strip(
        "\ufffd"
    )


def test_what_cannot_be_answered_is_refused_at_once(engine):
    request = question("<image>\nHello", IMAGES[0])
    prompt = engine.prepare(request)
    room = engine.room(prompt)
    assert room == CONFIG.text.max_position_embeddings - len(prompt.tokens)
    takes = (
        f"takes {len(prompt.tokens)} positions and the answer up to {room + 1}, but the context has {engine.context}"
    )
    with pytest.raises(ContextExceeded, match=f"{takes}: shorten the conversation"):
        engine.submit(request, Sampling(max_new_tokens=room + 1))
    answer = engine.submit(request, Sampling(max_new_tokens=room))
    text(answer)
    assert answer.finish_reason == "length" and answer.completion_tokens == room
    with pytest.raises(UserError, match="1 <image> in the text, but 0 images"):
        engine.submit(question("<image>\nIt?"), SHORT)
    with pytest.raises(UserError, match=r"no\.png: No such file"):
        engine.submit(question("<image>\nIt?", "no.png"), SHORT)


def test_a_failing_device_fails_what_runs_and_nothing_after(engine, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(engine._programs, "decode", lambda *arguments: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            ask(engine, question("Hello"))
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert ask(engine, question("Hello")) == generator().answer([question("Hello")], SHORT)[0]
    assert engine.stats().busy == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_broke_down(monkeypatch):
    engine = make(slots=1)
    monkeypatch.setattr(engine._programs, "prefill", lambda *arguments: 1 / 0)
    monkeypatch.setattr(engine._programs, "reset", lambda: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        ask(engine, question("Hello"))
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit(question("Hello"), SHORT)


def test_a_full_queue_refuses_and_a_closing_engine_finishes_what_it_has():
    engine = make(slots=1, queue=2)
    assert engine.capacity == 3
    first = engine.submit(question("Hello"), LONG)
    next(iter(first))
    answers = [first, *(engine.submit(question(f"Hello {i}"), SHORT) for i in range(2))]
    with pytest.raises(QueueFull) as full:
        engine.submit(question("One more"), SHORT)
    assert full.value.retry_after >= 1
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        time.sleep(0.01)
    with pytest.raises(EngineClosed):
        engine.submit(question("Too late"), SHORT)
    assert all(text(answer) is not None and answer.finish_reason == "length" for answer in answers)
    closing.join()


def test_closing_without_draining_cancels():
    engine = make(slots=1)
    answers = [engine.submit(question(f"Hello {i}"), LONG) for i in range(3)]
    engine.close(drain=False)
    assert [text(answer) is not None and answer.finish_reason for answer in answers] == ["cancelled"] * 3


def test_a_checkpoint_is_an_engine(tmp_path):
    engine = Engine.from_checkpoint(open_checkpoint(tiny.checkpoint(tmp_path)), slots=1, context=100)
    assert engine.context == 100 and engine.base.prompts.template.name == "v1"
    assert ask(engine, question("Hello"))
    engine.close()


def test_a_context_that_the_model_does_not_know_is_refused(tmp_path):
    checkpoint = open_checkpoint(tiny.checkpoint(tmp_path))
    with pytest.raises(UserError, match="the context cannot be 1,000,000 positions: the model knows"):
        Engine.from_checkpoint(checkpoint, slots=1, context=1_000_000)


def test_tiles_of_anyres_are_cached_and_answers_are_those_of_the_generator():
    """Prompts in chunks that begin and end anywhere in an image, with the same images again."""
    config = dataclasses.replace(CONFIG, image_aspect="anyres", anyres=AnyRes())
    weights = tiny.params(config)
    prompts = PromptEncoder(config, tokenizer(), TEMPLATE)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((90, 33), (16, 60), (50, 47))]
    requests = [
        Request([("user", "<image>\n" * len(chosen) + "What colour is it? " * (1 + 3 * number))], chosen)
        for number, chosen in enumerate([images[:1], images[1:], images, images[:1], []])
    ]
    engine = Engine(build(config, jax.tree.map(jnp.copy, weights)), prompts, slots=2, images=1)
    try:
        found = [text(answer) for answer in [engine.submit(request, SHORT) for request in requests]]
    finally:
        engine.close(drain=False)
    alone = Generator(build(config, jax.tree.map(jnp.copy, weights)), prompts)
    assert found == [alone.answer([request], SHORT)[0] for request in requests]
    assert len(set(found)) > 3
    assert alone.answer(requests, SHORT) == found  # in one batch, which shares prefixes


class Failing:
    """A constraint whose second token takes too much work."""

    def __init__(self):
        self.calls = 0

    def copy(self) -> "Failing":
        return self

    def mask(self) -> np.ndarray | None:
        self.calls += 1
        if self.calls > 1:
            raise ConstraintFailed("too much work")
        return None

    def complete_after(self, token: int) -> bool:
        return False


def test_a_constraint_that_fails_fails_its_answer_alone(engine):
    requests, stats = ragged(4), engine.stats()
    alone = [ask(engine, request) for request in requests[:3]]
    answers = [engine.submit(request, SHORT) for request in requests[:3]]
    failing = engine.submit(requests[3], Sampling(max_new_tokens=12, constraint=Failing()))
    with pytest.raises(EngineError, match="too much work"):
        text(failing)
    assert [text(answer) for answer in answers] == alone
    assert (engine.stats().failed, engine.stats().busy) == (stats.failed + 1, 0)
    assert ask(engine, requests[0]) == alone[0]


@pytest.fixture(scope="module")
def constraints(engine) -> Constraints:
    return Constraints(engine.base.prompts, engine.config.text.vocab_size)


@pytest.fixture
def dispatches(engine, monkeypatch) -> list[int]:
    """The steps of each dispatch of `decode`."""
    steps, decode = [], engine._programs.decode
    monkeypatch.setattr(
        engine._programs, "decode", lambda slots, n, report: steps.append(n) or decode(slots, n, report)
    )
    return steps


COLOURS = {"type": "object", "properties": {"colour": {"type": "string"}, "n": {"type": "integer"}}}


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05, "seed": 4},
        {"logprobs": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": ((7, 2.0),)},
    ],
    ids=lambda way: "-".join(way) or "greedy",
)
def test_guessed_tokens_are_those_of_one_token_a_dispatch(engine, constraints, monkeypatch, way):
    requests = ragged(3)
    compiled = [
        constraints.compile("json", COLOURS | {"required": ["colour", "n"], "additionalProperties": False}),
        constraints.compile("regex", "[^a]*"),
        constraints.compile("choice", ["It is red.", "It is white."]),
    ]

    def answers() -> list[Answer]:
        submitted = [
            engine.submit(request, Sampling(max_new_tokens=30, constraint=constraint, **way))
            for request, constraint in zip(requests, compiled, strict=True)
        ]
        submitted.append(engine.submit(question("Hello"), Sampling(max_new_tokens=60)))  # so that all get several
        return [(collect(answer), answer.tokens, answer.finish_reason) for answer in submitted]

    several = answers()
    monkeypatch.setattr(batch, "STEPS", 1)
    alone = answers()
    assert [rest for _, *rest in several] == [rest for _, *rest in alone]
    for ((text, logprobs), *_), ((other, others), *_) in zip(several, alone, strict=True):
        assert text == other
        np.testing.assert_allclose(logprobs, others, rtol=0, atol=1e-5)
    assert several[2][0][0] in ("It is red.", "It is white.")


def test_an_answer_beside_a_constraint_takes_no_more_dispatches(engine, constraints, dispatches):
    free, bound = ragged(2)
    sampling = Sampling(max_new_tokens=61, ignore_eos=True)
    expected = ask(engine, free, sampling)
    assert dispatches == [batch.STEPS] * 15
    dispatches.clear()
    unwanted = Sampling(max_new_tokens=61, constraint=constraints.compile("regex", "(It is red\\. )*"))
    beside = engine.submit(bound, unwanted)
    assert ask(engine, free, sampling) == expected
    assert text(beside).startswith("It is red.")
    # Before these, the constrained answer was alone or the other prompt waited.
    assert str([batch.STEPS] * 14)[1:-1] in str(dispatches)
    dispatches.clear()
    assert ask(engine, bound, unwanted).startswith("It is red.")
    assert sum(dispatches) <= 1.5 * unwanted.max_new_tokens  # few tokens are guessed in vain


class Anything:
    """A constraint that allows all tokens."""

    def copy(self) -> "Anything":
        return self

    def mask(self) -> None:
        return None

    def allows(self, token: int) -> bool:
        return True

    def complete_after(self, token: int) -> bool:
        return False


def test_a_constraint_that_the_model_follows_by_itself_costs_no_dispatch(engine, dispatches):
    request, sampling = ragged(1)[0], Sampling(max_new_tokens=61, verbatim=True)
    expected = ask(engine, request, sampling)
    free = list(dispatches)
    dispatches.clear()
    assert ask(engine, request, dataclasses.replace(sampling, constraint=Anything())) == expected
    assert dispatches == free and set(free) == {batch.STEPS}


def test_answers_do_not_change_beside_others_with_rules(engine):
    requests = ragged(8)
    alone = [collect(engine.submit(request, REPORTED)) for request in requests]
    ruled = Sampling(
        max_new_tokens=30,
        temperature=1.0,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        logit_bias=((5, 3.0),),
        min_p=0.1,
    )
    others = [engine.submit(request, ruled) for request in requests]
    beside = [collect(answer) for answer in [engine.submit(request, REPORTED) for request in requests]]
    assert [text for text, _ in beside] == [text for text, _ in alone]
    for (_, logprobs), (_, expected) in zip(beside, alone, strict=True):  # prompts were cached in the meantime
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    assert [text(other) for other in others] == [ask(engine, request, ruled) for request in requests]


def test_only_the_engine_takes_rules():
    for field, value in (("repetition_penalty", 1.5), ("logit_bias", ((1, 2.0),)), ("ignore_eos", True)):
        with pytest.raises(UserError, match=f"sampling with {field} needs the engine"):
            generator().answer(ragged(1), Sampling(max_new_tokens=5, **{field: value}))


def test_a_dispatch_has_fewer_rows_only_where_that_gives_the_same_bits(engine, monkeypatch):
    programs, sizes = engine._programs, []
    assert programs.sizes[-1] == programs.slots == 4
    expected = programs._probe(4, 7, 0)
    for size in programs.sizes:
        assert programs._probe(size, 7, 0) == expected
    engine.clear_caches()  # the probes wrote into them
    decode = programs.decode
    monkeypatch.setattr(
        programs, "decode", lambda slots, *rest: sizes.append(len(slots.tokens)) or decode(slots, *rest)
    )
    monkeypatch.setattr(programs, "sizes", [2, 4])
    list(engine.submit(ragged(1)[0], SHORT))
    assert set(sizes) == {2}
    answers = [engine.submit(request, SHORT) for request in ragged(4)]
    assert all(list(answer) for answer in answers)
    assert 4 in sizes


def test_no_program_copies_the_cache(engine):
    """By the compiled text: it is donated and changed in place, however many rows a dispatch has."""
    entries = jax.tree.leaves(engine._programs.cache)
    shape = re.escape(f"f32[{','.join(map(str, entries[0].shape))}]")
    for name in engine._programs.names:
        compiled = engine._programs._compiled[name]
        assert not re.search(rf"= {shape}\S* copy\(", compiled.as_text()), name
        if name != ENCODE:
            assert compiled.memory_analysis().alias_size_in_bytes >= sum(entry.nbytes for entry in entries), name
