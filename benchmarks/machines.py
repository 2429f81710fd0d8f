"""Writes docs/machines.md: what `llava_jax.preflight` says of the published recipes on many machines.

    python benchmarks/machines.py > docs/machines.md

Takes an hour on two cores. Every row is one run of preflight with the arguments that the table names. Results are kept
in runs/machines.jsonl with the versions of the compilers, so that an interrupted run resumes; rows of other versions
are compiled again. Remove that file after changing the step.

--adapters prints the section about LoRA on one device alone, which takes half an hour; --next that about LLaVA-1.6.

With --peer, in an environment with MaxText's versions of jax and libtpu, it compiles only the rows that are compared
with MaxText, prints their table, and keeps them for the next docs/machines.md, which tells the difference.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GiB = 2**30
RESULTS = Path("runs/machines.jsonl")

# Peak GiB a device of MaxText 0.2.5, compiled with these versions for the same machines by
#   python -m maxtext.trainers.pre_train.train_compile CONFIG model_name=llama2-7b attention=flash scan_layers=true \
#     remat_policy=full max_target_length=2048 compile_topology=v5e-16 per_device_batch_size=1 ...
# with its defaults: bfloat16 computation, float32 weights, gradients and moments, AdamW, pure FSDP.
MAXTEXT_VERSIONS = {"jax": "0.12.0.1", "libtpu": "0.0.50.1"}
MAXTEXT = {
    ("v5e:4x4", 1): 8.12,
    ("v5e:4x4", 4): 11.30,
    ("v5e:8x8", 1): 3.19,
    ("v5e:8x8", 4): 5.40,
    ("v5p:2x2x2", 1): 15.19,
    ("v5p:2x2x2", 4): 18.22,
    ("v6e:4x4", 1): 8.11,
    ("v6e:4x4", 4): 11.08,
}
# A plain step of 150 lines with cuDNN attention and automatic FSDP.
PLAIN_VERSIONS = {"jax": "0.10.2"}
PLAIN_GPU = {("h100:8", 1): 13.82, ("h100:8", 4): 16.51, ("h100:8", 8): 20.10}

RECIPES = {
    ("finetune", "7b"): ("v4:2x2x4", "v5e:4x4", "v5p:2x2x2", "v6e:4x4", "h100:8", "a100:8"),
    ("pretrain", "7b"): ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "h100:8", "a100:8", "h100:1", "a100:1"),
    ("finetune", "13b"): ("v4:2x2x4", "v5e:8x8", "v5p:2x2x4", "v6e:4x4", "h100:8", "a100:8"),
    ("pretrain", "13b"): ("v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x4", "h100:8", "a100:8", "h100:2", "a100:2"),
}
# Recipe and type of the frozen base -> single devices of 16, 24, 32, 40 and 80 GB.
ADAPTERS = {
    ("7b", "nf4"): ("v5e:1x1", "l4:1", "rtx4090:1", "v6e:1x1", "a100-40:1"),
    ("7b", "int8"): ("v5e:1x1", "l4:1", "a100-40:1"),
    ("7b", "bfloat16"): ("l4:1", "v6e:1x1", "a100-40:1", "a100:1"),
    ("13b", "nf4"): ("v5e:1x1", "l4:1", "rtx4090:1", "v6e:1x1", "a100-40:1"),
    ("13b", "int8"): ("l4:1", "v6e:1x1", "a100-40:1"),
    ("13b", "bfloat16"): ("a100-40:1", "a100:1", "h100:1"),
}
# Rows of LLaVA-1.6: unpacked, with the five tiles that an image can have; packed, with the tiles that a mixture of
# photographs, documents and text has (benchmarks/anyres.py).
NEXT = {
    "worst": {},
    "typical": {"pack": True, "row_length": 8192, "image_slots": 15, "batch_rows": 64},
}
NEXT_TARGETS = ("v5e:8x8", "v6e:4x4", "v5p:2x2x4", "h100:8", "a100:8")
MEMORY = "--memory_fraction=0.9"  # of a GPU, as launch/train.sh sets it
ONE_ROW = {"batch_rows": 1, "max_rows_per_device": 1, "max_length": 2048, "pack": False}
POLICIES = ("full", "save_qkv", "offload", "none")
POLICY_TARGETS = ("v5e:4x4", "h100:8")
RECIPE_HEADER = [
    "target",
    "devices",
    "rows x microbatches",
    "needed",
    "available",
    "fits",
    "sent (of ideal)",
    "step s",
    "bound by",
]

ADAPTERS_INTRODUCTION = """\
## LoRA of rank 128 on one device: one row of 2048 tokens, `--config=configs/finetune_lora.py:7b`

