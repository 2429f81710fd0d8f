"""Killed at random points, data generation goes on: the shorter version of `datagen_kills.py`."""

from pathlib import Path

from datagen_kills import FAULTS, check, kill_until_done
from datagen_runs import reply
from scripted_llm import ScriptedLLM


def test_killed_over_and_over_each_context_ends_once(tmp_path: Path):
    with ScriptedLLM(reply=reply, latency=0.05, faults=FAULTS) as server:
        assert kill_until_done(tmp_path, server, count=120, kills=3, most=30, concurrency=8) == 3
        check(tmp_path, server, 120)
