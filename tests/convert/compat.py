"""Exports in each generation of transformers: `make test-compat`, which makes an environment for each version.

What is compared was computed here, by the model that is exported: no missing key, the same logits, the same greedy
answer, ids and pixels of the processor.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from adapters import adapter, lora, workdir
from conversion import CONFIG, TIED, convert, save_llava
from families import FAMILIES, save
from forward import logits
from PIL import Image

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request

VERSIONS = sorted(path.parent.name for path in Path(".venv-compat").glob("*/.ready"))
QUESTION = "What is the colour of the shape?"
PICTURE = np.random.default_rng(0).integers(0, 256, (41, 30, 3), np.uint8)


def make(case: str, directory: Path) -> Path:
    """A checkpoint of ours."""
    output = directory / "checkpoint"
    flags = []
    if case in FAMILIES:
        save(FAMILIES[case], directory / "source")
        flags = ["--template", FAMILIES[case].template]
    elif case == "linear projector":
        return tiny.checkpoint(directory, tiny.config(projector_type="linear"))
    else:
        save_llava(TIED if case == "tied" else CONFIG, directory / "source")
        flags = ["--aspect", "square"] if case == "cropped" else []
    convert("import", "--llava", directory / "source", "--output", output, *flags)
    return output


CASES = (*FAMILIES, "tied", "cropped", "padded, another theta, grouped queries", "linear projector")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Exports, and what they are to compute."""
    return {case: export(case, tmp_path_factory.mktemp("case")) for case in CASES}


def export(case: str, directory: Path) -> Path:
    checkpoint = make(case, directory)
    convert("export", "--checkpoint", checkpoint, "--output", directory / "hf")
    ask(checkpoint, directory)
    return directory


def ask(checkpoint: Path, directory: Path) -> None:
    """Writes a question to the export in `directory`/hf, and what the checkpoint makes of it."""
    generator = Generator.from_checkpoint(open_checkpoint(checkpoint))
    config = open_checkpoint(checkpoint).config
    picture = Image.fromarray(PICTURE)
    prompt = generator.prompts.encode(Request([("user", f"<image>\n{QUESTION}")], [picture]))
    image = prompt.image_feature_index >= 0
    image_id = json.loads((directory / "hf/config.json").read_text())["image_token_index"]
    pixels = generator.prompts.read(picture).tiles[0]
    batch = {
        "tokens": prompt.tokens[None],
        "image_feature_index": prompt.image_feature_index[None],
        "segment_ids": np.ones((1, len(image)), np.int32),
        "positions": np.arange(len(image), dtype=np.int32)[None],
        "images": pixels[None, None],
    }
    params = open_checkpoint(checkpoint).load()
    expected = np.asarray(logits(config, params, batch))[0]
    assert expected.std() > 0.01
    normalized = (pixels / 255 - config.image_mean) / config.image_std
    np.savez(
        directory / "question.npz",
        input_ids=np.where(image, image_id, prompt.tokens)[None].astype(np.int64),
        attention_mask=np.ones((1, len(image)), np.int64),
        pixel_values=normalized.transpose(2, 0, 1)[None].astype(np.float32),
        logits=expected,
        answer=continued(config, params, batch, steps=4),
        question=QUESTION,
        picture=PICTURE,
    )


def continued(config, params, batch, steps: int) -> list[int]:
    """The likeliest tokens, each after the one before, without a cache."""
    ids = []
    for _ in range(steps):
        ids.append(int(np.asarray(logits(config, params, batch))[0, -1].argmax()))
        more = {"tokens": ids[-1], "image_feature_index": -1, "segment_ids": 1, "positions": len(batch["tokens"][0])}
        added = {name: np.append(batch[name], [[np.int32(value)]], axis=1) for name, value in more.items()}
        batch = batch | {name: values.astype(np.int32) for name, values in added.items()}
    return ids


def run_alone(command: list) -> subprocess.CompletedProcess:
    """Runs a command of another environment, without the modules that tests hide from their children."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=own)


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_computes_the_same(version, exported):
    python = Path(".venv-compat") / version / "bin/python"
    command = [python, Path(__file__).parents[1] / "support" / "compat_load.py", *exported.values()]
    done = run_alone(command)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, line in zip(exported, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found.pop("logits") < 1e-4 and found.pop("pixels") < 1e-5, (case, line)
        assert found == {"keys": {}, "answer": True, "ids": True}, case


ADAPTERS = {"lora": lora(), "rslora": lora(rslora=True), "dora": lora(dora=True)}


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter_exported(request, tmp_path_factory) -> Path:
    """An adapter with the names of each version (a, old), and one with its own base (b, base)."""
    directory, chosen = tmp_path_factory.mktemp("adapter"), ADAPTERS[request.param]
    base = tiny.checkpoint(directory)
    trained = adapter(tiny.config(), chosen, projector=True)
    run = ["--checkpoint", workdir(directory / "run", base, chosen, trained), "--layout", "peft", "--output"]
    convert("export", "--checkpoint", base, "--output", directory / "hf")
    convert("export", *run, directory / "a")
    convert("export", *run, directory / "old", "--transformers", "4.51")
    convert("export", *run, directory / "b", "--base", directory / "base")
    convert("export", *run, directory / "b-old", "--base", directory / "base-old", "--transformers", "4.51")
    ask(directory / "run", directory)
    return directory


@pytest.mark.parametrize("version", VERSIONS)
def test_peft_computes_the_same(version, adapter_exported):
    old = version.startswith("4.51")
    pairs = [("hf", "old"), ("base-old", "b-old")] if old else [("hf", "a"), ("base", "b")]
    files = [adapter_exported / name for pair in pairs for name in pair]
    command = [Path(".venv-compat") / version / "bin/python", Path(__file__).parents[1] / "support/compat_adapter.py"]
    done = run_alone([*command, adapter_exported / "question.npz", *files])
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("missing|unexpected|were not", done.stderr, re.IGNORECASE), done.stderr[-3000:]
    for line in done.stdout.splitlines():
        adapted, without = map(float, line.split())
        assert adapted < 1e-4 < 1e-2 < without, line
    assert len(done.stdout.splitlines()) == len(pairs)


def test_there_are_versions():
    assert {version.rpartition(".")[0] for version in VERSIONS} >= {"4.51", "4.57", "5.0"}
