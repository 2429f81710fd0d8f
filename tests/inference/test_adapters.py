"""Several adapters in one engine: each request is answered as by its own merged model, whatever else is asked."""

import functools
import threading

import adapters as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import eventually

from llava_jax.cli import UserError
from llava_jax.inference.adapters import AdapterWeights, UnknownAdapter
from llava_jax.inference.engine import Engine
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.llava import build
from tests.inference.test_engine import collect, ragged, text
from tests.inference.test_generate import CONFIG, IMAGES, TEMPLATE, params, question, tokenizer

REPORTED = Sampling(max_new_tokens=10, logprobs=3)
# Adapters of several ranks and targets; the last two have projectors of their own.
LORAS = {
    "all": support.lora(4),
    "attention": support.lora(2, ("q_proj", "v_proj"), rslora=True),
    "dora": support.lora(3, dora=True),
    "projector": support.lora(1, ("down_proj",)),
}


@functools.cache
def weights(name: str) -> AdapterWeights:
    lora = LORAS[name]
    seed = list(LORAS).index(name) + 1
    return AdapterWeights(lora, support.adapter(CONFIG, lora, seed, projector=name in ("dora", "projector")))


def make(**options) -> Engine:
    model = build(CONFIG, jax.tree.map(jnp.copy, params()))
    return Engine(model, PromptEncoder(CONFIG, tokenizer(), TEMPLATE), **{"slots": 4, "queue": 200} | options)


@functools.cache
def plain() -> Engine:
    return make()


def alone(name: str | None) -> Engine:
    """An engine of the merged model: always the same one, with other weights."""
    model = build(CONFIG, jax.tree.map(jnp.copy, merged(name)))
    model.unstack_layers()
    plain()._programs._weights[:] = jax.tree.leaves(model)
    plain().clear_caches()
    return plain()


@functools.cache
def merged(name: str | None) -> dict[str, jax.Array]:
    return support.with_merged(params(), weights(name).lora, weights(name).params) if name else params()


@pytest.fixture(scope="module")
def engine():
    engine = make(adapters=len(LORAS), adapter_rank=4)
    for name in LORAS:
        engine.adapters.load(name, weights(name))
    engine.warm_up()
    yield engine
    engine.close(drain=False)


def submit(engine: Engine, name: str | None, request: Request, sampling: Sampling = REPORTED):
    adapter = engine.adapters.get(name) if name else None
    return engine.submit(engine.prepare(request, adapter), sampling)


def assert_equal(found: tuple[str, list[float]], expected: tuple[str, list[float]]) -> None:
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-4)


def test_a_batch_of_several_adapters_is_answered_as_by_the_merged_models(engine):
    requests = ragged(6)
    asked = [(name, request) for request in requests for name in (None, *LORAS)]
    together = [collect(answer) for answer in [submit(engine, *each) for each in asked]]
    for (name, request), found in zip(asked, together, strict=True):
        assert_equal(found, collect(submit(alone(name), None, request)))
    assert len({found[0] for found in together}) > 20


def test_an_answer_does_not_depend_on_the_others_of_the_batch(engine):
    requests = ragged(4)
    asked = [(name, request) for request in requests for name in (None, *LORAS)]
    together = [collect(answer) for answer in [submit(engine, *each) for each in asked]]
    engine.clear_caches()
    for each, (answer, logprobs) in reversed(list(zip(asked, together, strict=True))):
        found = collect(submit(engine, *each))
        assert found[0] == answer
        np.testing.assert_allclose(found[1], logprobs, rtol=0, atol=1e-5)


def test_cached_prefixes_and_images_belong_to_an_adapter(engine):
    request = question("<image>\nWhat colour is it?" + " white" * 20, IMAGES[1])
    answers = {}
    engine.clear_caches()
    for _ in range(2):
        for name in (None, *LORAS):
            answer = submit(engine, name, request)
            found = collect(answer)
            assert (answer.prefix_tokens > 0) == (name in answers)
            assert_equal(found, answers.setdefault(name, found))
            assert_equal(found, collect(submit(alone(name), None, request)))
    assert len({found[0] for found in answers.values()}) == len(answers)


