"""A wheel installed outside the repository: it is complete, and its commands work in any directory."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

import llava_jax

ROOT = Path(__file__).parents[1]
# What `pip install` puts on the path: a script that calls the entry point.
LLAVA = "from llava_jax.__main__ import console; console()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of the wheel, as pip would unpack it."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"  # pip builds in the source tree
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "llava_jax", source / "llava_jax", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", directory], cwd=source, check=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


@pytest.fixture
def run(installed, tmp_path):
    """Runs Python with the installed package in an empty directory; -> standard output and standard error."""

    def run(*arguments: str | os.PathLike) -> tuple[str, str]:
        path = os.pathsep.join([str(installed), os.environ["PYTHONPATH"].split(os.pathsep)[0]])  # base_install
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(installed):
    def files(directory: Path) -> set[str]:
        found = (file for file in directory.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return {file.relative_to(directory).as_posix() for file in found}

    assert files(installed / "llava_jax") == files(ROOT / "llava_jax")
    (metadata,) = (path for path in installed.iterdir() if path.name != "llava_jax")
    assert metadata.name == f"llava_jax-{llava_jax.__version__}.dist-info"
    scripts = configparser.ConfigParser()
    scripts.read(metadata / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"llava": "llava_jax.__main__:console"}


def test_the_package_is_imported_from_the_wheel(run, installed):
    out, err = run("-c", "import llava_jax; print(llava_jax.__file__, llava_jax.UserError.__name__)")
    assert (out, err) == (f"{installed}/llava_jax/__init__.py UserError\n", "")


@pytest.mark.parametrize(
    "command",
    ["serve", "chat", "convert import", "evaluate predict", "data check", "data build", "datagen captions", "plot"],
)
def test_commands_are_there(run, command):
    out, err = run("-c", LLAVA, *command.split(), "--help")
    assert out.startswith(f"usage: llava {command} ") and err == ""


def test_a_recipe_is_trained_by_its_name_and_the_model_answers(run, tmp_path):
    model = tiny.checkpoint(tmp_path)
    file, images = tiny.data(tmp_path)
    data = [f"--config.init={model}", f"--config.data.json={file}", f"--config.data.images={images}"]
    small = ["--config.steps=2", "--config.batch_rows=4", "--config.max_length=64", "--config.remat=none"]
    run("-c", LLAVA, "train", "--config=finetune", "--workdir=run", *data, *small)
    assert {"metrics.jsonl", "loss.png", "tokenizer"} <= {path.name for path in (tmp_path / "run").iterdir()}
    run("-c", LLAVA, "convert", "export", "--checkpoint", "run", "--output", "hf")
    ask = ["--prompt", "What colour is it?", "--image", images / "0.png", "--max-new-tokens", "4"]
    out, _ = run("-m", "llava_jax.chat", "--checkpoint", "run", *ask)
    assert out.endswith("\n")
