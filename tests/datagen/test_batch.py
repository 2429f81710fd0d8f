"""Instruction data through the batch API, against a scripted server."""

import json
from pathlib import Path
from typing import IO

import httpx2
import pytest
from datagen_runs import COUNT, rejects, reply, run, samples, write_contexts
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.llm_api import batches as batches_module
from llava_jax.llm_api import retry
from llava_jax.llm_api.ledger import Ledger

BATCH = ["--batch", "--poll", 0.01]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "key")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_contexts(tmp_path)


def states(folder: Path) -> dict[str, int]:
    ledger = Ledger(folder / "out" / "ledger.sqlite")
    found = dict(ledger.db.execute("SELECT state, COUNT(*) FROM requests GROUP BY state"))
    ledger.close()
    return found


def test_rounds_end_with_the_samples_of_single_requests(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batches_module, "MAX_REQUESTS", 20)
    with ScriptedLLM(reply=reply) as server:
        assert run(folder, server, *BATCH) == 0
        assert len(server.batches.batches) == 3  # 20 + 10, then the answers that were asked for again
        run(folder, server, output="single")
    assert samples(folder) == samples(folder, "single") and len(samples(folder)) == COUNT
    assert states(folder) == {"answered": COUNT + 5}


def test_what_failed_or_expired_is_asked_again(folder: Path):
    with ScriptedLLM(reply=reply, faults={"error": 0.2, "wrong_usage": 0.2}) as server:
        server.batches.fates = ["expired"]
        assert run(folder, server, *BATCH) == 0
    assert len(samples(folder)) == COUNT
    assert states(folder).keys() == {"answered", "failed", "unsent"}


def test_refused_prompts_are_rejects(folder: Path):
    with ScriptedLLM(reply=reply, faults={"refused": 0.2}) as server:
        assert run(folder, server, *BATCH) == 0
    assert set(rejects(folder).values()) == {"refused-by-server"}
    assert len(samples(folder)) + len(rejects(folder)) == COUNT


def test_nothing_taken_is_one_line(folder: Path):
    with ScriptedLLM(reply=reply, faults={"refused": 1.0}) as server:
        with pytest.raises(UserError, match="status 400.*not taken"):
            run(folder, server, *BATCH)
        server.script.faults = {}
        server.batches.fates = ["failed"]
        with pytest.raises(UserError, match="failed .too many tokens.*another"):
            run(folder, server, *BATCH)
        assert run(folder, server, *BATCH) == 0
    assert len(samples(folder)) == COUNT


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["Ledger.add_batch", "Ledger.note_batch", "Ledger.close_batch", "Batches._create"])
def test_killed_anywhere_no_request_is_sent_twice(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    def die(*_: object) -> None:
        raise Killed

    owner, method = where.split(".")
    with ScriptedLLM(reply=reply) as server:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Ledger if owner == "Ledger" else batches_module.Batches, method, die)
            run(folder, server, *BATCH)
        if where == "Ledger.note_batch":
            assert len(server.batches.batches) == 1
            with pytest.raises(UserError, match="resume with --batch"):
                run(folder, server)
        assert run(folder, server, *BATCH) == 0
        sent = [line for file in server.batches.files.values() for line in file.splitlines() if b'"method"' in line]
        used = {json.loads(line)["custom_id"] for line in sent}
        assert len(sent) == len(used) == COUNT + 5
    assert len(samples(folder)) == COUNT


def test_a_batch_that_was_made_though_the_server_failed_is_found(folder: Path):
    with ScriptedLLM(reply=reply) as server:
        server.batches.broken = 1
        assert run(folder, server, *BATCH) == 0
        assert len(server.batches.batches) == 2


def test_a_server_may_be_away_for_a_while(folder: Path, capsys: pytest.CaptureFixture):
    with ScriptedLLM(reply=reply) as server:
        server.batches.away = 3
        assert run(folder, server, *BATCH) == 0
    assert "away for a while; looks again in" in capsys.readouterr().err
    assert len(samples(folder)) == COUNT and states(folder) == {"answered": COUNT + 5}


def test_a_file_of_answers_that_breaks_off_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    download, broken = batches_module.Batches._download, [1, 1]

    async def cut(self: batches_module.Batches, id: str, file: IO[bytes]) -> None:
        await download(self, id, file)
        if broken:
            broken.pop()
            raise httpx2.ReadError("cut off")

    monkeypatch.setattr(batches_module.Batches, "_download", cut)
    with ScriptedLLM(reply=reply) as server:
        assert run(folder, server, *BATCH) == 0
        assert len(server.batches.batches) == 2
    assert len(samples(folder)) == COUNT and states(folder) == {"answered": COUNT + 5}


def test_a_batch_that_the_server_does_not_know_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def die(*_: object) -> None:
        raise Killed

    with ScriptedLLM(reply=reply) as server:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Ledger, "close_batch", die)
            run(folder, server, *BATCH)
        known, server.batches.batches = server.batches.batches, {}
        with pytest.raises(UserError, match="knows no batch batch-0.*choose another directory"):
            run(folder, server, *BATCH)
        server.batches.batches = known
        assert run(folder, server, *BATCH) == 0
    assert len(samples(folder)) == COUNT


def test_budget_holds_for_batches(folder: Path):
    costs = ["--prices", 1, 1, "--max-tokens", 200]
    with ScriptedLLM(reply=reply) as server:
        with pytest.raises(UserError, match="budget"):
            run(folder, server, *BATCH, *costs, "--budget", 0.03)
        assert 0 < len(samples(folder)) < COUNT
        assert run(folder, server, *BATCH, *costs, "--budget", 1) == 0
    assert len(samples(folder)) == COUNT
