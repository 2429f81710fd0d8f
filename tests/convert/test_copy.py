"""A workdir without its source: copied into it or to a checkpoint of its own, whole, bit for bit."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from training_runs import final, make_config, stop_at

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert import __main__ as convert
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.files.lock import hold
from llava_jax.training import loop


@pytest.fixture
def source(tmp_path) -> Path:
    """A checkpoint of several types, as an import may be."""
    model = tiny.config()
    types = {"vision": jnp.float16, "projector": jnp.float32, "llm": jnp.bfloat16}
    params = {name: value.astype(types[name.split(".")[0]]) for name, value in tiny.params(model).items()}
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny.save_model(tmp_path / "source", params, Description(model, "plain", {"a": 1}), str(tmp_path / "tokenizer"))
    return tmp_path / "source"


@pytest.fixture
def config(source, tmp_path):
    file, images = tiny.data(tmp_path)
    config = make_config("pretrain", init=str(source), template="plain", max_length=64, batch_rows=4, steps=4)
    config.learning_rate = 1e-2
    config.data.json, config.data.images = str(file), str(images)
    return config.lock()


def test_a_workdir_with_a_copy_resumes_without_its_source_wherever_it_is(source, config, tmp_path, capsys):
    loop.train(config, str(tmp_path / "whole"))
    workdir = tmp_path / "run"
    stop_at(2, config, workdir)
    told = capsys.readouterr().err
    assert f"needs      {source}, as the frozen parameters are not stored here" in told
    assert f"convert copy-frozen --checkpoint {workdir}" in told
    before, expected = final(workdir), final(tmp_path / "whole")
    with hold(epath.Path(workdir / "frozen")), pytest.raises(UserError, match="frozen: is in use by another process"):
        convert.main(["copy-frozen", "--checkpoint", str(workdir)])
    (source_of,) = open_checkpoint(workdir).description.sources
    cut = workdir / "frozen" / source_of.id / "params"  # as an interrupted copy in a bucket is
    cut.mkdir(parents=True)
    assert convert.main(["copy-frozen", "--checkpoint", str(workdir)]) is None
    assert f"copied from {source}" in capsys.readouterr().out
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(workdir, moved)
    convert.main(["copy-frozen", "--checkpoint", str(moved)])
    assert "has a copy already" in capsys.readouterr().out
    shutil.rmtree(source)
    for name, value in final(moved).items():
        assert value.dtype == before[name].dtype
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    loop.train(config, str(moved))
    assert "needs " not in capsys.readouterr().err
    for name, value in final(moved).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    with pytest.raises(UserError, match="its frozen parameters come from .*/source, which no longer exists"):
        loop.train(config, str(tmp_path / "whole"))


def test_the_next_stage_takes_its_frozen_parameters_from_the_copy(source, config, tmp_path):
    stage_1, stage_2 = tmp_path / "stage_1", tmp_path / "stage_2"
    loop.train(config, str(stage_1))
    vision = {name: value for name, value in final(stage_1).items() if name.startswith("vision.")}
    convert.main(["copy-frozen", "--checkpoint", str(stage_1)])
    shutil.rmtree(source)
    with config.unlocked():
        config.update(stage="finetune", template="v1", init=str(stage_1))
    loop.train(config, str(stage_2))
    (needed,) = open_checkpoint(stage_2).description.sources
    assert Path(needed.path).is_relative_to(stage_1 / "frozen")
    for name, value in vision.items():
        np.testing.assert_array_equal(final(stage_2)[name], value, err_msg=name)


def test_a_copy_is_a_checkpoint_of_its_own(source, config, tmp_path, capsys):
    workdir, output = tmp_path / "run", tmp_path / "copy"
    loop.train(config, str(workdir))
    expected, whole = final(workdir), open_checkpoint(workdir)
    convert.main(["copy", "--checkpoint", str(workdir), "--output", str(output)])
    shutil.rmtree(source)
    shutil.rmtree(workdir)
    copied = open_checkpoint(output)
    assert copied.description.sources == () and copied.step is None
    kept = ("model", "template", "hf", "stage")
    assert [getattr(copied.description, key) for key in kept] == [getattr(whole.description, key) for key in kept]
    assert copied.description.id != whole.description.id
    assert len(load_tokenizer(copied.tokenizer_dir)) == len(tiny.tokenizer())
    loaded = final(output)
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        assert value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    with pytest.raises(UserError, match="exists already"):
        convert.main(["copy", "--checkpoint", str(output), "--output", str(output)])
    with pytest.raises(UserError, match="not a training workdir, so it holds all its parameters already"):
        convert.main(["copy-frozen", "--checkpoint", str(output)])


def test_a_copy_that_cannot_be_finished_leaves_nothing(source, config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    loop.train(config, str(workdir))
    (damaged,) = (source / "params" / "state").glob("vision.post_layernorm.scale")
    shutil.rmtree(damaged)
    for arguments in (["copy-frozen"], ["copy", "--output", str(tmp_path / "copy")]):
        with pytest.raises(UserError, match="damaged"):
            convert.main([*arguments, "--checkpoint", str(workdir)])
    assert not (tmp_path / "copy").exists() and not list(workdir.glob("frozen/*"))