`--config.base_dtype=BASE --config.batch_rows=1 --config.max_rows_per_device=1 --config.max_length=2048
--config.pack=False --memory_fraction=0.9`: the launchers let JAX take nine tenths of a GPU's memory. What fits on one
of the smaller devices is not repeated for 80 GB.
"""

NEXT_INTRODUCTION = """\
## Stage 2, LLaVA-1.6 7B, the vision tower trained: `--config=configs/llava_next.py:7b`

*Worst*: every row has 4096 positions and an image with five tiles, the most that there are. *Typical*: packed rows of
8192 positions with 15 tiles, 93 % and 99 % of which a mixture of photographs, documents and text uses
(`benchmarks/anyres.py`, its `ROW_LENGTH`): `--config.pack=True --config.row_length=8192 --config.image_slots=15
--config.batch_rows=64`.
"""

INTRODUCTION = """\
# Machines

`python benchmarks/machines.py > docs/machines.md` writes this file. All figures are those that the compilers for TPUs
(libtpu) and GPUs (the CUDA plugin of JAX) report for the training step, compiled ahead of time on a machine with two
cores and no accelerator. Nothing was run on the hardware; the times are lower bounds from data sheets, not
measurements. Compiled with {versions}.

Memory is in GiB per device. *Needed* is the peak that the compiler reports, on GPUs with a margin of 2 GiB and more for
memory that it does not count. *Available* is the memory that libtpu lets a program use, or three quarters of a GPU's
memory, JAX's default. *Sent* is the amount that a device sends in a step, and its ratio to the minimum for parameters
sharded over all devices. *Step* is a lower bound of its time: the maximum of compute, memory and network at peak rates.
A row has 2048 positions; every row has an image, and every position is a target token, which is the worst case.
"""


def installed(*names: str) -> dict[str, str]:
    """Versions of what compiles here, by default for TPUs and GPUs, as far as it is installed."""
    versions = {}
    for name in names or ("jax", "libtpu", "jax-cuda12-pjrt"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def preflight(recipe: str, target: str, *flags: str, **changes: Any) -> dict[str, Any]:
    """One run of the command with the versions installed, its JSON."""
    command = command_of(recipe, target, changes) + list(flags)
    versions = installed()
    known = stored(versions)
    if (shown := " ".join(command)) in known:
        return known[shown]
    print(shown, file=sys.stderr, flush=True)
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if run.returncode not in (0, 3):
        raise SystemExit(run.stderr)
    result = json.loads(run.stdout)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"command": shown, "versions": versions, "result": result}) + "\n")
    return result


def command_of(recipe: str, target: str, changes: dict[str, Any]) -> list[str]:
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["-m", "llava_jax.preflight", f"--config=configs/{recipe}", f"--target={target}", "--json", *overrides]


def stored(versions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Command -> result of the runs with these versions, whatever else was installed."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {one["command"]: one["result"] for one in lines if versions.items() <= one.get("versions", {}).items()}


def spelled(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def devices_of(target: str) -> int:
    sizes = target.partition(":")[2].split("x")
    product = 1
    for size in sizes:
        product *= int(size)
    return product


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def gib(value: float | None) -> str:
    return "?" if value is None else f"{value / GiB:.2f}"


def text_only_changes(target: str, per_device: int) -> dict[str, int]:
    return {"image_slots": -1, "max_rows_per_device": per_device, "batch_rows": per_device * devices_of(target)}


def with_versions_of_maxtext() -> str:
    """How our peaks, compiled with MaxText's versions, compare with those of the versions installed."""
    theirs, differences = stored(MAXTEXT_VERSIONS), []
    for target, per_device in MAXTEXT:
        changes = text_only_changes(target, per_device)
        shown = " ".join(command_of("finetune.py:7b", target, changes))
        if shown in theirs:
            here = preflight("finetune.py:7b", target, **changes)["memory"]["needed"]
            differences.append(abs(theirs[shown]["memory"]["needed"] - here) / GiB)
    if not differences:
        return "Ours were not compiled with MaxText's versions."
    return (
        f"{len(differences)} of the {len(MAXTEXT)} rows were compiled with MaxText's versions, too: the peaks of "
        f"{sum(difference < 0.01 for difference in differences)} are the same to 0.01 GiB."
    )


def text_only(peers: dict[tuple[str, int], float]) -> str:
    """The decoder alone, at the shapes at which peers were compiled."""
    rows = []
    for (target, per_device), peer in peers.items():
        result = preflight("finetune.py:7b", target, **text_only_changes(target, per_device))
        memory, collectives = result["memory"], result["collectives"]
        peak = memory["needed"] - memory["margin"]
        rows.append(
            [target, str(per_device), gib(peak), f"{peer:.2f}", f"{peak / GiB / peer:.2f}"]
            + [gib(collectives["wire"]), f"{collectives['ratio']:.2f}", f"{result['compiled']['ratio']:.4f}"]
        )
    return table(["target", "rows", "peak", "peer", "ratio", "sent", "of ideal", "FLOPs of formula"], rows)


