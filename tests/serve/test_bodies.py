"""Bodies of requests: whatever they hold, they are refused before they take time or memory."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.serve import bodies
from llava_jax.serve.bodies import MAX_DEPTH, MAX_KEYS, MAX_TEXT, MAX_VALUES, check, parse
from llava_jax.serve.errors import ApiError
from llava_jax.serve.schema import MAX_ITEMS, ChatRequest

MB = 1 << 20
SIZE = 32 * MB


def request(content: bytes) -> bytes:
    return b'{"model": "tiny", "messages": [{"role": "user", "content": %s}]}' % content


BOMBS = {
    "zeros": lambda: request(b"[" + b",".join([b"0"] * (SIZE // 2)) + b"]"),
    "empty lists": lambda: request(b"[" + b",".join([b"[]"] * (SIZE // 3)) + b"]"),
    "nested lists": lambda: b"[" * SIZE,
    "nested objects": lambda: b'{"a":' * (SIZE // 5),
    "digits": lambda: request(b"1" * SIZE),
    "numbers of 5000 digits": lambda: request(b"[" + b",".join([b"1" * 5000] * (SIZE // 5001)) + b"]"),
    "one text": lambda: request(b'"' + b"a" * SIZE + b'"'),
    "one text of escapes": lambda: request(b'"' + b"\\n" * (SIZE // 2) + b'"'),
    "one key": lambda: b'{"' + b"a" * SIZE + b'": 1}',
    "keys": lambda: b"{" + b",".join(b'"%d":0' % i for i in range(2_000_000)) + b"}",
    "one key again and again": lambda: b"{" + b'"a":0,' * (SIZE // 6) + b'"a":0}',
    "messages": lambda: b'{"messages": [' + b'{"role":"user"},' * (SIZE // 16) + b"0]}",
    "surrogates": lambda: request(b'"' + b"\\ud800" * (SIZE // 6) + b'"'),
    "spaces": lambda: b" " * SIZE,
    "commas": lambda: b"," * SIZE,
    "an open text": lambda: b'"' + b"a" * SIZE,
    "open texts": lambda: b'"\\"' * (SIZE // 3),
    "not UTF-8": lambda: request(b'"' + b"\xff" * SIZE + b'"'),
    "a data URL that is not ASCII": lambda: request(b'"data:' + b"a" * SIZE + "\N{CAT}".encode() + b'"'),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_without_taking_memory(name):
    data = BOMBS[name]()
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as error:
            parse(data, ChatRequest)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.value.status_code == 400
    assert len(json.dumps(error.value.body())) < 1000
    assert peak < 70 * MB  # a 32 MB copy of a text, and no more


@pytest.mark.parametrize(
    "data, what",
    [
        (b"[" * (MAX_DEPTH + 1), "nested more than"),
        (b"[" + b"1," * (MAX_VALUES + 1), "values"),
        (b'{"a": 1, "b": {"a": 2}, "a": 3}', "twice"),
        (b'{"a": 1, "\\u0061": 2}', "twice"),
        (b"{" + b",".join(b'"%d": 1' % i for i in range(MAX_KEYS + 1)) + b"}", "keys"),
        (b'"' + b"a" * MAX_TEXT + b'"', "text"),
        (b"1" * 101, "100 characters"),
    ],
)
def test_what_goes_beyond_the_bounds(data, what):
    with pytest.raises(ApiError, match=what):
        check(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(-1e300, 1e300) | st.integers(-(10**30), 10**30) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values, st.sampled_from([None, 2]), st.booleans())
def test_whatever_is_json_passes(value, indent, ascii):
    check(json.dumps(value, indent=indent, ensure_ascii=ascii).encode(errors="replace"))


@given(st.binary() | st.text(alphabet='{}[]",:\\ 0a').map(str.encode))
def test_whatever_is_not_is_refused_by_the_api(data):
    with pytest.raises(ApiError):
        parse(data, ChatRequest)


def test_a_large_request_in_order_is_one():
    url = "data:image/png;base64," + "A" * (20 * MB)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "caf\u00e9 \N{CAT}"}]
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}, ensure_ascii=False)
    for text in (body, body.replace("/png", "\\/png")):
        image, text = parse(text.encode(), ChatRequest).messages[0].content
        assert (image.image_url.url, text.text) == (url, "caf\u00e9 \N{CAT}")


def test_validation_stops_at_the_first_bad_item():
    bad = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": 1}] * MAX_ITEMS}] * 5}
    with pytest.raises(ApiError) as error:
        parse(json.dumps(bad).encode(), ChatRequest)
    assert error.value.param == "messages.0.content.0.text"


def test_what_has_no_influence_is_not_kept():
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "user": "u" * MB, "metadata": {"a": 1}}
    chat = parse(json.dumps(body).encode(), ChatRequest)
    assert chat.user is chat.metadata is None


def test_too_many_items_are_refused():
    many = [{"role": "user", "content": "a"}] * (MAX_ITEMS + 1)
    with pytest.raises(ApiError, match="messages"):
        parse(json.dumps({"model": "tiny", "messages": many}).encode(), ChatRequest)


def test_parses_wait_for_each_other():
    assert bodies.BoundedRoute.parsing.total_tokens < 4