def test_the_next_turn_with_an_adapter_does_not_compute_the_earlier_ones_again(engine):
    first = question("Hello" + " red" * 20)
    follow_up = Request([*first.turns, ("assistant", text(submit(engine, "all", first))), ("user", "Why?")])
    length = len(engine.prepare(first).tokens)
    second = submit(engine, "all", follow_up)
    found = collect(second)
    assert second.prefix_tokens >= length - 2
    assert_equal(found, collect(submit(alone("all"), None, follow_up)))
    prompts = [engine.prepare(first, adapter) for adapter in (engine.base, engine.adapters.get("all"))]
    base, own = (prompt.extended([5, 6]) for prompt in prompts)
    assert not (base == own).any()
    np.testing.assert_array_equal(own[-2:] - 5, own[0] - prompts[1].tokens[0] + np.arange(2))


def test_sampled_answers_are_those_of_the_merged_model(engine):
    request = question("<image>\nIt?", IMAGES[0])
    for seed in range(3):
        sampling = Sampling(temperature=1.2, top_p=0.9, top_k=40, seed=seed, max_new_tokens=8)
        found = text(submit(engine, "dora", request, sampling))
        assert found == text(submit(alone("dora"), None, request, sampling))


@pytest.mark.parametrize("options", [{"slots": 1}, {"quantize": "int8"}])
def test_transposed_and_8_bit_kernels_have_adapters_too(options):
    engine, plain = make(adapters=2, adapter_rank=4, **options), make(**options)
    request = question("<image>\nWhat colour is it?", IMAGES[0])
    assert collect(submit(engine, None, request)) == collect(submit(plain, None, request))
    for name in ("all", "dora"):
        engine.adapters.load(name, weights(name))
        found, expected = collect(submit(engine, name, request)), collect(submit(alone(name), None, request))
        if "quantize" not in options:
            assert_equal(found, expected)
        else:  # the merged model rounds the adapter, too
            assert np.allclose(found[1][:1], expected[1][:1], atol=0.1)
        assert found[0] != text(submit(plain, None, request))
    engine.close(), plain.close()


def test_adapters_are_loaded_and_unloaded_while_others_answer(monkeypatch):
    engine = make(adapters=1, adapter_rank=4)
    request, released, decode = question("What colour is it?"), threading.Event(), engine._programs.decode
    monkeypatch.setattr(engine._programs, "decode", lambda *arguments: (released.wait(), decode(*arguments))[1])
    with pytest.raises(UnknownAdapter, match="'all': there is none"):
        engine.adapters.get("all")

    engine.adapters.load("all", weights("all"))
    running = [submit(engine, name, request) for name in ("all", None)]
    prompt = engine.prepare(request, engine.adapters.get("all"))
    engine.adapters.unload("all")
    with pytest.raises(UnknownAdapter, match="all has been unloaded"):
        engine.submit(prompt, REPORTED)
    with pytest.raises(UserError, match="room for 1: wait for the answers of all, or start with --max-adapters 2"):
        engine.adapters.load("dora", weights("dora"))
    released.set()
    for name, answer in zip(("all", None), running, strict=True):  # the unloaded one, too
        assert_equal(collect(answer), collect(submit(alone(name), None, request)))
    eventually(lambda: not engine.stats().busy)

    compiled = dict(engine._programs._compiled)
    released.clear()
    base = submit(engine, None, request)
    engine.adapters.load("dora", weights("dora"))  # takes the place of the other one
    dora = submit(engine, "dora", request)
    released.set()
    for name, answer in zip((None, "dora"), (base, dora), strict=True):
        assert_equal(collect(answer), collect(submit(alone(name), None, request)))
    eventually(lambda: not engine.stats().busy)
    engine.adapters.unload("dora")
    engine.adapters.load("attention", weights("attention"))  # has fewer layers and no projector: nothing may be left
    image = question("<image>\nWhat colour is it?", IMAGES[0])
    assert_equal(collect(submit(engine, "attention", image)), collect(submit(alone("attention"), None, image)))
    assert {name: engine._programs._compiled[name] for name in compiled} == compiled
    engine.close()


def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(UserError, match="named all already: unload it first"):
        engine.adapters.load("all", weights("all"))
    high = AdapterWeights(support.lora(5), support.adapter(CONFIG, support.lora(5)))
    with pytest.raises(UserError, match="its rank is 5, and there is room for 4: start with --max-adapter-rank 5"):
        engine.adapters.load("high", high)
    with pytest.raises(UserError, match="room for 4: unload one of 'all', .*--max-adapters 5"):
        engine.adapters.load("more", weights("all"))
    for name in ("", "a\nb", "x" * 201, "\x1b[31m"):
        with pytest.raises(UserError, match="is no name of an adapter"):
            engine.adapters.load(name, weights("all"))
