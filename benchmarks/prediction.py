"""Writes docs/prediction.md: predicted step times beside those that others published, and its plot.

    python benchmarks/prediction.py > docs/prediction.md

Takes minutes for each step on two cores. Compiled texts are kept in runs/prediction/ with the versions of the compilers
in their names, so that an interrupted run resumes. Remove them after changing the step.

--names NAME ... compiles only these. --compiled compiles nothing: steps without a text are listed as missing.
--fit prints the rates that fit the rows of `FITTED` best, for llava_jax/preflight/rates.py.

Published steps are those of other programs. Here the decoder alone of our step is compiled with the same shapes, mesh
and rows, and with a remat policy that recomputes the same products.
"""

import argparse
import dataclasses
import gzip
import importlib.metadata
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.preflight import targets

targets.prepare_environment()  # before JAX is imported

import jax  # noqa: E402
from jax.experimental.pallas.ops.tpu import splash_attention as splash  # noqa: E402

from configs import finetune  # noqa: E402
from llava_jax.models import attention, execution  # noqa: E402
from llava_jax.models.config import PRESETS, TextConfig  # noqa: E402
from llava_jax.parallel import hardware  # noqa: E402
from llava_jax.preflight import compile as ahead  # noqa: E402
from llava_jax.preflight import hlo_text, predict, rates  # noqa: E402

TEXTS = Path("runs/prediction")
PLOT = Path("docs/images/prediction.svg")

LLAMA2_7B = TextConfig(32000, 4096, 11008, 32, 32, 32, 128)
LLAMA2_70B = TextConfig(32000, 8192, 28672, 80, 64, 8, 128)
LLAMA31_8B = TextConfig(128256, 4096, 14336, 32, 32, 8, 128)
LLAMA31_70B = TextConfig(128256, 8192, 28672, 80, 64, 8, 128)
MISTRAL_7B = TextConfig(32000, 4096, 14336, 32, 32, 8, 128)
# `global_parameter_scale` 16, 32 and 64 of MaxText's base.yml.
SCALE_16B = TextConfig(32000, 4096, 28672, 32, 64, 64, 128)
SCALE_64B = TextConfig(32000, 8192, 28672, 64, 64, 64, 128)
SCALE_32B = TextConfig(32000, 8192, 28672, 32, 64, 64, 128)


def saves_all_but_the_mlps(primitive: Any, *shapes: Any, **_: Any) -> bool:
    """MaxText's save_dot_except_mlpwi: all products but those of the gate and up projections."""
    return primitive is jax.lax.dot_general_p and shapes[1].shape[-1] < 2 * shapes[1].shape[0]


# What the published steps keep for the backward pass -> our policy, and what it is in place of.
POLICIES: dict[str, tuple[str, Callable]] = {
    "everything": ("none", execution.REMAT_POLICIES["none"]),
    "products": ("none", lambda primitive, *_, **__: primitive is jax.lax.dot_general_p),
    "nothing": ("full", execution.REMAT_POLICIES["full"]),
    "all but gate and up": ("none", saves_all_but_the_mlps),
    "qkv, offloaded": (
        "save_qkv",
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[execution.LAYER_INPUT, execution.QKV],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}


class Published(NamedTuple):
    """A step that was measured."""

    model: str
    text: TextConfig
    target: str
    rows: int  # of a device, or of the devices that split each layer
    length: int
    keeps: str  # of `POLICIES`
    seconds: float  # measured
    source: str
    fused: bool = False  # one kernel for all gradients of attention
    network: float = 0.0  # bytes/s between hosts, where it is not that of the target
    tensor: int = 1  # devices that split each layer
    data: int = 1  # replicas


def by_mfu(text: TextConfig, rows: int, length: int, flops_per_second: float) -> float:
    """Seconds of a step whose rate is published, by MaxText's formula of then: attention counts in full."""
    layer = text.hidden_size * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads)
    products = text.num_layers * (layer + 3 * text.hidden_size * text.intermediate_size)
    products += text.hidden_size * text.vocab_size
    attended = 12 * text.num_layers * text.num_heads * text.head_dim * length
    return rows * length * (6 * products + attended) / flops_per_second


