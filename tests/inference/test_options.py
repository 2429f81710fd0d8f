"""Mistakes in the options of chat and serve are reported before JAX is imported."""

import subprocess
import sys

import pytest

RUN = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print([name for name in ("jax", "transformers", "fastapi") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "command, options, status, error",
    [
        ("chat", ["--temperature", "-1"], 1, "temperature is -1.0"),
        ("chat", ["--top-p", "many"], 2, "argument --top-p"),
        ("chat", ["--max-new-tokens", "0"], 1, "max-new-tokens is 0"),
        ("chat", ["--template", "v11"], 1, "v11"),
        ("chat", ["--image", "nowhere.png"], 1, "nowhere.png"),
        ("serve", ["--template", "v11"], 1, "v11"),
        ("serve", ["--slots", "0"], 2, "argument --slots"),
        ("serve", ["--mesh", "4"], 2, "argument --mesh"),
        ("serve", ["--api-key-file", "/dev/null"], 1, "a key is one line"),
        ("serve", ["--quantize", "int3"], 2, "argument --quantize"),
    ],
)
def test_mistakes_are_reported_before_jax_is_imported(command, options, status, error):
    run = [sys.executable, "-c", RUN, f"llava_jax.{command}", "--checkpoint", "nowhere", *options]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "[]\n")
    assert error in done.stderr.splitlines()[-1]
