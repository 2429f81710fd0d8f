"""What the official client asks for besides plain chat: formats of answers, penalties, texts, responses and tools."""

import json
import re
from typing import Literal

import openai
import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, Field
from serving import data_url, noise_image, serving, tiny_engine

from llava_jax.inference import constraints
from llava_jax.inference.requests import Request, Sampling
from llava_jax.serve import tools
from llava_jax.serve.app import create_app

HELLO = [{"role": "user", "content": "Hello"}]


class Car(BaseModel):
    colour: Literal["red", "green"]
    wheels: int = Field(ge=0, le=9)
    new: bool


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with tiny_engine(tmp_path_factory.mktemp("endpoints"), slots=4, queue=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine):
    return create_app(engine, "tiny")


@pytest.fixture(scope="module")
def client(app):
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(app):
    with TestClient(app) as http:
        yield http


def create(client, messages=HELLO, **options):
    options = {"max_completion_tokens": 60, "temperature": 0} | options
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def text_of(completion) -> str:
    return completion.choices[0].message.content


# ----------------------------------------------------------------------------------------------- the format of answers


def test_pydantic_models_are_parsed(client):
    options = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 900, "response_format": Car}
    for completion in (
        client.chat.completions.parse(temperature=0, **options),
        client.chat.completions.parse(n=3, temperature=2, seed=1, **options),
    ):
        for choice in completion.choices:
            assert isinstance(choice.message.parsed, Car)
            assert choice.finish_reason == "stop"
    with client.chat.completions.stream(temperature=0, **options) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Car)


@pytest.mark.parametrize(
    "options, pattern",
    [
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no, thanks"]}}}, "yes|no, thanks"),
        ({"extra_body": {"guided_choice": [" A ", " B "]}}, " A | B "),
        ({"extra_body": {"guided_regex": r"[a-c]{3}x[0-9]"}}, r"[a-c]{3}x[0-9]"),  # Python knows fewer digits
        ({"extra_body": {"structured_outputs": {"regex": "(</s>|<image>|###)[ab]"}}}, "(</s>|<image>|###)[ab]"),
        ({"extra_body": {"guided_grammar": 'start: "(" X{2} ")"\nX: /[0-9]/'}}, r"\([0-9]{2}\)"),
        ({"extra_body": {"guided_json": {"const": 5}}}, "5"),
        ({"extra_body": {"structured_outputs": {"json": '{"enum": ["é"]}'}}}, '"é"'),
    ],
)
def test_answers_have_the_format_that_was_asked_for(client, options, pattern):
    for more in ({}, {"temperature": 2.0, "seed": 5}, {"temperature": 1.5, "top_p": 0.5, "frequency_penalty": 1.0}):
        completion = create(client, **options, **more)
        assert re.fullmatch(pattern, text_of(completion))
        assert completion.choices[0].finish_reason == "stop"
    chunks = list(create(client, stream=True, **options, **more))
    assert re.fullmatch(pattern, "".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_an_object_ends_or_is_cut_at_the_limit(client):
    options = {"response_format": {"type": "json_object"}, "max_completion_tokens": 20}
    for seed in range(4):
        choice = create(client, temperature=1, seed=seed, **options).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length" and choice.message.content.startswith("{")


def test_log_probabilities_are_of_the_allowed_tokens(client):
    options = {"extra_body": {"guided_choice": ["yes", "no"]}, "logprobs": True, "top_logprobs": 20}
    completion = create(client, **options)
    entries = completion.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text_of(completion)
    assert {other.token[:1] for other in entries[0].top_logprobs} <= {"y", "n"}
    assert sum(2.718281828**other.logprob for other in entries[0].top_logprobs) == pytest.approx(1, abs=1e-4)


def test_others_get_the_same_text_beside_constrained_answers(client, engine):
    alone = text_of(create(client, max_completion_tokens=40))
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 9, "maxItems": 9}
    with create(client, stream=True, max_completion_tokens=900, extra_body={"guided_json": schema}) as stream:
        chunks = [next(stream), next(stream)]
        assert text_of(create(client, max_completion_tokens=40)) == alone
        chunks += stream
    assert len(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks))) == 9


