"""Object stores: copies in, copies out, and whole runs whose every path is on one.

The store is a fake, its clients are the real ones: gcsfs under etils.epath, TensorStore under Orbax.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from fake_gcs import FakeGcs

from llava_jax import remote
from llava_jax.data import build
from tests.parallel.test_distributed import free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store() -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        yield fake


def start(store: FakeGcs, cwd: Path, *arguments: str, devices: int = 2) -> subprocess.Popen:
    """A process for which `gs://` is the store. In `cwd` a path taken for a local one leaves its trace."""
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | store.environment | {"JAX_NUM_CPU_DEVICES": str(devices)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=environment, cwd=cwd, stdout=-1, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> str:
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)
    return "\n".join(told)


def metrics(store: FakeGcs) -> dict[int, float]:
    lines = map(json.loads, store.read("bucket", "run/metrics.jsonl").decode().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def test_a_run_of_two_processes_with_every_path_on_gcs(store, tmp_path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    model, (file, images) = tiny.checkpoint(tmp_path), tiny.data(tmp_path)
    for source in (each for each in model.rglob("*") if each.is_file()):
        store.put("bucket", source.relative_to(tmp_path).as_posix(), source.read_bytes())
    for source in (file, *images.iterdir()):
        store.put("bucket", f"data/{source.relative_to(tmp_path).as_posix()}", source.read_bytes())

    command = ["-m", "llava_jax.main", f"--config={ROOT}/configs/common.py", "--workdir=gs://bucket/run"]
    config = {"init": "gs://bucket/model", "data.json": "gs://bucket/data/data.json", "max_length": 64, "steps": 6}
    config |= {"data.images": "gs://bucket/data/images", "batch_rows": 4, "save_every": 2, "stage": "finetune"}
    command += [f"--config.{key}={value}" for key, value in config.items()]
    meet = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    finish(*(start(store, cwd, *command, *meet, f"--process_id={i}") for i in range(2)))

    names = store.names("bucket")
    written = {"/".join(name.split("/")[1:3]) for name in names if name.startswith("run/")}
    assert {"config.json", "data.json", "llava.json", "metrics.jsonl", "tokenizer/tokenizer.json"} <= written
    assert {name for name in written if name.startswith("checkpoints/")} == {"checkpoints/4", "checkpoints/6"}
    assert len([name for name in written if name.startswith("tensorboard/")]) == 1
    losses = metrics(store)
    assert list(losses) == [1, 2, 3, 4, 5, 6]

    # The newest step is damaged: one process goes on from the one before, which two saved.
    cut = "run/checkpoints/6/_CHECKPOINT_METADATA"
    store.put("bucket", cut, store.read("bucket", cut)[:200])
    refused = start(store, cwd, *command, devices=4)
    said = refused.communicate()[0]
    assert refused.returncode == 1 and "Traceback" not in said, said
    assert "gs://bucket/run/checkpoints/6: this step is damaged" in said and "--resume-from 4" in said
    told = finish(start(store, cwd, *command, "--resume-from=4", devices=4))
    aside = {name for name in store.names("bucket") if name.startswith("run/set_aside/after_4/")}
    assert {cut.replace("checkpoints", "set_aside/after_4"), "run/set_aside/after_4/metrics.jsonl"} <= aside
    assert "run/run.lock" not in store.names("bucket")
    assert "resuming after step 4" in told
    resumed = metrics(store)
    assert list(resumed) == list(losses)
    np.testing.assert_allclose(list(resumed.values()), list(losses.values()), rtol=1e-5)

    assert not list(cwd.iterdir()), "a remote path was taken for a local one"
    assert not [name for name in store.names("bucket") if "partial" in name or "orbax-checkpoint-tmp" in name]


WRITE_RUN = """
import sys
import jax.numpy as jnp
import tiny
from etils import epath
from llava_jax.checkpoint.format import Description, write_description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.checkpoint.writing import copy_tokenizer
model = tiny.config()
tiny.save_model("gs://bucket/model", tiny.params(model), Description(model, "v1"), sys.argv[1])
source, workdir = open_checkpoint("gs://bucket/model"), epath.Path(sys.argv[2])
trained = {name: value for name, value in source.load().items() if name.startswith("projector.")}
frozen = [name for name in source.abstract() if name not in trained]
described = Description(source.config, "v1", sources=source.sources_of(frozen, workdir), stage="pretrain")
copy_tokenizer(source.tokenizer_dir, workdir / "tokenizer")
write_description(workdir, described)
checkpoints = TrainingCheckpoints(workdir, described, 1)
checkpoints.save(1, trained, {"count": jnp.zeros(3)}, wait=True)
checkpoints.close()
"""


def test_a_run_on_a_disk_reads_a_bucket_that_it_names_when_the_user_does(store, tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    finish(start(store, tmp_path, "-c", WRITE_RUN, str(tmp_path / "tokenizer"), str(tmp_path / "run")))
    copy = ["-m", "llava_jax.convert", "copy-frozen", "--checkpoint", str(tmp_path / "run")]
    for command in (copy, [*copy, "--source", "gs://other/model"]):
        process = start(store, tmp_path, *command)
        told = process.communicate()[0]
        assert process.returncode == 1, told
        assert f"copy-frozen --checkpoint {tmp_path}/run --source gs://bucket/model" in told.splitlines()[-1]
    assert "copied from gs://bucket/model" in finish(start(store, tmp_path, *copy, "--source", "gs://bucket/model"))
    store.objects.clear()
    program = f"from llava_jax.checkpoint.reading import open_checkpoint; open_checkpoint('{tmp_path}/run').load()"
    finish(start(store, tmp_path, "-c", program))


def test_places_are_named_by_their_bucket():
    assert remote.may_read("/a/b", "/c") and remote.may_read("gs://a/b", "gs://a/c/d")
    for place in ("gs://a.b/c", "gs://ab", "s3://a/b", "http://a/b"):
        assert not remote.may_read(place, "gs://a/b") and not remote.may_read(place, "/a")
    remote.name(None, 3, ["gs://ab"], "gs://ab/x", "/a.b")
    assert remote.may_read("gs://ab/y", "/a") and not remote.may_read("gs://a.b/c", "/a")


BUILD_AND_READ = """
import hashlib, sys
from llava_jax.data import build
from llava_jax.data.built import Built
from llava_jax.data.sources import LlavaJson
data = ["gs://bucket/data/data.json", "gs://bucket/data/images"]
for _ in range(2):
    build.main(["--json", data[0], "--images", data[1], "--output", "gs://bucket/built", "--shards", "3"])
