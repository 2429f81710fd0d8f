"""Checkpoints describe themselves and survive moves; what does not fit is refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from llava_jax.checkpoint.array_store import is_layered, open_array
from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.checkpoint.writing import new_directory, save_model
from llava_jax.cli import UserError


@pytest.fixture
def model_dir(tmp_path):
    return tiny.checkpoint(tmp_path)


def test_a_model_comes_back_bit_equal_in_its_own_types(tmp_path):
    model = tiny.config()
    params = tiny.params(model)
    types = [jnp.float32, jnp.bfloat16, jnp.float16]
    params = {name: value.astype(types[i % 3]) for i, (name, value) in enumerate(params.items())}
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_model(tmp_path / "model", params, Description(model, "v1", {"a": 1}), str(tmp_path / "tokenizer"))
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


def trained(tmp_path, model_dir, steps=(0, 2, 4), keep=2):
    source = open_checkpoint(model_dir)
    workdir = epath.Path(tmp_path / "run")
    trainable = {name: value + 1 for name, value in source.load().items() if name.startswith("projector.")}
    frozen = [name for name in source.abstract() if name not in trainable]
    description = Description(source.config, "plain", sources=source.sources_of(frozen, workdir), stage="pretrain")
    checkpoints = TrainingCheckpoints(workdir, description, keep)
    optimizer = optax.adamw(1e-3).init(trainable)
    for step in steps:
        checkpoints.save(step, trainable, optimizer)
    return checkpoints, workdir, trainable, optimizer


def test_steps_are_kept_and_restored_and_refer_to_what_they_do_not_hold(tmp_path, model_dir):
    checkpoints, workdir, trainable, optimizer = trained(tmp_path, model_dir)
    restored, state = checkpoints.restore(4, trainable, optimizer)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer)
    np.testing.assert_array_equal(restored["projector.linear_1.bias"], trainable["projector.linear_1.bias"])
    checkpoints.close()
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir() if entry.name.isdecimal()) == ["2", "4"]
    source = open_checkpoint(model_dir).load()
    for path in (workdir, workdir / "checkpoints" / "2"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.template == "plain" and checkpoint.step in (2, 4)
        assert set(checkpoint.stored) == set(trainable)
        for name, value in checkpoint.load().items():
            np.testing.assert_array_equal(value, trainable.get(name, source[name]))


def test_a_layer_is_read_alone(tmp_path, model_dir):
    checkpoints, workdir, *_ = trained(tmp_path, model_dir, steps=(1,))
    checkpoints.close()
    checkpoint = open_checkpoint(workdir)
    for name, value in checkpoint.load().items():
        np.testing.assert_array_equal(checkpoint.read(name), value)
        if ".layers." in name:
            np.testing.assert_array_equal(checkpoint.read(name, 1), value[1])


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
    with pytest.raises(UserError, match="gone or was written anew"):
        open_checkpoint(workdir).load()
    model_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="gone or was written anew"):
        open_checkpoint(workdir).load()


def test_nothing_is_left_behind_by_a_failed_save(tmp_path):
    model = tiny.config()
    params = tiny.params(model)
    with pytest.raises(FileNotFoundError):
        save_model(tmp_path / "model", params, Description(model, "v1"), str(tmp_path / "no_tokenizer"))
    assert not list(tmp_path.iterdir())
    del params["llm.norm.scale"]
    with pytest.raises(UserError, match="missing llm.norm.scale"):
        save_model(tmp_path / "model", params, Description(model, "v1"), str(tmp_path))


def test_an_existing_output_is_not_overwritten(tmp_path, model_dir):
    with pytest.raises(UserError, match="exists already"):
        tiny.checkpoint(tmp_path)


def test_of_two_who_write_the_same_output_the_first_to_finish_stays(tmp_path):
    output = epath.Path(tmp_path / "model")
    with pytest.raises(UserError, match="model: exists already"), new_directory(output) as mine:
        (mine / "a").write_text("mine")
        with new_directory(output) as theirs:
            (theirs / "a").write_text("theirs")
    assert (output / "a").read_text() == "theirs" and list(tmp_path.iterdir()) == [output]


def test_every_chunk_is_stored_with_a_checksum_and_those_without_still_open(tmp_path, model_dir, monkeypatch):
    """Steps, imports and what is inside of them; checkpoints of earlier versions have none."""
    for summed in (True, False):
        with monkeypatch.context() as patch:
            if not summed:
                plain = tensorstore_utils._build_zarr3_metadata.__wrapped__
                patch.setattr(tensorstore_utils, "_build_zarr3_metadata", plain)
            (tmp_path / str(summed)).mkdir()
            checkpoints, workdir, trainable, optimizer = trained(tmp_path / str(summed), model_dir, steps=(1,))
            checkpoints.close()
        step = workdir / "checkpoints" / "1"
        array = open_array(step / "params", "projector.linear_1.kernel")
        assert ("crc32c" in str(array.spec().to_json()["metadata"]["codecs"][0]["configuration"]["codecs"])) == summed
        np.testing.assert_array_equal(array.read().result(), trainable["projector.linear_1.kernel"])
        restored, _ = TrainingCheckpoints(workdir, checkpoints.description, 2).restore(1, trainable, optimizer)
        np.testing.assert_array_equal(restored["projector.linear_1.bias"], trainable["projector.linear_1.bias"])


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


HOSTILE = {
    "model.text.num_layers": (10**9, "num_layers is 1000000000, not an integer from 1 to 1000"),
    "model.text.hidden_size": (True, "hidden_size is True, not an integer"),
    "model.text.num_heads": (0, "num_heads is 0, not an integer"),
    "model.text.num_kv_heads": (3, "num_heads 4 is not a multiple of num_kv_heads 3"),
    "model.text.head_dim": (9, "head_dim 9 is not a multiple"),
    "model.text.rms_norm_eps": (-1e-6, "rms_norm_eps is -1e-06, not a number from"),
    "model.text.rope_theta": ("1e4", "rope_theta is '1e4', not a number"),
    "model.text.tie_word_embeddings": ("false", "tie_word_embeddings is 'false', not a bool"),
    "model.text.rope_scaling": ({"kind": "linear", "factor": 1e300}, "factor is 1e[+]300, not a number"),
    "model.vision.patch_size": (10**5, "patch_size is 100000, not an integer"),
    "model.vision.hidden_act": ("swish", "hidden_act is 'swish'; supported are"),
    "model.vision.layer_norm_eps": (float("nan"), "layer_norm_eps is nan, not a number"),
    "model.vision": ([], "damaged description"),
    "model": ("llava", "damaged description"),
    "model.image_mean": ([0.5, "0.5", 0.5], "image_mean is .*, not three numbers"),
    "model.image_std": ([0.5, 0.0, 0.5], "image_std is .*, of which none may be 0"),
    "model.projector_type": ("mlp999999999x_gelu", "projector_type is 'mlp999999999x_gelu', not"),
    "model.select_layer": (-999, "select_layer -999 is not among"),
    "hf": ([], "llava.json: hf is .*; only one dict"),
    "hf.config": ("a", "llava.json: hf: config is 'a'; only one dict"),
    "hf.generation_config": ({"eos_token_id": ["</s>"]}, "eos_token_id is .*, not an id or a list of ids"),
    "origins": ({"llm": 5}, "damaged description"),
    "sources": ([{"path": "/", "relative": "..", "id": "../../etc", "names": []}], "id is none"),
    "sources.": ([{"path": 5, "relative": "..", "id": "a", "names": []}], "sources are not all texts"),
    "template": (3, "not all texts"),
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_description_is_one_line(key, model_dir):
    value, message = HOSTILE[key]
    description = json.loads((model_dir / "llava.json").read_text())
    *outer, last = key.rstrip(".").split(".")
    inner = functools.reduce(lambda at, name: at.setdefault(name, {}), outer, description)
    inner[last] = value
    (model_dir / "llava.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message) as raised:
        open_checkpoint(model_dir)
    assert "llava.json" in str(raised.value) and "\n" not in str(raised.value)


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
    with pytest.raises(UserError, match=f"names and you did not.*convert copy-frozen .*--source {path}$"):
        step.parts  # noqa: B018  # opens its sources
    with pytest.raises(UserError, match="names and you did not"):
        step.load()


def test_where_images_stand_is_stored_and_before_the_text_where_it_is_not(tmp_path):
    model_dir = tiny.checkpoint(tmp_path, tiny.config(image_position="as_is"))
    assert open_checkpoint(model_dir).config.image_position == "as_is"
    description = json.loads((model_dir / "llava.json").read_text())
    (model_dir / "llava.json").write_text(
        json.dumps(description | {"model": description["model"] | {"image_position": 1}})
    )
    with pytest.raises(UserError, match="image_position is 1, not"):
        open_checkpoint(model_dir)
    del description["model"]["image_position"]  # as checkpoints of earlier versions
    (model_dir / "llava.json").write_text(json.dumps(description))
    assert open_checkpoint(model_dir).config.image_position == "first"


def test_steps_of_earlier_versions_say_by_their_configuration_where_images_stood(tmp_path, model_dir, monkeypatch):
    def without_position(self):
        values = to_json(self)
        del values["model"]["image_position"]
        return values

    to_json = Description.to_json
    monkeypatch.setattr(Description, "to_json", without_position)
    checkpoints, workdir, *_ = trained(tmp_path, model_dir, steps=(2,))
    checkpoints.close()
    assert open_checkpoint(workdir).config.image_position == "first"
    (workdir / "config.json").write_text(json.dumps({"image_position": "as_is"}))
    for path in (workdir, workdir / "checkpoints" / "2"):
        assert open_checkpoint(path).config.image_position == "as_is"
    (workdir / "config.json").write_text('{"image_pos')
    with pytest.raises(UserError, match="config.json: damaged"):
        open_checkpoint(workdir)


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
