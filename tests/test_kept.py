"""What earlier versions have stored opens, resumes and reads as before. See `kept/make.py`."""

import json
import tarfile
from pathlib import Path

import datagen_runs
import numpy as np
import pytest
from kept import make
from scripted_llm import ScriptedLLM

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.data.built import Built
from llava_jax.data.sources import LlavaJson
from llava_jax.training import loop

ARCHIVES = sorted(Path(make.__file__).parent.glob("*.tar.gz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda file: file.name.partition(".")[0])
def kept(request, tmp_path_factory) -> Path:
    """In another place than where it was made, with the files of that day."""
    directory = tmp_path_factory.mktemp("kept")
    with tarfile.open(request.param) as archive:
        archive.extractall(directory, filter="data")
    return directory / "kept"


@pytest.fixture(scope="module")
def expected(kept) -> dict:
    return json.loads((kept / "expected.json").read_text())


@pytest.mark.parametrize("name", ["model", "run"])
def test_a_checkpoint_has_the_parameters_that_it_had(kept, expected, name):
    assert make.digests(open_checkpoint(kept / name).load()) == expected[name]


def test_a_built_set_is_what_it_was_built_of(kept):
    built, folder = Built(kept / "built"), LlavaJson(kept / "data.json", kept / "images")
    assert list(built) == list(folder) and built.digest == folder.digest
    assert [built.read_images(i, built[i].images) for i in range(3)] == [
        folder.read_images(i, folder[i].images) for i in range(3)
    ]


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(kept, expected, monkeypatch):
    monkeypatch.chdir(kept)
    loop.train(make.config(), "run")
    np.testing.assert_allclose(make.losses(kept / "run"), expected["losses"], rtol=1e-5)


def test_data_generation_pays_for_what_is_missing_only(kept, expected, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    before = datagen_runs.samples(kept / "datagen")
    with ScriptedLLM(reply=datagen_runs.reply) as server:
        assert datagen_runs.run(kept / "datagen", server) == 0
        # The first answer of contexts 0 and 7 is no question and answer, so both are asked for twice.
        assert len(server.asked) == make.CONTEXTS + 2 - expected["requests"]
    after = datagen_runs.samples(kept / "datagen")
    assert len(after) == make.CONTEXTS and after[: len(before)] == before