@pytest.mark.parametrize(
    "field, value",
    [
        ("guided_regex", "a" * 5000),
        ("guided_regex", "(((.*){1,500}x){1,500}y){1,500}"),
        ("guided_grammar", "start: " + "a" * 70_000),
        ("guided_choice", ["a" * 100] * 900),
        ("guided_json", {"type": "object", "properties": {f"p{i}": {"pattern": "(.*a.*b){99}"} for i in range(300)}}),
        ("guided_grammar", "start: " + "x? " * 5000 + '\nx: "a" | "b"'),
        ("guided_json", {"$ref": "file:///etc/passwd"}),
        ("guided_json", {"type": "string", "format": "no such format"}),
    ],
)
def test_formats_that_take_too_much_or_are_unknown_are_refused_or_bounded(http, field, value):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, field: value}
    response = http.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        assert response.status_code == 400 and response.json()["error"]["param"] in (field, None)
    assert http.post("/v1/chat/completions", json=body | {field: None}).status_code == 200


# ------------------------------------------------------------------------------------------------ penalties and biases


def test_biases_and_penalties_change_what_is_said(client, engine):
    plain = create(client, max_completion_tokens=30, logprobs=True)
    tokenizer = engine.base.prompts.tokenizer
    (answer,) = [engine.submit(Request([("user", "Hello")]), Sampling(max_new_tokens=30))]
    "".join(piece.text for piece in answer)
    first = answer.tokens[0]
    banned = create(client, max_completion_tokens=30, logit_bias={str(first): -100})
    assert text_of(banned) != text_of(plain)
    wanted = tokenizer.convert_tokens_to_ids("W")
    assert text_of(create(client, max_completion_tokens=5, logit_bias={str(wanted): 100})) == "W" * 5
    unlike = create(client, max_completion_tokens=5, logit_bias={str(wanted): 100}, frequency_penalty=2)
    assert text_of(unlike) == "W" * 5  # a bias of 100 outweighs five penalties of 2
    assert len(set(answer.tokens)) < 30
    repeated = engine.submit(Request([("user", "Hello")]), Sampling(max_new_tokens=30, repetition_penalty=1000.0))
    list(repeated)
    assert len(set(repeated.tokens)) == 30
    same = create(client, max_completion_tokens=30, presence_penalty=0, extra_body={"repetition_penalty": 1.0})
    assert text_of(same) == text_of(plain)


def test_stop_tokens_and_their_absence(client, engine):
    answer = engine.submit(Request([("user", "Hello")]), Sampling(max_new_tokens=30))
    "".join(piece.text for piece in answer)
    stop = answer.tokens[4]
    cut = create(client, max_completion_tokens=30, extra_body={"stop_token_ids": [stop]})
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (answer.tokens.index(stop) + 1, "stop")
    eos = engine.base.prompts.tokenizer.eos_token_id
    for ignored, tokens, reason in ((False, 1, "stop"), (True, 12, "length")):
        options = {"logit_bias": {str(eos): 100}, "extra_body": {"ignore_eos": ignored}}
        ended = create(client, max_completion_tokens=12, **options)
        assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (tokens, reason)


# --------------------------------------------------------------------------------------------------------------- texts


