"""Steps of a run are saved, kept and restored."""

import jax
import numpy as np
from checkpoint_steps import trained
from orbax.checkpoint._src.serialization import tensorstore_utils

from llava_jax.checkpoint.array_store import WITHOUT_CHECKSUM, open_array
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints


def test_steps_are_kept_and_restored_and_refer_to_what_they_do_not_hold(tmp_path, model_dir):
    checkpoints, workdir, trainable, optimizer = trained(tmp_path, model_dir)
    restored, state, _ = checkpoints.restore(4, trainable, optimizer)
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


def test_every_chunk_is_stored_with_a_checksum_and_those_without_still_open(tmp_path, model_dir, monkeypatch):
    """Steps, imports and what is inside of them; checkpoints of earlier versions have none."""
    for summed in (True, False):
        with monkeypatch.context() as patch:
            if not summed:
                plain = WITHOUT_CHECKSUM
                patch.setattr(tensorstore_utils, "_build_zarr3_metadata", plain)
            (tmp_path / str(summed)).mkdir()
            checkpoints, workdir, trainable, optimizer = trained(tmp_path / str(summed), model_dir, steps=(1,))
            checkpoints.close()
        step = workdir / "checkpoints" / "1"
        array = open_array(step / "params", "projector.linear_1.kernel")
        assert ("crc32c" in str(array.spec().to_json()["metadata"]["codecs"][0]["configuration"]["codecs"])) == summed
        np.testing.assert_array_equal(array.read().result(), trainable["projector.linear_1.kernel"])
        restored, *_ = TrainingCheckpoints(workdir, checkpoints.description, 2).restore(1, trainable, optimizer)
        np.testing.assert_array_equal(restored["projector.linear_1.bias"], trainable["projector.linear_1.bias"])
