"""What the tests of checkpoints share."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return tiny.checkpoint(tmp_path)
