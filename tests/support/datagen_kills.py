"""Kills data generation at random points over and over, against a server with every fault, and checks what comes out.

Every context has to end with exactly one sample or reject, and nothing may be asked for after its answer was noted.
"""

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from datagen_runs import reply, write_contexts
from scripted_llm import ScriptedLLM

FAULTS = {"error": 0.05, "overload": 0.02, "cut": 0.05, "dropped": 0.02, "malformed": 0.03, "empty": 0.03, "slow": 0.02,
          "no_usage": 0.1, "wrong_usage": 0.1}  # fmt: skip


def kill_until_done(
    folder: Path, server: ScriptedLLM, count: int, kills: int, most: int, concurrency: int = 32, seed: int = 0
) -> int:
    """Runs a command that makes data of `count` contexts and kills it up to `kills` times, after at most `most` of its
    requests. Returns how often it was killed."""
    write_contexts(folder, count)
    command = [
        sys.executable, "-m", "llava_jax.datagen", "reasoning", "--captions", folder / "contexts.jsonl",
        "--images", folder, "--output", folder / "out", "--base-url", server.url, "--model", "m",
        "--concurrency", concurrency, "--timeout", 5, "--prices", 1, 2,
    ]  # fmt: skip
    environment = os.environ | {"OPENAI_API_KEY": "key", "PYTHONPATH": os.fspath(Path(__file__).parents[2])}
    rng = random.Random(seed)
    for killed in range(kills + 1):
        with subprocess.Popen(list(map(str, command)), env=environment, stdout=-1, stderr=-1, text=True) as process:
            if killed < kills and not _ends(process, server, rng.randint(1, most)):
                process.kill()
                continue
            out, error = process.communicate()
        assert process.returncode == 0, error
        print(out)
        return killed


def _ends(process: subprocess.Popen, server: ScriptedLLM, requests: int) -> bool:
    """Whether the process comes to its end before it has sent so many requests."""
    before = len(server.asked)
    while process.poll() is None and len(server.asked) - before < requests:
        time.sleep(0.01)
    return process.poll() is not None


def check(folder: Path, server: ScriptedLLM, count: int) -> None:
    samples = json.loads((folder / "out" / "llava.json").read_text())
    rejects = [json.loads(line) for line in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
    ids = Counter(result["id"] for result in [*samples, *rejects])
    assert ids == Counter(map(str, range(count))), "a context has none or several results"
    db = sqlite3.connect(folder / "out" / "ledger.sqlite")
    assert db.execute("SELECT COUNT(*) FROM results").fetchone()[0] == count
    states = dict(db.execute("SELECT state, COUNT(*) FROM requests GROUP BY state"))
    answered = {
        (task, attempt): finished
        for task, attempt, finished in db.execute(
            "SELECT task, attempt, finished FROM requests WHERE state = 'answered'"
        )
    }
    later = [
        row
        for row in db.execute("SELECT task, attempt, sent FROM requests WHERE state != 'answered'")
        if row[2] > answered.get(row[:2], row[2])
    ]
    assert not later, "an answer that was there was asked for again"
    asked = Counter(key for key, _ in server.asked)
    assert states.get("lost"), "no request was under way at any kill"
    assert len(asked) == len(answered), "requests that the ledger does not know"
    assert sum(asked.values()) <= sum(states.values()), "more was sent than the ledger knows"
    print(f"{len(samples)} samples, {len(rejects)} rejects; requests: {states}; completions: {server.completions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ScriptedLLM(reply=reply, latency=0.1, faults=FAULTS) as server:
        killed = kill_until_done(Path(folder), server, args.contexts, args.kills, 100, seed=args.seed)
        check(Path(folder), server, args.contexts)
        print(f"killed {killed} times in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
