"""A wheel in a clean environment: `python tests/smoke.py` trains, exports and answers with the installed package.

`make test-wheel` runs it; it does not import the package of the clone, and needs only the base install.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "support"))  # of the clone, without its package

import tiny  # noqa: E402

import llava_jax  # noqa: E402


def main() -> None:
    if Path(llava_jax.__file__).is_relative_to(HERE.parent / "llava_jax"):
        raise SystemExit(f"error: imported {llava_jax.__file__}, not an installed package: run it outside the clone")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        model, (samples, images) = tiny.checkpoint(directory), tiny.data(directory)
        data = (f"--config.init={model}", f"--config.data.json={samples}", f"--config.data.images={images}")
        sizes = ("--config.steps=2", "--config.batch_rows=4", "--config.max_length=64", "--config.remat=none")
        llava(directory, "train", "--config=finetune", "--workdir=run", *data, *sizes)
        llava(directory, "convert", "export", "--checkpoint", "run", "--output", "hf")
        ask = ("--prompt", "What colour is it?", "--image", f"{images}/0.png", "--max-new-tokens", "4")
        llava(directory, "chat", "--checkpoint", "run", *ask)
        model = llava_jax.load(directory / "hf")
        features = model.encode_images([images / "0.png"])
        assert features.shape == (1, 4, model.config.text.hidden_size), features.shape
    print(f"llava_jax {llava_jax.__version__} works with Python {sys.version.split()[0]}")


def llava(directory: Path, *arguments: str) -> None:
    """Runs the console command that was installed with the package."""
    command = [Path(sys.executable).with_name("llava"), *arguments]
    print("$", "llava", *arguments, flush=True)
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nerror: llava {arguments[0]} exited with {done.returncode}")


if __name__ == "__main__":
    main()