RECIPES = "tpu-recipes, training/trillium/"
STEPS = {
    "llama3.1-8b v6e-8": Published(
        "Llama-3.1-8B", LLAMA31_8B, "v6e:2x4", 3, 8192, "qkv, offloaded", 3.443, RECIPES + "Llama3.1-8B-MaxText", True
    ),
    "llama3.1-8b v6e-16": Published(
        "Llama-3.1-8B", LLAMA31_8B, "v6e:4x4", 3, 8192, "qkv, offloaded", 3.393, RECIPES + "Llama3.1-8B-MaxText", True
    ),
    "llama3.1-8b v6e-256": Published(
        "Llama-3.1-8B", LLAMA31_8B, "v6e:16x16", 4, 8192, "qkv, offloaded", 4.546, RECIPES + "Llama3.1-8B-MaxText", True
    ),
    "mistral-7b v6e-8": Published(
        "Mistral-7B", MISTRAL_7B, "v6e:2x4", 6, 8192, "qkv, offloaded", 6.320, RECIPES + "Mistral-7B-MaxText", True
    ),
    "llama2-70b v6e-256": Published(
        "Llama-2-70B", LLAMA2_70B, "v6e:16x16", 2, 4096, "qkv, offloaded", 9.052, RECIPES + "Llama2-70B-MaxText"
    ),
    "llama3.1-70b v6e-128": Published(
        "Llama-3.1-70B", LLAMA31_70B, "v6e:8x16", 4, 8192, "qkv, offloaded", 34.786,
        RECIPES + "Llama3.1-70B-MaxText", True,
    ),
    "16b v5e-256": Published(
        "16B", SCALE_16B, "v5e:16x16", 6, 2048, "nothing", by_mfu(SCALE_16B, 6, 2048, 0.611 * 197e12),
        "MaxText, configs/tpu/v5e: 61.1 %",
    ),
    "32b v5e-256": Published(
        "32B", SCALE_32B, "v5e:16x16", 4, 2048, "nothing", by_mfu(SCALE_32B, 4, 2048, 0.669 * 197e12),
        "MaxText, configs/tpu/v5e: 66.9 %",
    ),
    "64b v5e-256": Published(
        "64B", SCALE_64B, "v5e:16x16", 2, 2048, "nothing", by_mfu(SCALE_64B, 2, 2048, 0.599 * 197e12),
        "MaxText, configs/tpu/v5e: 59.9 %",
    ),
    "32b v5p-128": Published(
        "32B", SCALE_32B, "v5p:4x4x4", 24, 2048, "products", by_mfu(SCALE_32B, 6, 2048, 0.7147 * 459e12),
        "MaxText, configs/tpu/v5p: 71.5 %", tensor=4,
    ),
    "llama2-70b v5p-512": Published(
        "Llama-2-70B", LLAMA2_70B, "v5p:4x8x8", 4, 4096, "all but gate and up", 4 * 4096 / 692,
        "MaxText, tiering.md of its docs",
    ),
    "llama2-7b 8 h100, 4 rows": Published(
        "Llama-2-7B", LLAMA2_7B, "h100:8", 4, 4096, "everything", by_mfu(LLAMA2_7B, 4, 4096, 492e12),
        "MaxText, configs/gpu/a3/llama_2_7b: 492 TFLOP/s",
    ),
    "llama2-7b 8 h100, 2 rows": Published(
        "Llama-2-7B", LLAMA2_7B, "h100:8", 2, 4096, "everything", 0.721, "JAX-Toolbox, rosetta, maxtext"
    ),
}  # fmt: skip
A3 = {16: 422e12, 32: 407e12, 64: 409e12, 128: 375e12}  # FLOP/s of a GPU by number, each host a replica
STEPS |= {
    f"llama2-7b {count} h100": Published(
        "Llama-2-7B", LLAMA2_7B, f"h100:{count // 8}x8", 4, 4096, "everything", by_mfu(LLAMA2_7B, 4, 4096, rate),
        f"MaxText, configs/gpu/a3/llama_2_7b: {rate / 1e12:.0f} TFLOP/s", network=25e9, data=count // 8,
    )
    for count, rate in A3.items()
}  # fmt: skip
# Rates are fitted on these alone: that of attention on TPUs, that of products on GPUs. All others are published.
H100 = ("llama2-7b 8 h100, 4 rows", "llama2-7b 8 h100, 2 rows", "llama2-7b 16 h100")
SEEN = ("16b v5e-256", "32b v5e-256", "32b v5p-128", *H100)  # before the rates were settled
FITTED = ("16b v5e-256", "llama3.1-8b v6e-8", "llama2-7b 8 h100, 4 rows")


# ------------------------------------------------------------------------------------------------- compiling the steps


def text_of(name: str, may_compile: bool) -> str | None:
    """The compiled text of a step, from `TEXTS` if it is there."""
    versions = "-".join(importlib.metadata.version(wheel) for wheel in ("jax", "libtpu"))
    path = TEXTS / f"{name.replace(' ', '_').replace(',', '')}-{versions}.hlo.gz"
    if not path.exists():
        if not may_compile:
            return None
        print(name, file=sys.stderr, flush=True)
        text = compiled_text(STEPS[name])
        TEXTS.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode(), 6))
    return gzip.decompress(path.read_bytes()).decode()


