"""Formats that a user's module registers are read as LLaVA's, in this process and in others."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny

from llava_jax.cli import UserError
from llava_jax.data import check
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.formats import FORMATS, DataFormat, register
from llava_jax.data.lengths import measure
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import TEMPLATES, get_template
from llava_jax.data.templates import register as register_template

MODULE = """
from llava_jax.data.formats import DataFormat, register


def matches(value):
    return "instruction" in value


def convert(value):
    turns = [{"from": "human", "value": value["instruction"]}, {"from": "gpt", "value": value["output"]}]
    return {"id": value["id"], "conversations": turns}


FORMAT = register(DataFormat("asked", matches, convert))
"""
RECORDS = [
    {"id": "a", "instruction": "What is it?", "output": "A bus."},
    {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(FORMATS, "data", dict(FORMATS))
    (tmp_path / "asked_format.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import asked_format

    yield asked_format.FORMAT
    del sys.modules["asked_format"]


def write(tmp_path, records):
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_a_registered_format_is_read(asked, tmp_path):
    first, second = LlavaJson(write(tmp_path, RECORDS))
    assert first.id == "a" and first.turns == (("user", "What is it?"), ("assistant", "A bus."))
    assert second.turns == (("user", "Hi"), ("assistant", "Hello"))


def test_the_check_reads_it_too(asked, tmp_path, capsys):
    assert check.main(["--json", str(write(tmp_path, RECORDS)), "--images", str(tmp_path)]) == 0
    assert not capsys.readouterr().out


def test_processes_that_read_know_it(asked, tmp_path):
    encode = TextEncoder(get_template("v1"), tiny.tokenizer(), image_tokens=4, max_length=96)
    encoded = EncodedSource(LlavaJson(write(tmp_path, RECORDS * 3)), encode)
    np.testing.assert_array_equal(measure(encoded, workers=1), measure(encoded))


def test_a_record_that_cannot_be_converted_is_an_error_with_its_place(asked, tmp_path):
    with pytest.raises(UserError, match="data.json: sample 1: is no sample of format asked: KeyError: 'output'"):
        LlavaJson(write(tmp_path, [RECORDS[0], {"id": "c", "instruction": "What?"}]))


def test_another_version_of_a_format_is_read_anew(asked, tmp_path):
    path = write(tmp_path, RECORDS)
    before = LlavaJson(path).digest
    FORMATS["asked"] = dataclasses.replace(asked, convert=lambda value: RECORDS[1], version=2)
    assert LlavaJson(path).digest != before
    FORMATS["asked"] = asked
    assert LlavaJson(path).digest == before


def test_a_name_is_registered_once(asked):
    assert register(asked) is asked
    with pytest.raises(ValueError, match="data format 'asked' is registered already"):
        register(DataFormat("asked", len, len))


def test_templates_are_registered_once(monkeypatch):
    monkeypatch.setattr(TEMPLATES, "data", dict(TEMPLATES))
    monkeypatch.setattr(TEMPLATES, "aliases", {})
    mine = register_template(dataclasses.replace(get_template("v1"), name="mine", reply="ME:"), "my_alias")
    assert get_template("mine") is get_template("my_alias") is mine and register_template(mine) is mine
    for name in ("v1", "mine", "my_alias"):
        with pytest.raises(ValueError, match=f"template '{name}' is registered already"):
            register_template(dataclasses.replace(mine, name=name, reply="YOU:"))