built, folder = Built("gs://bucket/built"), LlavaJson(*data)
assert list(built) == list(folder) and built.digest == folder.digest
for index, sample in enumerate(folder):
    assert built.read_images(index, sample.images) == folder.read_images(index, sample.images)
"""


def test_a_data_set_is_built_on_gcs_and_read_from_there(store, tmp_path, monkeypatch):
    cwd, here = tmp_path / "cwd", tmp_path / "here"
    cwd.mkdir()
    file, images = tiny.data(tmp_path)
    for source in (file, *images.iterdir()):
        store.put("bucket", f"data/{source.relative_to(tmp_path).as_posix()}", source.read_bytes())
    build.main(["--json", str(file), "--images", str(images), "--output", str(here), "--shards", "3"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    finish(start(store, cwd, "-c", BUILD_AND_READ))
    written = {name: store.read("bucket", name) for name in store.names("bucket") if name.startswith("built/")}
    assert written == {f"built/{file.name}": file.read_bytes() for file in here.iterdir()}
    copies = {file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert copies >= {file.read_bytes() for file in here.glob("*array_record*")}, "shards were not kept here"
    assert not list(cwd.iterdir()), "a remote path was taken for a local one"

    # What was built in part goes on: shards that are there stay.
    for name in ("built/dataset_info.json", "built/llava-train.array_record-00001-of-00003"):
        del store.objects["bucket", name]
    kept = store.objects["bucket", "built/llava-train.array_record-00000-of-00003"].generation
    finish(start(store, cwd, "-c", BUILD_AND_READ))
    assert {name: store.read("bucket", name) for name in written} == written
    assert store.objects["bucket", "built/llava-train.array_record-00000-of-00003"].generation == kept


def test_a_local_directory_is_itself_and_logs_are_copied_with_their_directories(tmp_path):
    assert remote.local(tmp_path) == tmp_path and not remote.is_remote(tmp_path)
    assert remote.is_remote("gs://bucket/run")
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source / "tensorboard", target / "tensorboard"):
        directory.mkdir(parents=True)
    (source / "metrics.jsonl").write_text("new")
    (source / "tensorboard" / "events").write_text("events")
    (target / "metrics.jsonl").write_text("old")
    remote.upload(source, target)
    assert (target / "metrics.jsonl").read_text() == "new" and (target / "tensorboard" / "events").exists()