def with_policy(target: str, policy: str) -> dict[str, Any]:
    changes = {} if policy == "full" else {"remat": policy}  # the recipe's own
    return preflight("finetune.py:7b", target, **changes)


def adapters() -> str:
    """LoRA on one device, by the memory of the step."""
    rows = []
    for (size, base), targets in ADAPTERS.items():
        for target in targets:
            result = preflight(f"finetune_lora.py:{size}", target, MEMORY, **ONE_ROW, base_dtype=base)
            memory, fits = result["memory"], "yes" if result["fits"] else "**no**"
            rows.append([size.upper(), base, target, gib(memory["needed"]), gib(memory["available"]), fits])
    return ADAPTERS_INTRODUCTION + "\n" + table(["model", "base", "target", "needed", "available", "fits"], rows)


def llava_next() -> str:
    """The recipe of LLaVA-1.6 with the most tiles, and with as many as usual."""
    rows = [
        [kind, *recipe_row(preflight("llava_next.py:7b", target, **changes))]
        for kind, changes in NEXT.items()
        for target in NEXT_TARGETS
    ]
    return NEXT_INTRODUCTION + "\n" + table(["tiles", *RECIPE_HEADER], rows)


def recipe_row(result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    row = [result["target"], str(result["devices"]), f"{result['rows_per_device']} x {result['microbatches']}"]
    row += [gib(memory["needed"]), gib(memory["available"]), "yes" if result["fits"] else "**no**"]
    if "compiled" not in result:
        return row + ["", "", ""]
    bound = result["bound"]["seconds"]
    slowest = max(("compute", "memory", "network"), key=bound.get)
    collectives = result["collectives"]
    ratio = f" ({collectives['ratio']:.2f})" if collectives["ratio"] else ""
    return row + [f"{gib(collectives['wire'])}{ratio}", f"{bound['step']:.2f}", slowest]


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if sys.argv[1:] == ["--peer"]:
        if not MAXTEXT_VERSIONS.items() <= installed().items():
            raise SystemExit(f"installed are {spelled(installed())}, not {spelled(MAXTEXT_VERSIONS)}")
        print(text_only(MAXTEXT))
        return
    if sys.argv[1:] in (["--adapters"], ["--next"]):
        print(adapters() if sys.argv[1] == "--adapters" else llava_next())
        return
    print(INTRODUCTION.format(versions=spelled(installed())))
    print("## Against MaxText: the decoder alone, 7B, full remat, one microbatch\n")
    print("`--config=configs/finetune.py:7b --config.image_slots=-1 --config.max_rows_per_device=ROWS")
    print("--config.batch_rows=ROWS*DEVICES`; the peer's command is in benchmarks/machines.py.\n")
    print(f"Ours: {spelled(installed('jax', 'libtpu'))}. MaxText 0.2.5: {spelled(MAXTEXT_VERSIONS)}.")
    print(f"{with_versions_of_maxtext()}\n")
    print(text_only(MAXTEXT), flush=True)
    print("## Against a plain step on GPUs: the same, cuDNN attention\n")
    print(f"Ours: {spelled(installed('jax', 'jax-cuda12-pjrt'))}. The plain step: {spelled(PLAIN_VERSIONS)}.\n")
    print(text_only(PLAIN_GPU), flush=True)
    print("## Memory by remat policy: stage 2, 7B, `--config.remat=...`\n")
    results = [[with_policy(name, policy) for policy in POLICIES] for name in POLICY_TARGETS]
    rows = (
        [
            r["target"],
            r["remat"],
            gib(r["memory"]["needed"]),
            "yes" if r["fits"] else "**no**",
            f"{r['flops']['parts']['llm']['recomputed']:.3g}",
        ]
        for line in results
        for r in line
    )
    print(table(["target", "remat", "needed", "fits", "recomputed FLOPs of a step"], rows), flush=True)
    for (recipe, size), names in RECIPES.items():
        stage = {"pretrain": "Stage 1", "finetune": "Stage 2"}[recipe]
        print(f"## {stage}, LLaVA-1.5 {size.upper()}: `--config=configs/{recipe}.py:{size}`\n")
        print(table(RECIPE_HEADER, (recipe_row(preflight(f"{recipe}.py:{size}", name)) for name in names)), flush=True)
    print(llava_next(), flush=True)
    print(adapters())


if __name__ == "__main__":
    main()
