"""The API as its clients see it: OpenAI's own one, and those who send what nobody should."""

import asyncio
import contextlib
import json
import logging
import math
import re
import socket
import typing
from collections.abc import Iterator

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient
from openai.types import chat, shared_params
from openai.types.chat import chat_completion_content_part_image_param as image_part
from openai.types.chat import completion_create_params
from openai.types.responses import response_create_params
from serving import data_url, eventually, noise_image, serving, tiny_engine

from llava_jax.inference import prompts
from llava_jax.inference.engine import Engine, QueueFull
from llava_jax.inference.requests import Request, Sampling
from llava_jax.serve import answers, completions, responses, schema
from llava_jax.serve.answers import Answers
from llava_jax.serve.app import create_app
from llava_jax.serve.models import AdapterDirectory

HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "tool_calls": [CALL]}
BEGUN = [*HELLO, {"role": "assistant", "content": "Well, it"}]


def parts(*content, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": list(content)}]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with tiny_engine(tmp_path_factory.mktemp("serve"), slots=4, queue=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine):
    return create_app(engine, "tiny", max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def url(app):
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(app):
    with TestClient(app) as http:
        yield http


def greedy(engine: Engine, turns, images=(), tokens: int = 6, **sampling) -> str:
    answer = engine.submit(Request(turns, images), Sampling(max_new_tokens=tokens, **sampling))
    return "".join(piece.text for piece in answer)


def create(client: openai.OpenAI, messages=HELLO, **options):
    options = {"max_completion_tokens": 6, "temperature": 0} | options
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def refusal(http: TestClient, status: int, **body) -> dict:
    """The error that a request is answered with."""
    data = json.dumps({"model": "tiny", "messages": HELLO} | body)
    response = http.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


# ------------------------------------------------------------------------------------------------ what is answered


def test_an_answer_is_the_engines(client, engine):
    completion = create(client)
    (choice,) = completion.choices
    assert choice.message.content == greedy(engine, [("user", "Hello")])
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert (completion.model, completion.object) == ("tiny", "chat.completion")
    usage = completion.usage
    assert usage.prompt_tokens == len(engine.prepare(Request([("user", "Hello")])).tokens)
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_request_is_tokenized_and_its_images_are_preprocessed_once_for_all_answers(client, engine, monkeypatch):
    calls = []

    def counted(name, function):
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    monkeypatch.setattr(engine.base.prompts, "encode", counted("encode", engine.base.prompts.encode))
    monkeypatch.setattr(prompts, "preprocess", counted("preprocess", prompts.preprocess))
    content = [{"type": "image_url", "image_url": {"url": data_url(noise_image(number))}} for number in range(2)]
    message = parts(*content, {"type": "text", "text": "Which one?"})["messages"]
    completion = create(client, message, n=3)
    assert len(completion.choices) == 3
    assert calls == ["preprocess", "preprocess", "encode"]


def test_a_stream_brings_the_same_answer_in_pieces(client):
    whole = create(client, max_completion_tokens=30)
    chunks = list(create(client, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = chunks
    assert len(pieces) > 3
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in [*pieces, last]] == [None] * len(pieces) + ["length"]
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_on_the_wire(http):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    response = http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["finish_reason"] is None


def test_a_conversation_with_pictures(client, engine):
    first, second = noise_image(0), noise_image(1, size=(30, 50))
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": data_url(first), "detail": "high"}},
            ],
        },
        {"role": "assistant", "content": "A thing."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(second)}}]},
        {"role": "user", "content": "And this?"},
    ]
    turns = [
        ("system", "Be brief."),
        ("user", "<image>\nWhat is it?"),
        ("assistant", "A thing."),
        ("user", "<image>\nAnd this?"),
    ]
    assert create(client, messages).choices[0].message.content == greedy(engine, turns, [first, second])


def test_a_url_needs_no_object_around_it(client):
    def ask(image_url):
        content = [{"type": "image_url", "image_url": image_url}, {"type": "text", "text": "What is it?"}]
        return create(client, [{"role": "user", "content": content}]).choices[0].message.content

    assert ask(data_url(noise_image(0))) == ask({"url": data_url(noise_image(0))})


