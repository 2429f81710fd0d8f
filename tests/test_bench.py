"""benchmarks/bench.py: what it makes of figures."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("bench", BENCHMARKS / "bench.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_ratios_say_how_much_faster_we_are(bench):
    rates = bench.Figure("decoding", "tokens/s", {"llava_jax": [10, 30, 20], "torch": [10, 10, 15]})
    assert rates.ratio("llava_jax", "torch") == (2.0, 2.0)
    seconds = bench.Figure("a step", "s", {"llava_jax": [2, 1, 3], "torch": [4, 4, 4]})
    assert seconds.ratio("llava_jax", "torch") == (2.0, 4.0)


def test_figures_come_back_from_their_file(bench, tmp_path):
    found = [bench.Figure("a step", "s", {"llava_jax": [2.5], "torch": [4.0]}, 1.5, "products")]
    bench.figures.write(tmp_path / "a.json", found)
    assert bench.figures.read(tmp_path / "a.json") == found


def test_page_has_every_side_with_ratio_and_share_of_the_limit(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "lora.machine.json").write_text(json.dumps({"CPU": "Zen 9", "cores": "2", "versions": "jax 1"}))
    figure = bench.Figure("a & b", "tokens/s", {"llava_jax": [50.0, 60.0], "torch": [25.0, 25.0]}, 110.0, "the rate")
    bench.page(tmp_path, {"lora": [figure]})
    page = (tmp_path / bench.PAGE).read_text()
    assert "Zen 9, 2 cores; jax 1." in page and "python benchmarks/lora.py --ranks 16 128" in page
    assert "| a & b | llava_jax | 55 (60) tokens/s |  | 0.50 |" in page
    assert "|  | torch | 25 (25) tokens/s | 2.20 x (2.40 x) | 0.23 |" in page
    plot = (tmp_path / bench.PLOT).read_text()
    assert "a &amp; b: torch" in plot and "2.20 x" in plot


def test_a_failed_benchmark_is_named_and_the_others_are_kept(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    good = "import sys; open(sys.argv[-1], 'w').write('[]')"
    (tmp_path / "benchmarks/good.py").write_text(good)
    (tmp_path / "benchmarks/bad.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(bench, "COMMANDS", {"good": ("good.py",), "bad": ("bad.py",)})
    directory = tmp_path / "figures"
    assert bench.main(["--directory", str(directory), "--only", "good", "bad"]) == 1
    said = capsys.readouterr()
    assert "1/2 python benchmarks/good.py: done" in said.out and "bad failed" in said.err
    assert (directory / "good.json").exists() and not (directory / "bad.json").exists()
