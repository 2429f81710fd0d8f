"""benchmarks/accelerator.py runs, with tiny sizes on CPUs."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks/accelerator.py"


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(PROGRAM))


def test_a_part_runs_in_a_process_and_its_result_is_written(program, tmp_path, capfd):
    file = tmp_path / "a.json"
    assert program["main"](["--tiny", "--parts", "limits", "--output", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    limits = result["parts"]["limits"]
    assert limits["device"]["platform"] == "cpu" and limits["flops"] > 0
    out = capfd.readouterr().out
    assert out.startswith("limits: ") and f"all numbers: {file}" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_step_with_adapters_learns(program, capsys):
    result = program["large_step"]("finetune_lora", True)
    assert result["flops"] > 0 and result["losses"][-1] < result["losses"][0]  # one batch, again and again
    assert "train, 7B's widths, finetune_lora, 2 layers:" in capsys.readouterr().out


def test_a_part_that_fails_is_reported(program, tmp_path, capfd, monkeypatch):
    file = tmp_path / "a.json"
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    assert program["main"](["--tiny", "--parts", "limits", "--output", str(file)]) == 1
    assert "no_such_platform" in json.loads(file.read_text())["parts"]["limits"]["error"]
    assert "limits: failed after" in capfd.readouterr().out


def test_backends_are_near_float64(program):
    for case in program["attention"](True)["cases"]:
        assert set(case["backends"]) == {"xla", "chunked"}
        for backend in case["backends"].values():
            assert all(error < 0.01 for error in backend["errors"].values())  # of bfloat16


def test_generation_is_measured_beside_the_limits(program):
    for row in program["generation"](True)["rows"]:
        shares = row["share_of_bandwidth"], row["share_of_matmul_rate"]
        assert all(math.isfinite(share) and share > 0 for share in shares)