@pytest.mark.parametrize("options", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_an_answer_continues_a_last_message_of_the_assistant(client, engine, options):
    request = Request([("user", "Hello")], begun="Well, it")
    expected = "".join(piece.text for piece in engine.submit(request, Sampling(max_new_tokens=6)))
    completion = create(client, BEGUN, extra_body=options)
    assert completion.choices[0].message.content == expected
    length, without = (len(engine.prepare(each).tokens) for each in (request, Request(request.turns)))
    assert completion.usage.prompt_tokens == length > without


def test_what_continues_a_text_keeps_the_white_space_between(engine):
    texts = []
    for letter in "efilmqz":
        answer = engine.submit(Request([("user", "Hello")], begun=letter), Sampling(max_new_tokens=3))
        texts.append("".join(piece.text for piece in answer))
        assert engine.base.prompts.tokenizer.decode(answer.tokens).startswith(texts[-1])
    assert any(text.startswith(" ") for text in texts)


def test_what_came_back_can_be_sent_again(client):
    message = create(client).choices[0].message
    again = [*HELLO, message, {"role": "user", "content": "And?"}]
    plain = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": "And?"}]
    dumped = [*HELLO, message.model_dump(), {"role": "user", "content": "And?"}]
    texts = {create(client, messages).choices[0].message.content for messages in (again, plain, dumped)}
    assert len(texts) == 1


def test_every_seed_of_64_bits_is_one(client):
    for seed in (2**64 - 1, -(2**63), -9223372036854776000):
        assert create(client, temperature=1, seed=seed, max_completion_tokens=2).choices[0].message.content is not None


def test_several_answers_and_seeds(client):
    def texts(**options) -> list[str]:
        completion = create(client, n=3, temperature=2, **options)
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        return [choice.message.content for choice in completion.choices]

    first = texts(seed=-1)
    assert first == texts(seed=-1) == [*texts(seed=-2)[1:], first[-1]]
    assert len(set(first)) == 3
    assert len(create(client, n=12).choices) == 12  # as many as the engine holds
    assert texts() != texts()
    streamed = ["", "", ""]
    for chunk in create(client, n=3, temperature=2, seed=-1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_stop_strings(client):
    text = create(client, max_completion_tokens=20).choices[0].message.content
    stop = text[4:6]
    for given in (stop, ["never in it", stop]):
        choice = create(client, max_completion_tokens=20, stop=given).choices[0]
        assert choice.message.content == text[: text.index(stop)].rstrip()
        assert choice.finish_reason == "stop"


def test_no_stream_holds_a_part_of_a_stop_string(client):
    completion = create(client, max_completion_tokens=40)
    text = completion.choices[0].message.content
    for start in range(5, 15):
        stop = text[start : start + 9].strip()  # of several tokens
        options = {"max_completion_tokens": 40, "stop": [stop, stop[1:] + "never"], "stream": True}
        *chunks, last = create(client, stream_options={"include_usage": True}, **options)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == text[: text.index(stop)].rstrip()
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert last.usage.completion_tokens < completion.usage.completion_tokens


def test_without_a_limit_the_context_is(client, engine):
    long = [{"role": "user", "content": "word " * 400}]
    completion = create(client, long, max_completion_tokens=None, temperature=0)
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert engine.context - 100 < completion.usage.total_tokens <= engine.context


def test_logprobs(client):
    choice = create(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 6
    for token in tokens:
        assert [other.token for other in token.top_logprobs[:1]] == [token.token]  # greedy takes the likeliest
        assert len(token.top_logprobs) == 3
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        assert math.isclose(token.logprob, token.top_logprobs[0].logprob) and token.logprob <= 0
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace").strip() == choice.message.content
    assert all(token.top_logprobs == [] for token in create(client, logprobs=True).choices[0].logprobs.content)
    streamed = create(client, logprobs=True, top_logprobs=3, stream=True)
    parts = [chunk.choices[0].logprobs.content for chunk in streamed if chunk.choices[0].logprobs]
    assert [token.token for part in parts for token in part] == [token.token for token in tokens]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llava_jax"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("other/model")


# ------------------------------------------------------------------------------------------------- what is refused


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        create(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (error.value.code, error.value.param) == ("unsupported_parameter", "tools")


def test_a_failure_reaches_the_client_before_and_in_the_middle_of_a_stream(client, engine, monkeypatch):
    decode, calls = engine._programs.decode, []

    def fail_at_the_third(*arguments):
        calls.append(1)
        return 1 / 0 if len(calls) == 3 else decode(*arguments)

    monkeypatch.setattr(engine._programs, "decode", fail_at_the_third)
    with pytest.raises(openai.InternalServerError) as error:
        create(client, max_completion_tokens=30)
    assert error.value.code == "internal_error"
    calls.clear()
    stream, text = create(client, max_completion_tokens=30, stream=True), ""
    with pytest.raises(openai.APIError, match="the answer failed: the server's log has the details"):
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert create(client, max_completion_tokens=30).choices[0].message.content.startswith(text) and text


@pytest.mark.parametrize(
    "own, theirs",
    [
        (schema.ChatRequest, completion_create_params.CompletionCreateParamsStreaming),
        (schema.StreamOptions, chat.ChatCompletionStreamOptionsParam),
        (schema.SystemMessage, chat.ChatCompletionDeveloperMessageParam),
        (schema.UserMessage, chat.ChatCompletionUserMessageParam),
        (schema.AssistantMessage, chat.ChatCompletionAssistantMessageParam),
        (schema.AssistantMessage, chat.ChatCompletionMessage),
        (schema.ToolMessage, chat.ChatCompletionToolMessageParam),
        (schema.Function, shared_params.FunctionDefinition),
        (schema.TextRequest, openai.types.completion_create_params.CompletionCreateParamsStreaming),
        (responses.ResponseRequest, response_create_params.ResponseCreateParamsStreaming),
        (schema.TextPart, chat.ChatCompletionContentPartTextParam),
        (schema.ImagePart, chat.ChatCompletionContentPartImageParam),
        (schema.ImageURL, image_part.ImageURL),
    ],
)
def test_every_field_that_the_client_can_send_is_known(own, theirs):
    """A newer client may bring newer ones: refuse them by name, or accept what changes no answer."""
    fields = getattr(theirs, "model_fields", None) or typing.get_type_hints(theirs)
    assert set(fields) <= set(own.model_fields)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"media_io_kwargs": {"video": {"num_frames": 10**9}}}, "media_io_kwargs"),
        ({"mm_processor_kwargs": {"max_pixels": 10**12}}, "mm_processor_kwargs"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [*HELLO, CALLED, {"role": "tool", "content": "5", "tool_call_id": "1"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "Hello", "name": "Ann"}]}, "messages.0.name"),
    ],
)
def test_what_would_change_the_answer_and_cannot_is_refused_by_name(http, body, param):
    error = refusal(http, 400, **body)
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)
    assert param in error["message"]