def test_texts_are_continued_without_a_template(client, engine):
    expected = engine.submit(engine.prepare("What colour"), Sampling(max_new_tokens=16, verbatim=True))
    expected = "".join(piece.text for piece in expected)
    options = {"model": "tiny", "temperature": 0}
    completion = client.completions.create(prompt="What colour", **options)
    assert completion.choices[0].text == expected
    assert completion.usage.completion_tokens == 16  # OpenAI's default
    ids = engine.base.prompts.tokenizer("What colour").input_ids
    several = client.completions.create(prompt=[ids, engine.base.prompts.tokenizer("It is").input_ids], n=2, **options)
    assert [choice.text for choice in several.choices[:2]] == [expected] * 2
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens > completion.usage.prompt_tokens
    echoed = client.completions.create(prompt="What colour", echo=True, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "What colour" + expected


def test_log_probabilities_of_texts(client):
    choice = client.completions.create(model="tiny", prompt="What", logprobs=2, temperature=0, max_tokens=5).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 5
    given = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    assert all(top[token] == value for token, value, top in given)
    assert [choice.text[offset:] for offset in logprobs.text_offset][0] == choice.text


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": [400]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt.1"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, None),
        ({"prompt": ["a"] * 20}, "n"),
        ({"prompt": "word " * 3000}, "prompt"),
    ],
)
def test_texts_that_are_refused(http, body, param):
    response = http.post("/v1/completions", json={"model": "tiny"} | body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_tokens_and_back(http, engine):
    tokenizer = engine.base.prompts.tokenizer
    counted = http.post("/tokenize", json={"model": "tiny", "prompt": "What colour?"}).json()
    assert counted["tokens"] == tokenizer("What colour?").input_ids
    assert (counted["count"], counted["max_model_len"]) == (len(counted["tokens"]), engine.context)
    plain = http.post("/tokenize", json={"prompt": "What colour?", "add_special_tokens": False}).json()
    assert plain["tokens"] == counted["tokens"][1:]
    assert http.post("/detokenize", json={"tokens": plain["tokens"]}).json() == {"prompt": "What colour?"}
    chat = http.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["tokens"] == engine.prepare(Request([("user", "Hello")])).tokens.tolist()
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": data_url(noise_image())}]}]
    for path, body in (("tokenize", {"messages": image}), ("tokenize", {}), ("detokenize", {"tokens": [4000]})):
        assert http.post(f"/{path}", json=body).status_code == 400


# ----------------------------------------------------------------------------------------------------------- responses


def test_responses_are_the_answers_of_chat(client):
    image = data_url(noise_image())
    content = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": image}]
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What?"}]
    asked = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
    system = {"role": "system", "content": "Be brief."}
    for given, instructions, messages in (
        ("Hello", None, HELLO),
        ([{"role": "user", "content": content}], "Be brief.", [system, {"role": "user", "content": parts}]),
    ):
        chat = create(client, messages, max_completion_tokens=12)
        response = client.responses.create(input=given, instructions=instructions, **asked)
        assert response.output_text == text_of(chat)
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.usage.input_tokens == chat.usage.prompt_tokens
        assert response.usage.output_tokens == chat.usage.completion_tokens
        kinds, text = [], ""
        with client.responses.stream(input=given, instructions=instructions or openai.omit, **asked) as stream:
            for event in stream:
                kinds.append(event.type)
                text += event.delta if event.type == "response.output_text.delta" else ""
        assert event.response.output_text == text == response.output_text
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]


def test_a_conversation_of_responses_and_their_formats(client, http):
    first = client.responses.create(model="tiny", input="Hello", temperature=0, max_output_tokens=5)
    items = [*HELLO, *first.output, {"role": "user", "content": "And?"}]
    second = client.responses.create(model="tiny", input=items, temperature=0, max_output_tokens=5)
    said = {"role": "assistant", "content": first.output_text}
    chat = create(client, [*HELLO, said, {"role": "user", "content": "And?"}], max_completion_tokens=5)
    assert second.output_text == text_of(chat)
    parsed = client.responses.parse(model="tiny", input="Hello", text_format=Car, max_output_tokens=900)
    assert isinstance(parsed.output_parsed, Car) and parsed.status == "completed"
    for field, value in (("previous_response_id", "resp_1"), ("background", True), ("truncation", "auto")):
        error = http.post("/v1/responses", json={"model": "tiny", "input": "Hello", field: value}).json()["error"]
        assert (error["param"], error["code"]) == (field, "unsupported_parameter")


# --------------------------------------------------------------------------------------------------------------- tools

WEATHER = {
    "name": "get_weather",
    "description": "The weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
    },
    "strict": True,
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "stop"}}]


@pytest.fixture
def known(monkeypatch):
    """The tiny model's template counts as one with a format for tools."""
    monkeypatch.setitem(tools.FORMATS, "v1", tools.Tools)


