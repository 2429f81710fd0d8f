"""Encodings and pointers of files from outside."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.files.reading import (
    MAX_DEPTH,
    MAX_DIGITS,
    POINTER,
    loads,
    parse_json,
    read_bytes,
    read_json,
    read_object,
    refuse_pointer_file,
    to_utf8,
)

TEXT = POINTER + b"\noid sha256:4d7a2146\nsize 123\n"


@given(
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]),
)
def test_text_of_each_encoding_is_read(text, encoding):
    text = '{"a": "' + text
    assert to_utf8(text.encode(encoding), "F").decode() == text


def test_broken_text_is_named():
    with pytest.raises(UserError, match="F: is no UTF-16: truncated data; convert it"):
        to_utf8("abcd".encode("utf-16")[:-1], "F")


def test_pointers_are_named_with_the_way_out(tmp_path):
    file = tmp_path / "model.safetensors"
    refuse_pointer_file(file)  # which is not there
    file.write_bytes(TEXT)
    for look in (lambda: refuse_pointer_file(file), lambda: to_utf8(TEXT, file)):
        with pytest.raises(UserError, match="model.safetensors: is a Git LFS pointer.*git lfs pull"):
            look()
    file.write_bytes(b"version 2")
    refuse_pointer_file(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)  # fmt: skip


@given(JSON, st.booleans(), st.booleans())
def test_what_is_json_is_parsed(value, strict, ascii):
    text = json.dumps(value, ensure_ascii=ascii)
    assert loads(text, strict=strict) == loads(text.encode(), strict=strict) == value


@given(st.binary() | st.text().map(lambda text: text.encode(errors="replace")), st.booleans())
def test_any_bytes_are_json_or_a_line_of_error(data, strict):
    try:
        parse_json(data, "F", strict=strict)
    except UserError as error:
        assert str(error).startswith("F: is ") and "\n" not in str(error)


ALWAYS = {
    "[" * 100_000: "nested more than 100 deep",
    "[" * 100_000 + "]" * 100_000: "nested more than 100 deep",
    "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1): "nested more than 100 deep",
    '{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1): "nested more than 100 deep",
    '{"a": ' + "9" * 5000 + "}": "number of 5000 digits",
    "-" + "9" * MAX_DIGITS: "number of 301 digits",
    "[1] [2]": "Extra data",
    "": "Expecting value",
}
STRICT = {
    '{"a": 1, "a": 1}': "holds 'a' twice",
    '[{"\\u001b": 1, "\\u001b": 1}]': r"holds '\\x1b' twice",
    "[NaN]": "NaN",
    '{"a": -Infinity}': "-Infinity",
    "1e999": "1e999, which is no finite number",
    '"\\ud800"': "surrogates not allowed",
    '{"\\udc00": 1}': "surrogates not allowed",
}


@pytest.mark.parametrize("text", ALWAYS)
@pytest.mark.parametrize("strict", [True, False])
def test_json_beyond_the_bounds_is_refused(text, strict):
    with pytest.raises(ValueError, match=ALWAYS[text]):
        loads(text, strict=strict)
    with pytest.raises(UserError, match=f"F: is no JSON: .*{ALWAYS[text]}"):
        parse_json(text.encode(), "F", strict=strict)


@pytest.mark.parametrize("text", STRICT)
def test_what_json_leaves_open_is_refused_unless_it_is_asked_for(text):
    with pytest.raises(ValueError, match=STRICT[text]):
        loads(text)
    loads(text, strict=False)


def test_json_at_the_bounds_is_parsed():
    assert loads("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert loads("[" + "[[]]," * 1000 + "{}]")[999] == [[]]
    assert loads('"\\ud83d\\ude42"') == "\N{SLIGHTLY SMILING FACE}"


def test_json_in_utf16_and_a_pointer_in_its_place():
    assert parse_json('{"a": "\u00e9"}'.encode("utf-16"), "F") == {"a": "\u00e9"}
    with pytest.raises(UserError, match="F: is a Git LFS pointer"):
        parse_json(TEXT, "F")
    with pytest.raises(UserError, match="F: is no UTF-8: invalid"):
        parse_json(b'{"a": "\xff"}', "F")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "object").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("object")
    (tmp_path / "list").write_text("[1]")
    assert read_object(tmp_path / "link") == {"a": 1}
    assert read_json(tmp_path / "list") == [1]
    for name, fault in {
        "fifo": "fifo: is a device, pipe or socket, not a file",
        "/dev/zero": "/dev/zero: is a device, pipe or socket, not a file",
        ".": "is a folder, not a file",
        "loop": "loop': cannot be opened",
        "x" * 300: "cannot be opened",
        "a\0b": r"a\\x00b': cannot be opened",
        "none": "none: no such file",
        "object/x": "object/x: no such file",
        "list": "list: is not a JSON object",
    }.items():
        with pytest.raises(UserError, match=fault):
            read_object(tmp_path / name)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    file = tmp_path / "F"
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(UserError, match="F: is larger than 8 MiB"):
        read_json(file)
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(UserError, match="F: is larger than"):
        read_bytes(file, 4)
