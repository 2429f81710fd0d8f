"""Runs tests/parallel/eight_devices.py, whose tests need a process with eight devices."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("eight_devices.py")


def test_on_eight_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(command, cwd=TESTS.parent.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
