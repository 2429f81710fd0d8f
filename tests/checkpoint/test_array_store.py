"""Arrays in pieces: what is written so is an Orbax checkpoint, and of what Orbax writes one layer can be read."""

import resource
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore as ts
import tiny
from etils import epath
from orbax.checkpoint import v1 as ocp

from llava_jax.checkpoint.array_store import TREE, ArrayWriter, open_array, read_chunks
from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.cli import UserError

KERNEL = "llm.layers.mlp.up_proj.kernel"


def write(directory, arrays):
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    with ArrayWriter(epath.Path(directory), shapes) as writer:
        for name, array in arrays.items():
            if name == KERNEL:
                for layer, values in enumerate(array):
                    writer.write(name, layer, values)
            else:
                writer.write(name, None, array)


def test_orbax_loads_what_is_written_in_pieces(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        KERNEL: rng.normal(size=(3, 1024, 600)).astype(ml_dtypes.bfloat16),
        "llm.layers.input_layernorm.scale": np.zeros((3, 8), np.float16),  # all zeros have to be there too
        "llm.embed_tokens.embedding": rng.normal(size=(7, 512)).astype(np.float32),
        "projector.linear_1.bias": np.float32([1, 2, 3]),
    }
    write(tmp_path / "arrays", arrays)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for name, a in arrays.items()}
    loaded = ocp.load(tmp_path / "arrays", abstract)
    metadata = ocp.metadata(tmp_path / "arrays").metadata
    for name, array in arrays.items():
        assert (metadata[name].shape, metadata[name].dtype) == (array.shape, array.dtype)
        assert np.asarray(loaded[name]).tobytes() == array.tobytes()
    # Layers are files; what one of several devices takes of them is less than a file.
    assert len(list((tmp_path / "arrays" / TREE / KERNEL).rglob("c/*/0/0"))) == 3
    assert metadata[KERNEL].storage_metadata.chunk_shape == (1, 1024, 600)
    stored = open_array(epath.Path(tmp_path / "arrays" / TREE), KERNEL)
    np.testing.assert_array_equal(stored[1].read().result(), arrays[KERNEL][1])


def test_parts_of_large_layers_suit_devices(tmp_path):
    shapes = {
        KERNEL: jax.ShapeDtypeStruct((32, 4096, 11008), jnp.bfloat16),
        "llm.embed_tokens.embedding": jax.ShapeDtypeStruct((32000, 4096), jnp.bfloat16),
    }
    with pytest.raises(ValueError, match="not all was written"), ArrayWriter(epath.Path(tmp_path / "a"), shapes):
        pass
    parts = {name: leaf.storage_metadata.chunk_shape for name, leaf in ocp.metadata(tmp_path / "a").metadata.items()}
    assert parts == {KERNEL: (1, 64, 11008), "llm.embed_tokens.embedding": (32000, 64)}


def test_pieces_that_do_not_fit_are_refused(tmp_path):
    shapes = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    for piece in (np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float16)):
        directory = epath.Path(tmp_path / piece.dtype.name)
        with pytest.raises(ValueError, match="a is float"), ArrayWriter(directory, shapes) as writer:
            writer.write("a", None, piece)


def test_layers_of_a_training_checkpoint_are_read_one_by_one(tmp_path):
    source = open_checkpoint(tiny.checkpoint(tmp_path))
    trained = {name: value + 1 for name, value in source.load().items() if name.startswith("llm.")}
    workdir = epath.Path(tmp_path / "run")
    frozen = [name for name in source.abstract() if name not in trained]
    checkpoints = TrainingCheckpoints(
        workdir, Description(source.config, "v1", sources=source.sources_of(frozen, workdir)), 1
    )
    checkpoints.save(3, trained, optax.sgd(0.1).init(trained), wait=True)
    checkpoints.close()
    checkpoint = open_checkpoint(workdir)
    np.testing.assert_array_equal(checkpoint.read(KERNEL, 1), trained[KERNEL][1])
    np.testing.assert_array_equal(checkpoint.read("llm.norm.scale"), trained["llm.norm.scale"])
    name = "vision.layers.mlp.fc1.kernel"
    np.testing.assert_array_equal(checkpoint.read(name, 2), source.load([name])[name][2])
    stored = open_array(workdir / "checkpoints/3/params", KERNEL)
    assert stored.chunk_layout.read_chunk.shape[0] == 1


def test_a_part_is_read_without_the_rest(tmp_path):
    """What one of eight devices holds is little more than an eighth of the bytes."""
    kernel = np.random.default_rng(0).normal(size=(2, 4096, 2048)).astype(ml_dtypes.bfloat16)
    write(tmp_path / "arrays", {KERNEL: kernel})

    def bytes_read():
        metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return metrics[0]["values"][0]["value"]

    stored, before = open_array(epath.Path(tmp_path / "arrays" / TREE), KERNEL), bytes_read()
    part = stored[:, 512:1024].read().result()
    np.testing.assert_array_equal(part, kernel[:, 512:1024])
    assert kernel.nbytes / 8 <= bytes_read() - before < kernel.nbytes / 8 + 10_000


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        (KERNEL, (2, 4096, 640), (1024, 640)),
        ("llm.embed_tokens.embedding", (700, 4096), (700, 1024)),
        ("x", (3,), (3,)),
    ],
)
def test_an_array_is_read_in_the_parts_that_it_is_stored_in(name, shape, part, tmp_path):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    write(tmp_path / "arrays", {name: values})
    stored = open_array(epath.Path(tmp_path / "arrays" / TREE), name)
    stored, values = (stored[1], values[1]) if name == KERNEL else (stored, values)
    found = np.full(values.shape, np.nan, np.float16)
    for place, held in read_chunks(stored):
        assert all(size <= most for size, most in zip(held.shape, part, strict=True))
        found[place] = held
    np.testing.assert_array_equal(found, values)


def test_a_disk_without_room_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    model = tiny.config()
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="the weights take .* GB, but 0.0 GB are free"):
        tiny.save_model(tmp_path / "model", tiny.params(model), Description(model, "v1"), str(tmp_path / "tokenizer"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"tokenizer"}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    model = tiny.config()
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # files can grow no further, as on a full disk
    try:
        with pytest.raises(UserError, match="model: cannot be written") as raised:
            tiny.save_model(
                tmp_path / "model", tiny.params(model), Description(model, "v1"), str(tmp_path / "tokenizer")
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"tokenizer"}