def compiled_text(step: Published) -> str:
    program = program_of(step)
    with targets.nothing_cached(), targets.assumed_cudnn():
        lowered = program.training.lower()
        return lowered.compile(compiler_options=targets.compile_options(program.target)).as_text()


def program_of(step: Published) -> ahead.Program:
    """Our step in its place: the decoder alone, with its rows and policy. GPUs have endless memory, since our policy
    keeps more than the published one, and the compiler would recompute."""
    remat, policy = POLICIES[step.keeps]
    execution.REMAT_POLICIES[remat] = policy
    attention._splash_kernel = fused_kernel if step.fused else SEPARATE_KERNELS
    for name, gpu in hardware.GPUS.items():
        hardware.GPUS[name] = dataclasses.replace(gpu, memory=8 * 10**12)
    llava = PRESETS["llava-v1.5-7b"]
    PRESETS["published"] = dataclasses.replace(
        llava, text=dataclasses.replace(llava.text, **dataclasses.asdict(step.text))
    )
    target, config = targets.parse(step.target), finetune.get_config("7b")
    config.update(
        model="published", image_slots=-1, max_length=step.length, remat=remat,
        max_rows_per_device=step.rows, batch_rows=step.rows * target.devices // step.tensor,
    )  # fmt: skip
    config.mesh.update(tensor=step.tensor, data=step.data)
    return ahead.build(config, target)


SEPARATE_KERNELS = attention._splash_kernel


def fused_kernel(length: int, heads: int, *_: Any) -> Callable:
    """Splash attention with one kernel for all gradients. Published are blocks of 2048, which take many minutes to
    compile; these of 512 compute the same with less that is masked out."""
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys(names, 512), use_fused_bwd_kernel=True)
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes)


# ------------------------------------------------------------------------------------------------------- comparing them


@dataclasses.dataclass
class Compared:
    name: str
    step: Published
    module: hlo_text.Module
    hardware: predict.Hardware

    def seconds(self, changed: rates.Rates | None = None) -> float:
        """The predicted time of a step, also with other rates."""
        with_rates = self.hardware._replace(rates=changed or self.hardware.rates)
        return predict.summary(predict.operations(self.module, with_rates))["seconds"]

    def error(self, changed: rates.Rates | None = None) -> float:
        return self.seconds(changed) / self.step.seconds - 1


def compared(name: str, text: str) -> Compared:
    step = STEPS[name]
    program = program_of(step)
    found = predict.hardware_of(program.target, program.mesh)
    if step.network:
        found = found._replace(machine=dataclasses.replace(found.machine, network=step.network))
    return Compared(name, step, hlo_text.parse(text), found)


def fit(rows: list[Compared]) -> None:
    """Prints the errors of these rows with other rates: of attention on TPUs, of products on GPUs."""
    for rate in (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75):
        for row in rows:
            fitted = ("product",) if row.hardware.rates.clock == 0 else ("attention", "attention_backward")
            error = row.error(row.hardware.rates._replace(**dict.fromkeys(fitted, rate)))
            print(f"{row.name}: {' and '.join(fitted)} {rate}: {error:+.1%}")


# ------------------------------------------------------------------------------------------------------------- writing

INTRODUCTION = """\
# Prediction

`python benchmarks/prediction.py > docs/prediction.md` writes this file. `llava_jax.preflight` predicts how long a step
takes, without the hardware: it walks the schedule of the program that the compilers for TPUs and GPUs emit
(llava_jax/preflight/predict.py) with what machines reach of their data sheets (llava_jax/preflight/rates.py). Here
predictions stand beside steps that others measured and published. Compiled with {versions}.

The published steps are those of other programs (MaxText). Ours is compiled in their place: the decoder alone, with the
same shapes, rows and mesh (all devices in `fsdp`; several hosts of H100 are replicas; 32B on v5p has a `tensor` axis of
4), and a remat policy that recomputes the same products. What differs:

- Our own schedule: what overlaps with what, layouts, the order of gathers.
- Attention blocks of 512 positions, where the steps on v6e have 2048. Where they compute all gradients in one kernel,
  so does this.
- On GPUs, ours keeps elementwise results that MaxText's `minimal_flash` computes again.
- 16B, 32B and 64B are those of MaxText's base.yml of today; the published rates are older.
- Hosts of H100 are connected at 200 Gbit/s a GPU, as in Google's A3.
"""
EXPLANATION = """\
Two rates are fitted: that of attention on TPUs and that of products on GPUs, on {fitted}. All others are from data
sheets, from the compiler or published by others; llava_jax/preflight/rates.py has their sources. How cycles count was
decided after 16B and 32B on v5e and the steps on 8 and 16 H100 had been seen; {blind} were first predicted with the
rates as they are. That links of different axes and directions send at the same time was added after 32B on v5p had been
seen, whose error it took from 39 to 26 %: its layers are split over a `tensor` axis, as others may do in other ways.

`low` and `high` of a prediction are {tpu} of it on TPUs, {gpu} on GPUs; {inside} of the {all} published steps lie
between them. They are wide because few steps were compared, and none with images, adapters or quantized weights. On
other machines they are {other}."""


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(row: Compared) -> list[str]:
    step, seconds = row.step, row.seconds()
    return [
        *(step.model, step.target, f"{step.rows} x {step.length}", step.keeps),
        *(f"{step.seconds:.2f}", f"{seconds:.2f}", f"{row.error():+.1%}", step.source),
    ]


