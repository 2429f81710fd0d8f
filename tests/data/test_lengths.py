"""Lengths are measured once for all that they depend on, and again when any of that is another."""

import dataclasses

import numpy as np
import pytest
import tiny

from llava_jax.cli import UserError
from llava_jax.data import lengths
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import measure, measure_once
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.files import cache


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return LlavaJson(*tiny.data(tmp_path, samples=20))


@pytest.fixture
def encode():
    return TextEncoder(get_template("v1"), tiny.tokenizer(), image_tokens=4, max_length=64)


def test_a_second_time_nothing_is_encoded(source, encode, monkeypatch):
    expected = measure(EncodedSource(source, encode))
    np.testing.assert_array_equal(measure_once(EncodedSource(source, encode)), expected)
    monkeypatch.setattr(lengths, "measure", None)
    again = TextEncoder(get_template("v1"), tiny.tokenizer(), image_tokens=4, max_length=64)
    np.testing.assert_array_equal(measure_once(EncodedSource(source, again)), expected)


def test_what_lengths_depend_on_is_measured_anew(source, encode, tmp_path, monkeypatch):
    measure_once(EncodedSource(source, encode))
    monkeypatch.setattr(lengths, "measure", lambda *args, **options: pytest.fail("measured"))
    larger = tiny.tokenizer()
    larger.add_tokens(["picture"])
    (tmp_path / "other").mkdir()
    other = LlavaJson(*tiny.data(tmp_path / "other", samples=19))
    for data, changed in [
        (source, dataclasses.replace(encode, template=get_template("chatml"))),
        (source, dataclasses.replace(encode, image_tokens=5)),
        (source, dataclasses.replace(encode, max_length=65)),
        (source, dataclasses.replace(encode, image_position="random")),
        (source, dataclasses.replace(encode, seed=1)),
        (source, dataclasses.replace(encode, tokenizer=larger)),
        (other, encode),
    ]:
        with pytest.raises(pytest.fail.Exception, match="measured"):
            measure_once(EncodedSource(data, changed))
    measure_once(EncodedSource(source, encode))


def test_bad_samples_that_were_skipped_are_errors_for_those_who_do_not_skip(source, encode):
    short = dataclasses.replace(encode, max_length=2)
    skipped = measure_once(EncodedSource(source, short, skip_bad=True))
    assert not skipped.tokens.all()
    with pytest.raises(UserError, match="nothing to learn"):
        measure_once(EncodedSource(source, short))
    np.testing.assert_array_equal(measure_once(EncodedSource(source, short, skip_bad=True)), skipped)


def test_damaged_caches_are_none(source, encode):
    expected = measure_once(EncodedSource(source, encode))
    for file in cache.directory().glob("lengths-*"):
        file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(measure_once(EncodedSource(source, encode)), expected)
