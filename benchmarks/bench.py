"""Runs the benchmarks beside their peers, and writes the page `benchmarks` of the docs: `make bench`.

Each benchmark alternates its sides, so that other load hits all of them; run it on an otherwise idle machine all the
same. What has been measured is kept in runs/bench and not measured again; delete the folder to begin anew.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import figures
from figures import Figure

from llava_jax import cli
from llava_jax.files.writing import atomic_file

ROOT = Path(__file__).parents[1]
DOCS = Path("docs")
PAGE, PLOT = DOCS / "benchmarks.md", DOCS / "images/benchmarks.svg"
COMMANDS = {  # name -> its arguments
    "train_step": ("train_step.py", "--compile"),
    "packing": ("packing.py",),
    "lora": ("lora.py", "--ranks", "16", "128"),
    "lora, wide": ("lora.py", "--wide", "--ranks", "16"),
    "generate": ("generate.py", "--compile"),
    "serve": ("serve.py", "--no-accuracy"),
    "llama_cpp": ("llama_cpp.py", "--weights", "float32", "int8"),  # CPUs without bfloat16 take long
    "data": ("data.py",),
    "data, padded": ("data.py", "--aspect", "pad"),
    "anyres": ("anyres.py",),
}
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "peft", "xllamacpp", "numpy", "pillow")
OURS = "llava_jax"


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where a benchmark failed; the page then has the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="run these alone")
    parser.add_argument("--directory", type=Path, default=Path("runs/bench"), help="what has been measured")
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    failed = [name for name in args.only if not measured(name, args.directory)]
    found = {name: args.directory / f"{name}.json" for name in COMMANDS}
    page(args.directory, {name: figures.read(file) for name, file in found.items() if file.exists()})
    for name in failed:
        print(f"error: {name} failed, see {args.directory / name}.log", file=sys.stderr)
    return int(bool(failed))


def measured(name: str, directory: Path) -> bool:
    """Runs a benchmark whose figures are missing; -> whether they are there."""
    file = directory / f"{name}.json"
    if file.exists():
        return True
    script, *options = COMMANDS[name]
    print(f"{list(COMMANDS).index(name) + 1}/{len(COMMANDS)} {shown(name)}", end="", flush=True)
    before = time.monotonic()
    with (directory / f"{name}.log").open("w") as log:
        command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(file)]
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    print(f": {'done' if code == 0 else 'failed'} after {(time.monotonic() - before) / 60:.1f} minutes", flush=True)
    if code == 0:
        with atomic_file(directory / f"{name}.machine.json") as written:
            written.write(json.dumps(machine()).encode())
    return code == 0 and file.exists()


def shown(name: str) -> str:
    return " ".join(("python", f"benchmarks/{COMMANDS[name][0]}", *COMMANDS[name][1:]))


def machine() -> dict[str, str]:
    """What the figures hold for."""
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return {"CPU": cpu, "cores": str(os.cpu_count()), "versions": ", ".join(versions)}


def page(directory: Path, found: dict[str, list[Figure]]) -> None:
    """Writes the docs and their plot."""
    machines = [json.loads((directory / f"{name}.machine.json").read_text()) for name in found]
    lines = [
        "# Benchmarks",
        "",
        "`make bench` writes this page. It runs each command on this machine; the sides of a benchmark take turns. A "
        "number is the median of the runs, with the best in brackets. A ratio above 1 says that llava_jax is faster. "
        "The limit is what the machine allows by rates that are measured in the same run.",
        "",
    ]
    for each in [machine for number, machine in enumerate(machines) if machine not in machines[:number]]:
        lines += [f"{each['CPU']}, {each['cores']} cores; {each['versions']}.", ""]
    lines += ["![How much faster llava_jax is than its peers](images/benchmarks.svg)", ""]
    limits = []
    for name, compared in found.items():
        lines += [f"## {name}", "", f"`{shown(name)}`", "", "| | side | median (best) | ratio | of the limit |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for figure in compared:
            lines += rows(figure)
            if figure.limited_by and figure.limited_by not in limits:
                limits.append(figure.limited_by)
        lines.append("")
    if limits:
        lines += ["## Limits", "", *(f"- {limit}" for limit in limits), ""]
    with atomic_file(ROOT / PAGE) as file:
        file.write("\n".join(lines).rstrip().encode() + b"\n")
    with atomic_file(ROOT / PLOT) as file:
        file.write(plot([figure for compared in found.values() for figure in compared]).encode())
    print(f"written to {PAGE} and {PLOT}")


def rows(figure: Figure) -> list[str]:
    """Lines of the table."""
    lines = []
    for number, side in enumerate(figure.sides):
        value = f"{figure.median(side):.4g} ({figure.best(side):.4g}) {figure.unit}"
        ratio = "" if side == OURS else "{:.2f} x ({:.2f} x)".format(*figure.ratio(OURS, side))
        share = f"{figure.median(side) / figure.limit:.2f}" if figure.limit else ""
        lines.append(f"| {'' if number else figure.what} | {side} | {value} | {ratio} | {share} |")
    return lines


def plot(compared: list[Figure]) -> str:
    """Bars of the ratios by the medians, as SVG."""
    bars = [(f"{each.what}: {side}", each.ratio(OURS, side)[0]) for each in compared for side in list(each.sides)[1:]]
    width, text, height = 900, 520, 20
    scale = (width - text - 60) / max([ratio for _, ratio in bars], default=1.0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(bars) + 10}" role="img">',
        "<title>How much faster llava_jax is than its peers, by the medians</title>",
        "<style>text{font:12px sans-serif;fill:#777}rect{fill:#4a7dbd}line{stroke:#c55}</style>",
    ]
    for number, (what, ratio) in enumerate(bars):
        y = height * number + 5
        lines.append(f'<text x="{text - 8}" y="{y + 14}" text-anchor="end">{escape(what)}</text>')
        lines.append(f'<rect x="{text}" y="{y + 2}" width="{ratio * scale:.1f}" height="{height - 5}"/>')
        lines.append(f'<text x="{text + ratio * scale + 5:.1f}" y="{y + 14}">{ratio:.2f} x</text>')
    one = text + scale
    lines.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="{height * len(bars) + 10}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    cli.run(main)
