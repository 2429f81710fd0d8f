"""Instruction data through this project's own server, which speaks the same API."""

from collections import Counter
from pathlib import Path

import pytest
from datagen_runs import rejects, run, samples, write_contexts
from serving import serving, tiny_engine

from llava_jax.llm_api.ledger import Ledger
from llava_jax.serve.app import create_app

COUNT = 6


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("serve")
    with (
        tiny_engine(directory, slots=4, queue=8) as engine,
        serving(create_app(engine, "tiny", max_body_bytes=1 << 20)) as url,
    ):
        yield url


def test_a_model_that_knows_nothing_gives_rejects(url: str, tmp_path: Path):
    write_contexts(tmp_path, COUNT)
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "system_message.txt").write_text("Describe.")
    server = ["--base-url", f"{url}/v1", "--model", "tiny", "--prompts", prompts, "--max-tokens", 8, "--attempts", 2]
    assert run(tmp_path, None, *server, "--temperature", 0) == 0
    assert len(rejects(tmp_path)) + len(samples(tmp_path)) == COUNT
    assert set(rejects(tmp_path).values()) <= {"cut-off", "wrong-form", "empty", "wrong-language", "marks"}
    ledger = Ledger(tmp_path / "out" / "ledger.sqlite")
    rows = ledger.db.execute("SELECT state, usage, completion_tokens <= 8 FROM requests").fetchall()
    ledger.close()
    assert set(Counter(rows)) == {("answered", "reported", 1)} and len(rows) >= COUNT
