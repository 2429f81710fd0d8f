"""Models are written completely or not at all."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.writing import new_directory
from llava_jax.cli import UserError


def test_a_model_comes_back_bit_equal_in_its_own_types(tmp_path):
    model = tiny.config()
    params = tiny.params(model)
    types = [jnp.float32, jnp.bfloat16, jnp.float16]
    params = {name: value.astype(types[i % 3]) for i, (name, value) in enumerate(params.items())}
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny.save_model(tmp_path / "model", params, Description(model, "v1", {"a": 1}), str(tmp_path / "tokenizer"))
    checkpoint = open_checkpoint(tmp_path / "model")
    assert (checkpoint.config, checkpoint.template, checkpoint.description.hf) == (model, "v1", {"a": 1})
    loaded = checkpoint.load()
    assert list(loaded) == sorted(params)
    for name, value in loaded.items():
        assert value.dtype == params[name].dtype
        np.testing.assert_array_equal(value, params[name])
    some = checkpoint.load(["llm.norm.scale"], dtype=lambda name, stored: jnp.float32)
    assert [(name, value.dtype) for name, value in some.items()] == [("llm.norm.scale", jnp.float32)]
    assert (checkpoint.tokenizer_dir / "tokenizer.json").exists()


def test_nothing_is_left_behind_by_a_failed_save(tmp_path):
    model = tiny.config()
    params = tiny.params(model)
    with pytest.raises(FileNotFoundError):
        tiny.save_model(tmp_path / "model", params, Description(model, "v1"), str(tmp_path / "no_tokenizer"))
    assert not list(tmp_path.iterdir())
    del params["llm.norm.scale"]
    with pytest.raises(UserError, match="missing llm.norm.scale"):
        tiny.save_model(tmp_path / "model", params, Description(model, "v1"), str(tmp_path))


def test_an_existing_output_is_not_overwritten(tmp_path, model_dir):
    with pytest.raises(UserError, match="exists already"):
        tiny.checkpoint(tmp_path)


def test_an_empty_output_is_replaced_also_through_a_link(tmp_path, monkeypatch):
    for name in ("empty", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    for name, stays in (("empty", "empty"), ("link", "target")):
        with new_directory(epath.Path(tmp_path / name)) as partial:
            (partial / "a").write_text("new")
        assert (tmp_path / stays / "a").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "mount").mkdir()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "notes~").write_text("kept")  # which etils does not list
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path).endswith("mount"))
    for name, message in (("mount", "is where a disk is mounted"), ("hidden", "exists already")):
        with pytest.raises(UserError, match=f"{name}: {message}"), new_directory(epath.Path(tmp_path / name)):
            pytest.fail("began")
    assert (tmp_path / "hidden" / "notes~").read_text() == "kept"


def test_of_two_who_write_the_same_output_the_first_to_finish_stays(tmp_path):
    output = epath.Path(tmp_path / "model")
    with pytest.raises(UserError, match="model: exists already"), new_directory(output) as mine:
        (mine / "a").write_text("mine")
        with new_directory(output) as theirs:
            (theirs / "a").write_text("theirs")
    assert (output / "a").read_text() == "theirs" and list(tmp_path.iterdir()) == [output]
