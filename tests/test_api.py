"""The public API: what `import llava_jax` does and does not do."""

import json
import subprocess
import sys
import textwrap

import pytest

import llava_jax


def run(code: str) -> str:
    """What a new process with this code prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_has_no_side_effects():
    code = """
    import json, logging, os, sys, warnings
    def state():
        loggers = {name: getattr(log, "filters", []) for name, log in logging.root.manager.loggerDict.items()}
        hooks = [sys.excepthook, sys.unraisablehook, sys.displayhook]
        return dict(os.environ), list(sys.meta_path), loggers, list(warnings.filters), hooks
    before = state()
    import llava_jax
    assert state() == before
    print(json.dumps([name for name in sys.modules if name.startswith("llava_jax") or "jax" in name.split(".")]))
    """
    assert json.loads(run(code)) == ["llava_jax"]


def test_what_is_public_is_there_and_nothing_else_is_invented():
    for name in llava_jax.__all__:
        assert getattr(llava_jax, name) is not None and name in dir(llava_jax)
    with pytest.raises(AttributeError, match="module 'llava_jax' has no attribute 'lode'"):
        llava_jax.lode  # noqa: B018