def accuracy(rows: list[Compared]) -> str:
    errors = [abs(row.error()) for row in rows]
    return f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}" if errors else "none compiled"


def plot(rows: list[Compared]) -> str:
    """Predicted against published seconds, on logarithmic axes."""
    low, high, size, edge = 0.5, 64.0, 420, 50

    def at(seconds: float) -> float:
        return size * math.log(seconds / low) / math.log(high / low)

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 2 * edge} {size + 2 * edge}" '
             'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for share, dashes in ((1.0, ""), (0.8, "4"), (1.25, "4")):
        start, end = max(low, low / share), min(high, high / share)
        lines.append(
            f'<line x1="{edge + at(start):.1f}" y1="{edge + size - at(start * share):.1f}" x2="{edge + at(end):.1f}" '
            f'y2="{edge + size - at(end * share):.1f}" stroke="gray" stroke-dasharray="{dashes}"/>'
        )
    for tick in (0.5, 1, 2, 4, 8, 16, 32, 64):
        place = at(tick)
        lines.append(f'<text x="{edge + place:.1f}" y="{edge + size + 18}" text-anchor="middle">{tick:g}</text>')
        lines.append(f'<text x="{edge - 8}" y="{edge + size - place + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for row in rows:
        colour = "tomato" if row.name in FITTED else "steelblue"
        x, y = edge + at(row.step.seconds), edge + size - at(row.seconds())
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{row.name}</title></circle>')
    middle = edge + size / 2
    lines.append(f'<text x="{middle}" y="{size + 2 * edge - 8}" text-anchor="middle">published, seconds a step</text>')
    lines.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">predicted</text>')
    lines.append(f'<text x="{edge}" y="20">red: fitted; blue: judged; dashed: 20 % away</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=STEPS, metavar="NAME", default=list(STEPS))
    parser.add_argument("--compiled", action="store_true", help="compile nothing")
    parser.add_argument("--fit", action="store_true", help="print rates that fit the rows of FITTED")
    args = parser.parse_args()
    texts = {name: text_of(name, not args.compiled) for name in args.names}
    found = [compared(name, text) for name, text in texts.items() if text]
    if args.fit:
        fit([row for row in found if row.name in FITTED])
        return
    versions = ", ".join(f"{wheel} {importlib.metadata.version(wheel)}" for wheel in ("jax", "libtpu"))
    print(INTRODUCTION.format(versions=versions))
    header = ["model", "target", "rows x length", "kept for the backward pass", "published s", "predicted s", "error"]
    groups = {
        "Judged": [row for row in found if row.name not in FITTED],
        "Fitted": [row for row in found if row.name in FITTED],
    }
    for title, rows in groups.items():
        print(f"## {title}: {accuracy(rows)}\n")
        print(table([*header, "source"], map(shown, rows)))
    if missing := [name for name, text in texts.items() if not text]:
        print(textwrap.fill(f"Chosen, but not compiled yet: {', '.join(missing)}.", 120) + "\n")
    tpu, gpu = rates.TPU, rates.GPU
    inside = [row.hardware.rates.low <= row.step.seconds / row.seconds() <= row.hardware.rates.high for row in found]
    explanation = EXPLANATION.format(
        fitted=" and ".join(row.name for row in groups["Fitted"]),
        blind=" and ".join(row.name for row in found if row.name not in SEEN),
        tpu=f"{tpu.low:.2f} and {tpu.high:.2f}",
        gpu=f"{gpu.low:.2f} and {gpu.high:.2f}",
        other="{:.2f} and {:.2f}".format(*rates.ELSEWHERE),
        inside=sum(inside),
        all=len(inside),
    )
    print("\n\n".join(textwrap.fill(paragraph, 120) for paragraph in explanation.split("\n\n")) + "\n")
    print("![Predicted against published seconds](images/prediction.svg)")
    PLOT.write_text(plot(found))


if __name__ == "__main__":
    main()