@pytest.mark.parametrize(
    "sent",
    [
        # Open WebUI with everything set in a model's parameters: backend/open_webui/utils/payload.py
        {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 0.9, "min_p": 0.05,
         "top_k": 40, "max_tokens": None, "frequency_penalty": 0.1, "presence_penalty": 0.0, "seed": 42, "stop": ["x"],
         "logit_bias": {"5": -3}, "response_format": {"type": "json_object"}},
        # Continue: packages/openai-adapters/src/apis/OpenAI.ts
        {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 50, "temperature": 0, "top_p": 1,
         "frequency_penalty": 0, "presence_penalty": 0, "stop": ["x"],
         "prediction": {"type": "content", "content": "y"}},
        # lmms-eval: models/chat/async_openai.py
        {"max_completion_tokens": 50, "temperature": 0, "response_format": {"type": "text"}, "tools": [],
         "chat_template_kwargs": {"enable_thinking": False}},
        # vllm bench serve
        {"max_completion_tokens": 50, "ignore_eos": True, "temperature": 0.0, "repetition_penalty": 1.0, "stream": True,
         "stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_requests_of_front_ends_and_harnesses_are_answered(http, sent):
    response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | sent)
    assert response.status_code == 200, response.text


def test_what_changes_nothing_is_accepted(client):
    expected = create(client).choices[0].message.content
    harmless = {
        "user": "somebody",
        "metadata": {"a": "b"},
        "store": False,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "logit_bias": {},
        "tools": [],
        "service_tier": "auto",
    }
    assert create(client, **harmless).choices[0].message.content == expected


@pytest.mark.parametrize(
    "body, param, code",
    [
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "actor", "content": "x"}]}, "messages.0", "invalid_value"),
        ({"messages": [*HELLO, {"role": "assistant"}]}, "messages.1", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "invalid_value"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "missing_required_parameter"),
        ({"tool_choice": "required"}, None, "invalid_value"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
        ({"logit_bias": {"one": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"400": 1}}, None, "invalid_value"),  # the model has 400
        ({"stop_token_ids": [400]}, None, "invalid_value"),
        ({"min_p": 1.5}, "min_p", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "missing_required_parameter",
        ),
        ({"guided_regex": "a", "guided_choice": ["b"]}, None, "invalid_value"),
        ({"guided_regex": "a", "ignore_eos": True}, None, "invalid_value"),
        ({"guided_regex": "(a"}, "guided_regex", "invalid_value"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages", "invalid_value"),
        ({"continue_final_message": True}, None, "invalid_value"),
        ({"add_generation_prompt": False}, None, "invalid_value"),
        ({"messages": BEGUN, "continue_final_message": False}, None, "invalid_value"),
        ({"messages": BEGUN, "add_generation_prompt": True}, None, "invalid_value"),
        (
            parts({"type": "text", "text": "a", "cache_control": {}}),
            "messages.0.content.0.cache_control",
            "unknown_parameter",
        ),
        (parts({"type": "text", "text": 5}), "messages.0.content.0.text", "invalid_value"),
        (parts({"type": "text"}), "messages.0.content.0.text", "missing_required_parameter"),
        (
            parts({"type": "image_url", "image_url": {"url": "x"}, "uuid": 1}),
            "messages.0.content.0.uuid",
            "invalid_value",
        ),
        (parts({"type": "image_url", "image_url": {"url": 1}}), "messages.0.content.0.image_url.url", "invalid_value"),
        (parts({"type": "image_url", "image_url": 1}), "messages.0.content.0.image_url", "invalid_value"),
        (parts({"type": "text", "text": 5}, role="system"), "messages.0.content.0.text", "invalid_value"),
        ({"messages": [*HELLO, {"role": "system", "content": "Hi"}]}, "messages.1.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "invalid_json"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"n": 13}, "n", "invalid_value"),  # the engine holds twelve
        ({"seed": 10**20 + 1}, "seed", "invalid_value"),
        ({"stop": ["", "a"]}, "stop.0", "invalid_value"),
        ({"stop": list("abcde")}, "stop", "invalid_value"),
        ({"top_logprobs": 3}, None, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"frequency": 1}, "frequency", "unknown_parameter"),
        ({"prompt_embeds": "gASV"}, "prompt_embeds", "unknown_parameter"),
        (parts({"type": "image_embeds", "image_embeds": "gASV"}), "messages.0.content.0", "invalid_value"),
        ({"\ud800": 1}, None, "invalid_json"),
        ({"n" * 1000: 1}, "n" * 397 + "...", "unknown_parameter"),
    ],
)
def test_malformed_requests_say_where(http, body, param, code):
    error = refusal(http, 400, **body)
    assert (error["param"], error["code"]) == (param, code), error


