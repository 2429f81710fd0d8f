"""Encodings and pointers of files from outside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.incoming import POINTER, refuse_pointer_file, to_utf8

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
