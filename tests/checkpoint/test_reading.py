"""Checkpoints survive moves; what is damaged or not a checkpoint is refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from checkpoint_steps import trained

from llava_jax.checkpoint import reading
from llava_jax.checkpoint.array_store import is_layered
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError


def test_a_layer_is_read_alone(tmp_path, model_dir):
    checkpoints, workdir, *_ = trained(tmp_path, model_dir, steps=(1,))
    checkpoints.close()
    checkpoint = open_checkpoint(workdir)
    for name, value in checkpoint.load().items():
        np.testing.assert_array_equal(checkpoint.read(name), value)
        if ".layers." in name:
            np.testing.assert_array_equal(checkpoint.read(name, 1), value[1])


def test_large_weights_are_loaded_in_parts_with_progress(tmp_path, model_dir, monkeypatch, capsys):
    checkpoints, workdir, *_ = trained(tmp_path, model_dir, steps=(1,))
    checkpoints.close()
    checkpoint = open_checkpoint(workdir)
    at_once = checkpoint.load()
    assert "loading" not in capsys.readouterr().err
    monkeypatch.setattr(reading, "PART_BYTES", 1)
    monkeypatch.setattr(reading, "track", functools.partial(reading.track, every=0.0))
    parameter_by_parameter = checkpoint.load()
    assert list(at_once) == list(parameter_by_parameter)
    for name, value in at_once.items():
        np.testing.assert_array_equal(parameter_by_parameter[name], value)
    shown = capsys.readouterr().err
    assert f"{len(at_once)}/{len(at_once)}, 0:00:00 left: loading {workdir}" in shown


def test_names_and_places_of_directories_do_not_matter(tmp_path):
    (tmp_path / "here").mkdir()
    checkpoints, *_ = trained(tmp_path / "here", tiny.checkpoint(tmp_path / "here"))
    checkpoints.close()
    (tmp_path / "here").rename(tmp_path / "there")
    assert len(open_checkpoint(tmp_path / "there" / "run").load()) == len(tiny.params(tiny.config()))


def test_a_source_that_is_gone_or_rewritten_is_refused(tmp_path, model_dir):
    checkpoints, workdir, *_ = trained(tmp_path, model_dir)
    checkpoints.close()
    description = json.loads((model_dir / "llava.json").read_text())
    (model_dir / "llava.json").write_text(json.dumps(description | {"id": "another"}))
    with pytest.raises(UserError, match="no longer exists or has been overwritten"):
        open_checkpoint(workdir).load()
    model_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no longer exists or has been overwritten"):
        open_checkpoint(workdir).load()


def test_a_flipped_bit_of_an_import_is_an_error_that_names_the_array(tmp_path, model_dir):
    expected = open_checkpoint(model_dir).load()
    for number, (name, value) in enumerate(expected.items()):
        file = next(file for file in (model_dir / "params" / "state" / name / "c").rglob("*") if file.is_file())
        whole = file.read_bytes()
        data = bytearray(whole)
        data[number % value.nbytes] ^= 1 << number % 8
        file.write_bytes(data)
        said = f"is damaged .{name}: Digest mismatch.*: import or copy it again"
        with pytest.raises(UserError, match=said):
            open_checkpoint(model_dir).load()
        with pytest.raises(UserError, match=said):
            for layer in range(len(value)) if is_layered(name, value.ndim) else [None]:
                open_checkpoint(model_dir).read(name, layer)
        file.write_bytes(whole)
    loaded = open_checkpoint(model_dir).load()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, expected[name])


def test_what_is_no_checkpoint_is_refused(tmp_path, model_dir):
    with pytest.raises(UserError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither the output of `convert import`"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="without a finished checkpoint"):
        open_checkpoint(tmp_path / "run")
    (model_dir / "llava.json").write_text("{")
    with pytest.raises(UserError, match="damaged description"):
        open_checkpoint(model_dir)


def test_arrays_without_files_are_not_read_as_zeros(tmp_path, model_dir):
    """Their shapes fit the description: 100 GB of zeros, in a few kilobytes."""
    file = model_dir / "llava.json"
    description = json.loads(file.read_text())
    description["model"]["text"]["vocab_size"] = 2**22
    file.write_text(json.dumps(description))
    for name in ("llm.embed_tokens.embedding", "llm.lm_head.kernel"):
        for metadata in model_dir.rglob(f"{name}/zarr.json"):
            values = json.loads(metadata.read_text())
            axis = values["shape"].index(tiny.VOCAB)
            values["shape"][axis] = 2**22
            values["chunk_grid"]["configuration"]["chunk_shape"][axis] = 2**22
            for codec in values["codecs"]:
                codec["configuration"].get("chunk_shape", [0, 0])[axis] = 2**22
            metadata.write_text(json.dumps(values))
    with pytest.raises(UserError, match="params: claims .* GB of parameters, but holds"):
        open_checkpoint(model_dir).load()


@pytest.mark.parametrize("path", ["gs://others/model", "http://169.254.169.254/latest", "s3://a/b"])
def test_a_place_that_only_a_file_names_is_not_contacted(path, tmp_path, model_dir, monkeypatch):
    checkpoints, workdir, *_ = trained(tmp_path, model_dir)
    checkpoints.close()
    step = open_checkpoint(workdir)
    source = dataclasses.replace(step.description.sources[0], path=path, relative=path)
    step = dataclasses.replace(step, description=dataclasses.replace(step.description, sources=(source,)))
    exists = type(workdir).exists
    monkeypatch.setattr(type(workdir), "exists", lambda self: exists(self) and "//" not in str(self))
    monkeypatch.setattr("llava_jax.checkpoint.reading.open_checkpoint", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(UserError, match=f"names but you did not.*convert copy-frozen .*--source {path}$"):
        step.holders  # noqa: B018  # opens its sources
    with pytest.raises(UserError, match="names but you did not"):
        step.load()


@pytest.mark.parametrize("spoil", ["truncate", "remove"])
def test_a_damaged_checkpoint_is_an_error_of_one_line(spoil, tmp_path, model_dir):
    damaged = Path(shutil.copytree(model_dir, tmp_path / "damaged"))
    for file in (damaged / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10]) if spoil == "truncate" else file.unlink()
    with pytest.raises(UserError, match="damaged") as raised:
        open_checkpoint(damaged).load()
    assert "\n" not in str(raised.value)


def test_a_pointer_of_git_lfs_is_named(tmp_path, model_dir):
    clone = Path(shutil.copytree(model_dir, tmp_path / "clone"))
    largest = max(
        (file for file in (clone / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    for file in (largest, clone / "llava.json"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
        with pytest.raises(UserError, match=f"{file}: is a Git LFS pointer"):
            open_checkpoint(clone).load()