def test_of_several_types_the_one_that_was_meant_says_what_is_wrong(http):
    assert "at most 4 items" in refusal(http, 400, stop=list("abcde"))["message"]
    assert "valid string" in refusal(http, 400, stop=5)["message"]


@pytest.mark.parametrize(
    "data", ["", "{", '{"model": "tiny"', "[]", "null", '"text"', "[" * 100_000, b"\xff\xfe", "1" * 5000]
)
def test_bodies_that_are_no_json_object(http, data):
    response = http.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_of_another_type_is_refused(http):
    response = http.post("/v1/chat/completions", content=json.dumps({"model": "tiny", "messages": HELLO}))
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_prompts_and_answers_beyond_the_context(http, engine):
    for body in (
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        {"messages": [{"role": "user", "content": "w" * 1_000_000}]},
        {"max_tokens": engine.context},
    ):
        assert refusal(http, 400, **body)["code"] == "context_length_exceeded"


def test_more_pictures_than_the_context_has_room_for(http, engine):
    part = {"type": "image_url", "image_url": {"url": data_url(noise_image(size=(1, 1)))}}
    many = [part] * (engine.context // engine.config.image_tokens + 1)
    error = refusal(http, 400, messages=[{"role": "user", "content": many}])
    assert error["code"] == "too_many_images"


def test_paths_and_methods_that_are_not_there(http):
    for response, status in ((http.get("/v1/nothing"), 404), (http.get("/v1/chat/completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_log_probabilities_are_bounded_for_each_request_and_for_all(url, http, engine, monkeypatch):
    monkeypatch.setattr(completions, "MAX_LOGPROBS", 100)
    asked = {"logprobs": True, "top_logprobs": 9}
    error = refusal(http, 400, n=2, max_tokens=6, **asked)
    assert (error["param"], error["code"]) == ("top_logprobs", "invalid_value")
    assert "2 answers of up to 6 tokens with 9 alternatives" in error["message"]
    for stream in (True, False, True, False):  # each gives back what it took
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "stream": stream} | asked
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert eventually(lambda: idle(engine))
    monkeypatch.setattr(type(engine._batch), "full", True)  # nobody gets a slot
    with connection(url, max_tokens=10, stream=True, **asked):
        assert eventually(lambda: engine.stats().queued)
        assert refusal(http, 429, max_tokens=6, **asked)["code"] == "queue_full"
    assert eventually(lambda: idle(engine))
    monkeypatch.undo()


def test_pages_of_other_sites(engine):
    page = {"Origin": "https://app.example.org"}
    asked = "authorization,x-stainless-os"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    with TestClient(create_app(engine, "tiny")) as http:
        for response in (
            http.post("/v1/chat/completions", json=body, headers=page),
            http.options("/v1/chat/completions", headers=page | preflight),
            http.get("/health", headers=page),
        ):
            assert response.status_code == 403
            assert response.json()["error"]["code"] == "foreign_origin"
            assert not any(name.startswith("access-control") for name in response.headers)
        assert not any(name.startswith("access-control") for name in http.get("/health").headers)
    with TestClient(create_app(engine, "tiny", allow_origins=["https://app.example.org"], api_key="k")) as http:
        response = http.options("/v1/chat/completions", headers=page | preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://app.example.org"
        assert response.headers["access-control-allow-headers"] == asked
        for key, status in ("k", 200), ("wrong", 401):
            headers = page | {"Authorization": f"Bearer {key}"}
            response = http.post("/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://app.example.org"
            assert "Origin" in response.headers["vary"]
        assert http.get("/health", headers={"Origin": "https://other.example.org"}).status_code == 403


def test_unknown_hosts(engine):
    with TestClient(create_app(engine, "tiny", allowed_hosts=["llava.example.org"])) as http:
        for path in ("/v1/models", "/health", "/metrics", "/openapi.json", "/"):
            response = http.get(path, headers={"Host": "evil.test"})
            assert response.status_code == 421
            assert response.json()["error"]["code"] == "unknown_host"
        assert http.get("/health", headers={"Host": "llava.example.org"}).status_code == 200


def test_every_response_has_an_id(http, monkeypatch):
    for path in ("/health", "/v1/nothing", "/openapi.json"):
        assert re.fullmatch("[0-9a-f]{32}", http.get(path).headers["x-request-id"])
    assert http.get("/health", headers={"X-Request-Id": "my-id_1.2"}).headers["x-request-id"] == "my-id_1.2"
    for bad in ("", "a b", "a" * 65, "<b>"):
        assert re.fullmatch("[0-9a-f]{32}", http.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"])


@pytest.fixture
def log(caplog, monkeypatch):
    """Of uvicorn, however it was configured before. -> its lines so far"""
    logger = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    caplog.set_level(logging.INFO, "uvicorn.error")
    return lambda: [record.getMessage() for record in caplog.records if record.name == logger.name]


def test_a_bug_is_answered_without_its_text(engine, log):
    app = create_app(engine, "tiny")
    app.get("/bug")(lambda: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as http:
        response = http.get("/bug")
    assert response.status_code == 500
    assert "division" not in response.text
    assert any(response.headers["x-request-id"] in line for line in log())


def test_the_log_shows_nothing_raw(http, log):
    http.get("/v1/%1b[31m%0aINFO: 200%c2%9b" + "a" * 1000)
    (line,) = log()
    assert line.isprintable() and line.isascii() and len(line) < 400


def test_no_page_of_documentation_loads_scripts_from_elsewhere(http):
    assert {http.get(path).status_code for path in ("/docs", "/redoc", "/metrics/")} == {404}
    assert http.get("/openapi.json").json()["paths"]


def test_methods(http):
    head = http.head("/health")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "15")
    for method in ("OPTIONS", "TRACE", "DELETE"):
        assert http.request(method, "/health").status_code == 405
    assert http.head("/v1/chat/completions").status_code == 405


def test_the_schema_of_requests_is_complete(http):
    document = http.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert {"ChatRequest", "UserMessage", "ImagePart"} <= set(document["components"]["schemas"])


def test_a_full_queue(http, engine):
    long, begun = Sampling(max_new_tokens=1500, temperature=1.0), []

    def refused() -> bool:
        """Fills the queue and asks once more; an answer may end just in between."""
        with pytest.raises(QueueFull):
            while True:
                begun.append(engine.submit(Request([("user", "Hello")]), long))
        responses.append(http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 5}))
        return responses[-1].status_code != 200

    responses = []
    assert eventually(refused)
    for answer in begun:
        answer.cancel()
    assert responses[-1].status_code == 429
    assert responses[-1].json()["error"]["code"] == "queue_full"
    assert int(responses[-1].headers["retry-after"]) >= 1


# -------------------------------------------------------------------------------------------------- those who leave


def idle(engine: Engine) -> bool:
    return engine.stats().busy == engine.stats().queued == 0


@contextlib.contextmanager
def connection(url: str, **body) -> Iterator[None]:
    """Of somebody who asks and reads nothing."""
    data = json.dumps({"model": "tiny", "messages": HELLO} | body).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connected:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        connected.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slot(url, engine, stream):
    assert eventually(lambda: idle(engine))
    cancelled = engine.stats().cancelled
    with connection(url, n=3, seed=0, max_tokens=1900, stream=stream):
        assert eventually(lambda: engine.stats().busy)
    assert eventually(lambda: idle(engine))
    assert engine.stats().cancelled > cancelled


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_place_in_the_queue(url, engine, monkeypatch, stream):
    assert eventually(lambda: idle(engine))
    monkeypatch.setattr(answers, "PING_SECONDS", None)  # it is noticed without a ping that cannot be sent
    monkeypatch.setattr(type(engine._batch), "full", True)  # nobody gets a slot
    with connection(url, n=3, stream=stream):
        assert eventually(lambda: engine.stats().queued == 3)
    assert eventually(lambda: idle(engine))


def test_what_is_submitted_after_its_client_left_is_cancelled(engine, app):
    """The thread that submits is not stopped by a cancelled task."""

    async def leave() -> Answers:
        wanted = Request([("user", "Hello")]), Sampling(max_new_tokens=1900, temperature=2.0)
        answers = Answers(engine, app.state.metrics, [wanted] * 3)
        answers.cancel()
        await answers.submit()
        return answers

    answers = asyncio.run(leave()).answers
    assert len(answers) == 1
    assert eventually(lambda: answers[0].finish_reason == "cancelled")


def test_who_leaves_in_the_middle_of_a_body_is_nobodys_loss(url, app):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + b'{"model"')
        assert eventually(lambda: len(app.state.traffic.reading) == 1)
    assert eventually(lambda: len(app.state.traffic.reading) == 0)


# ------------------------------------------------------------------------------------------------------ operations


def values_of_metrics(http) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics(http, client, engine):
    assert eventually(lambda: idle(engine))
    before = values_of_metrics(http)
    usage = create(client, n=2).usage
    refusal(http, 404, model="other")
    after = values_of_metrics(http)
    added = {name: after[name] - before.get(name, 0) for name in after}
    expected = {
        "llava_slots": 0,
        "llava_prompt_tokens_total": 2 * usage.prompt_tokens,
        "llava_generated_tokens_total": usage.completion_tokens,
        "llava_answers_finished_total": 2,
        "llava_answers_cancelled_total": 0,
        "llava_answers_failed_total": 0,
        "llava_time_to_first_token_seconds_count": 2,
        'llava_time_to_first_token_seconds_bucket{le="+Inf"}': 2,
        "llava_answer_tokens_per_second_count": 2,
        'llava_http_requests_total{status="200"}': 1,
        'llava_http_requests_total{status="404"}': 1,
    }
    assert {name: added[name] for name in expected} == expected
    assert (after["llava_ready"], after["llava_slots"], after["llava_slots_busy"]) == (1, 4, 0)
    assert 2 * (usage.prompt_tokens - 1) >= added["llava_prefix_tokens_total"] >= usage.prompt_tokens - 1


def test_metrics_show_slots_and_queue(url, http, engine, monkeypatch):
    assert eventually(lambda: idle(engine))
    monkeypatch.setattr(type(engine._batch), "full", property(lambda batch: len(batch.running) == 1))
    with connection(url, n=4, seed=0, max_tokens=1900):
        assert eventually(lambda: engine.stats().queued == 3)
        values = values_of_metrics(http)
    assert (values["llava_slots_busy"], values["llava_queue_length"]) == (1, 3)
    assert eventually(lambda: idle(engine))


def test_health_and_refusals_until_warm(engine):
    app = create_app(engine, "tiny")
    engine.ready = False
    try:
        with TestClient(app) as http:
            assert http.get("/health").status_code == 503
            assert "warming up" in refusal(http, 503)["message"]
    finally:
        engine.ready = True
    with TestClient(app) as http:
        assert http.get("/health").json() == {"status": "ok"}
        app.state.traffic.shutting_down = True
        assert http.get("/health").status_code == 503
        assert "shutting down" in refusal(http, 503)["message"]


def test_a_key(engine):
    with TestClient(create_app(engine, "tiny", api_key="right")) as http:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": "Bearer é"},
        ):
            headers = {name: value.encode() for name, value in headers.items()}
            for response in (
                http.post("/v1/chat/completions", json=body, headers=headers),
                http.get("/v1/models", headers=headers),
                http.get("/metrics", headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").status_code == 200
        right = {"Authorization": "Bearer right"}
        assert http.post("/v1/chat/completions", json=body, headers=right).status_code == 200


def test_every_path_but_health_and_the_schema_needs_the_key(engine, tmp_path):
    directory = AdapterDirectory(engine, "tiny", str(tmp_path), lambda path: 1 / 0)
    app = create_app(engine, "tiny", api_key="right", adapter_directory=directory)
    with TestClient(app) as http:
        answered = {
            (route.path, method): http.request(method, route.path.replace("{name:path}", "tiny"), json={}).status_code
            for route in app.routes
            for method in route.methods
        }
        # A path that the Host header or an encoding pretends is no other path.
        for path in ("//v1/models", "/v1/../v1/models", "/%76%31/models", "/health/../v1/models"):
            assert http.get(path).status_code in (401, 404)
        assert http.get("/v1/models", headers={"Host": "localhost/health?"}).status_code == 421
    unguarded = {path for (path, _), status in answered.items() if status != 401}
    assert unguarded == {"/health", "/openapi.json"}
    assert len(answered) > 10


def test_bodies_are_limited_before_they_are_read(url):
    def parts():
        for _ in range(40):
            yield b" " * 65536

    for content in (b" " * (2 << 20), parts()):  # with a length, and in chunks without
        response = httpx2.post(
            f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}, timeout=None
        )
        assert response.status_code == 413
        assert "1048576 bytes" in response.json()["error"]["message"]