def test_a_tool_is_called(client, known):
    named = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tools": TOOLS, "tool_choice": named, "max_completion_tokens": 900}
    whole = create(client, **options).choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
    streamed, reasons = {}, []
    for chunk in create(client, stream=True, **options):
        reasons.append(chunk.choices[0].finish_reason)
        for delta in chunk.choices[0].delta.tool_calls or ():
            name, arguments = streamed.get(delta.index, ("", ""))
            streamed[delta.index] = name + (delta.function.name or ""), arguments + (delta.function.arguments or "")
    assert streamed == {0: ("get_weather", call.function.arguments)}
    assert reasons[-1] == "tool_calls"
    again = [*HELLO, whole.message, {"role": "tool", "content": "Sunny", "tool_call_id": call.id}]
    assert text_of(create(client, again, max_completion_tokens=5)) is not None
    tool = {"type": "function", **WEATHER}
    response = client.responses.create(
        model="tiny", input="Hello", temperature=0, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (item,) = response.output
    assert (item.type, item.name) == ("function_call", "get_weather")
    with client.responses.stream(
        model="tiny", input="Hello", temperature=0, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        assert stream.get_final_response().output[0].arguments == item.arguments


def test_an_answer_after_calls_has_the_format_that_is_asked_for(client, http, known):
    """The last turn of an agent: the conversation has calls, and the answer may have none."""
    call = {"id": "a", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    past = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok", "tool_call_id": "a"}]
    choice = {"extra_body": {"guided_choice": ["yes", "no"]}}
    assert text_of(create(client, past, **choice)) in ("yes", "no")
    assert text_of(create(client, past, tools=TOOLS, tool_choice="none", **choice)) in ("yes", "no")
    counted = http.post("/tokenize", json={"messages": past}).json()["count"]
    assert counted == create(client, past, max_completion_tokens=1).usage.prompt_tokens


def test_calls_and_texts_of_a_response_are_items_in_their_order(client, known, monkeypatch):
    """Each has an index, is added before it changes, and ends before the next."""
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    said = f"First.\n{call}\nThen.\n{call}"
    monkeypatch.setattr(tools.Tools, "grammar", lambda self, tokenizer: f"start: {json.dumps(said)}")
    asked = {"model": "tiny", "input": "Hello", "tools": [{"type": "function", "name": "stop"}]}
    kinds = ["message", "function_call", "message", "function_call"]
    response = client.responses.create(**asked, max_output_tokens=900)
    assert [item.type for item in response.output] == kinds
    assert [item.content[0].text for item in response.output[::2]] == ["First.", "Then."]
    begun, ended = [], []
    with client.responses.stream(**asked, max_output_tokens=900) as stream:
        for event in stream:
            if event.type == "response.output_item.added":
                assert begun == ended
                begun.append((event.output_index, event.item.type, event.item.id))
            elif event.type == "response.output_item.done":
                ended.append((event.output_index, event.item.type, event.item.id))
            elif hasattr(event, "item_id"):
                assert (event.output_index, event.item_id) == (begun[-1][0], begun[-1][2]) and begun != ended
        final = stream.get_final_response()
    assert begun == ended and [(index, kind) for index, kind, _ in ended] == list(enumerate(kinds))
    assert [item.id for item in final.output] == [ident for *_, ident in ended]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 3_000_000}}]}, "tools"),
        ({"ignore_eos": True}, None),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "stop", "arguments": "[" * 20_000}}]}, *HELLO]},
         "messages.1.tool_calls.0.function.arguments"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "stop", "arguments": f'"{"x" * 3_000_000}"'}}]},
            *HELLO]}, "messages"),
    ],
)  # fmt: skip
def test_requests_with_tools_that_are_refused(http, known, changes, param):
    body = {"model": "tiny", "messages": HELLO, "tools": TOOLS} | changes
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_tools_and_formats_exclude_each_other(client, known):
    with pytest.raises(openai.BadRequestError, match="tools: an answer can call tools or have a format"):
        create(client, tools=TOOLS, response_format={"type": "json_object"})
    assert create(client, tools=TOOLS, tool_choice="none", max_completion_tokens=6).choices[
        0
    ].message.content == text_of(create(client, max_completion_tokens=6))


def test_a_format_whose_tokens_take_too_much_work_is_an_error_that_says_so(http, client, monkeypatch):
    def fail(matcher):
        raise constraints.ConstraintFailed("too many items")

    monkeypatch.setattr(constraints.Constraint, "mask", fail)
    body = {"model": "tiny", "messages": HELLO, "guided_regex": "a"}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "takes too much work (too many items)" in response.json()["error"]["message"]
    with pytest.raises(openai.APIError, match="takes too much work"):
        list(create(client, stream=True, extra_body={"guided_regex": "a"}))
