"""Writes `2026_11.tar.gz`: a small one of each thing that is stored, as the code of its day writes it.

    python -m tests.kept.make

`test_kept.py` opens them with the code of today. Users hold such files, so where that test fails the code is to be
mended, not the files made anew; what comes into being later gets an archive of its own.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import datagen_runs
import numpy as np
import tiny
from scripted_llm import ScriptedLLM

from configs import common
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.data import build
from llava_jax.models.config import TextConfig, VisionConfig
from llava_jax.training import loop

STEPS, STOPPED, CONTEXTS, ASKED = 5, 2, 8, 3
MODEL = tiny.config(
    vision=VisionConfig(16, 32, 3, 2, image_size=16, patch_size=8), text=TextConfig(tiny.VOCAB, 16, 32, 1, 2, 1, 8)
)


def config():
    """Of a run in the current directory: a workdir belongs to the paths of its config."""
    values = common.get_config()
    values.update(stage="finetune", init="model", steps=STEPS, remat="none", pack=True)
    values.update(max_length=64, row_length=128, batch_rows=1, learning_rate=1e-3)
    values.data.update(json="data.json", images="images")
    return values


def digests(params: dict) -> dict[str, str]:
    return {name: hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for name, value in params.items()}


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _stopped_run() -> None:
    count_tokens, calls = loop.count_tokens, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        return count_tokens(*arguments)

    loop.count_tokens = stop
    try:
        loop.train(config(), "run")
    except SystemExit:
        pass
    finally:
        loop.count_tokens = count_tokens


def _make(directory: Path) -> dict:
    """What the tests should find in the files that are written."""
    tiny.checkpoint(directory, MODEL)
    shutil.rmtree(directory / "hf_tokenizer")
    file, images = tiny.data(directory)
    build.main(["--json", str(file), "--images", str(images), "--output", str(directory / "built"), "--shards", "2"])
    os.chdir(directory)
    loop.train(config(), "whole")
    expected = {"losses": losses(directory / "whole")}
    shutil.rmtree(directory / "whole")
    _stopped_run()
    expected["model"] = digests(open_checkpoint(directory / "model").load())
    expected["run"] = digests(open_checkpoint(directory / "run").load())
    (directory / "datagen").mkdir()
    datagen_runs.write_contexts(directory / "datagen", CONTEXTS)
    with ScriptedLLM(reply=datagen_runs.reply) as server:
        datagen_runs.run(directory / "datagen", server, "--limit", ASKED)
        expected["requests"] = len(server.asked)
    return expected


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "kept"
        directory.mkdir()
        expected = _make(directory)
        (directory / "expected.json").write_text(json.dumps(expected, indent=1))
        with tarfile.open(Path(__file__).with_name("2026_11.tar.gz"), "w:gz") as archive:
            archive.add(directory, "kept")


if __name__ == "__main__":
    main()
