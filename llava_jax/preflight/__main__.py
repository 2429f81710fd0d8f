"""Compiles the training step for machines that are elsewhere: does it fit, what does it compute and send, how fast can
it be? `python -m llava_jax.preflight --config=F[:ARGS] --target=T[,T...] [--config.KEY=VALUE ...]`.

example:
  python -m llava_jax.preflight --config=configs/finetune.py:7b --target=v5e:4x4
  python -m llava_jax.preflight --config=configs/finetune.py:7b --target=v5e:4x4,v6e:2x4,h100:8
  python -m llava_jax.preflight --config=configs/finetune.py:7b --target=v5e:4x4 --search=batch
  python -m llava_jax.preflight --config=configs/finetune.py:13b --target=h100 --search=slice

Targets are slices of TPU v4, v5e, v5p, v6e and 7x (`v5e:4x4`, `v5p:2x2x4`), GPUs a100, h100, h200 and b200 (`h100:8`,
`h100:2x8` for two hosts) and `cpu`; none of them has to be there. It takes no weights and no data: where a recipe
leaves slots to the data, every row has a picture (packed rows as many as have room) and every position is learned.
Exits with 3 if anything does not fit.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from llava_jax import cli, main
from llava_jax.parallel.hardware import GiB
from llava_jax.preflight import targets

TARGET = flags.DEFINE_list("target", None, "What to compile for, for example v5e:4x4,h100:8; --search=slice takes v5e.")
SEARCH = flags.DEFINE_enum(
    "search", None, ["batch", "slice"], "The most rows on a device, or the least slice, that fits."
)
JSON = flags.DEFINE_bool("json", False, "One line a target, one object a line.")
MEMORY_FRACTION = flags.DEFINE_float(
    "memory_fraction",
    None,
    "The part of a GPU's memory that JAX takes; by default XLA_PYTHON_CLIENT_MEM_FRACTION or, as JAX, 0.75.",
    lower_bound=0.1,
    upper_bound=1.0,
)
UNFIT = 3


def command(argv: list[str]) -> int:
    """`llava preflight`: the arguments without the name of the program."""
    return preflight(["llava preflight", *argv])


def preflight(argv: list[str] | None = None) -> int:
    """-> the exit status."""
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        own = flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag("target"))
        cli.say(cli.as_typed(__doc__) + own)
        return 0
    main.parse_flags(argv, (main.CONFIG, TARGET))
    targets.prepare_environment()
    from llava_jax.preflight import report  # only now: libtpu and JAX read the environment when they are loaded

    find = {None: report.report, "batch": report.largest_batch, "slice": report.smallest_slice}[SEARCH.value]
    results = []
    for name in TARGET.value:
        results.append(find(main.CONFIG.value, name, MEMORY_FRACTION.value))
        if JSON.value:
            print(json.dumps(results[-1]), flush=True)
        elif len(TARGET.value) == 1:
            cli.say(text(results[-1]))
    if not JSON.value and len(TARGET.value) > 1:
        cli.say(table(results))
    return 0 if all(result["fits"] for result in results) else UNFIT


# ----------------------------------------------------------------------------------------------------------- for people


def text(result: dict[str, Any]) -> str:
    """The report of one target."""
    lines = list(_head(result)) + list(_memory_lines(result)) + list(_flops_lines(result))
    if "compiled" in result:
        lines += _collective_lines(result)
    if "bound" in result:
        lines += _bound_lines(result)
    if "search" in result:
        tried = ", ".join(f"{what} {'fits' if fits else 'does not'}" for what, fits in result["tried"].items())
        lines.append(f"search     {result['search']}: {tried}")
    return "\n".join(lines)


def _head(result: dict[str, Any]) -> Iterator[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    yield f"{result['stage']} of {result['model'] or 'the checkpoint'} on {result['target']}"
    yield f"devices    {result['devices']} x {result['device_kind']}, {mesh}"
    yield (
        f"step       {result['batch_rows']} rows of {result['max_length']} tokens: {result['rows_per_device']} at once "
        f"on a device, {result['microbatches']} microbatches; {result['dtype']}, remat {result['remat']}; "
        f"{result['image_slots']} image and {result['label_slots']} label slots a group"
    )


def _memory_lines(result: dict[str, Any]) -> Iterator[str]:
    memory = {part: value / GiB if value is not None else None for part, value in result["memory"].items()}
    parts = [f"{part} {memory[part]:.2f}" for part in ("parameters", "optimizer", "batch")]
    if memory["needed"] is not None:
        parts.append(f"gradients, activations and workspace {memory['activations']:.2f}")
    if memory["margin"]:
        parts.append(f"margin {memory['margin']:.2f}")
    whole = f" = {memory['needed']:.2f}" if memory["needed"] is not None else ""
    yield f"memory     {' + '.join(parts)}{whole} of {memory['available']:.2f} GiB a device"
    if result["fits"]:
        yield f"fits       {memory['available'] - memory['needed']:.2f} GiB to spare"
    else:
        over = f", {memory['needed'] - memory['available']:.2f} GiB too much" if memory["needed"] is not None else ""
        yield f"unfit      {result['reason']}{over}"
        yield f"try        {' or '.join(result['remedies']) or 'a larger machine'}; --search=batch|slice tries more"


def _flops_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'FLOPs':<19}{'forward':>12}{'activations':>13}{'weights':>12}{'recomputed':>12}   of a step, by formula"
    for name, part in result["flops"]["parts"].items():
        yield (
            f"  {name:<17}{part['forward']:>12.3g}{part['activations']:>13.3g}{part['weights']:>12.3g}"
            f"{part['recomputed']:>12.3g}"
        )
    full, causal = (result["flops"]["model"][convention] for convention in ("full", "causal"))
    yield f"  in all without recomputation {full:.4g} with full attention, {causal:.4g} with causal"
    if "compiled" in result:
        compiled = result["compiled"]
        kernels = f", without the kernels' {' and '.join(compiled['left_out'])}" if compiled["left_out"] else ""
        yield f"  compiled {compiled['flops']:.5g} a device, {compiled['ratio']:.4f} of the formula{kernels}"
        if compiled["recomputed"]:
            yield f"  the compiler recomputes {compiled['recomputed']:.3g} unasked, to save memory:"
            yield from (f"    {flops:.3g} at {place}" for place, flops in compiled["recomputed_at"].items())
        for loop in compiled["loops_of_unknown_length"]:
            yield f"  {loop} runs a number of times that depends on data; counted once"


def _collective_lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'collectives':<22}{'dtype':<7}{'count':>7}{'payload GiB':>13}{'sent GiB':>10}   of a device in a step"
    for row in result["collectives"]["kinds"]:
        payload, wire = row["payload"] / GiB, row["wire"] / GiB
        yield f"  {row['kind']:<20}{row['dtype']:<7}{row['count']:>7}{payload:>13.3f}{wire:>10.3f}"
    ratio = result["collectives"]["ratio"]
    yield f"  in all {result['collectives']['wire'] / GiB:.2f} GiB sent" + (
        f", {ratio:.2f} of the ideal {result['collectives']['ideal'] / GiB:.2f}" if ratio else ""
    )


def _bound_lines(result: dict[str, Any]) -> Iterator[str]:
    bound = result["bound"]
    seconds, peaks = bound["seconds"], bound["peaks"]
    between = f" ({peaks['between_hosts'] / 1e9:.0f} GB/s between hosts)" if "between_hosts" in peaks else ""
    yield (
        f"time       {seconds['step']:.3f} s a step at least: compute {seconds['compute']:.3f} s at "
        f"{peaks['flops'] / 1e12:.0f} TFLOP/s, memory {seconds['memory']:.3f} s at {peaks['memory'] / 1e9:.0f} GB/s, "
        f"network {seconds['network']:.3f} s at {peaks['network'] / 1e9:.0f} GB/s{between}"
    )
    yield (
        f"           {bound['tokens_per_second_per_device']:,.0f} tokens/s a device, MFU "
        f"{bound['mfu']['full']:.1%} (full attention) or {bound['mfu']['causal']:.1%} (causal) at most"
    )


def table(results: list[dict[str, Any]]) -> str:
    """A line a target."""
    lines = [
        f"{'target':<12}{'devices':>8}{'rows':>6}{'needed':>9}{'of GiB':>8}  {'fits':<5}{'FLOPs':>7}{'sent GiB':>10}"
        f"{'ideal':>7}{'step s':>8}{'bound by':>10}{'MFU':>7}"
    ]
    for result in results:
        memory = result["memory"]
        needed = f"{memory['needed'] / GiB:.2f}" if memory["needed"] is not None else "?"
        line = (
            f"{result['target']:<12}{result['devices']:>8}{result['rows_per_device']:>6}{needed:>9}"
            f"{memory['available'] / GiB:>8.2f}  {'yes' if result['fits'] else 'no':<5}"
        )
        if "compiled" in result:
            ratio = result["collectives"]["ratio"]
            line += f"{result['compiled']['ratio']:>7.3f}{result['collectives']['wire'] / GiB:>10.2f}"
            line += f"{ratio:>7.2f}" if ratio else f"{'-':>7}"
        if "bound" in result:
            seconds = result["bound"]["seconds"]
            slowest = max(("compute", "memory", "network"), key=seconds.get)
            line += f"{seconds['step']:>8.3f}{slowest:>10}{result['bound']['mfu']['full']:>7.1%}"
        lines.append(line)
    lines.append(
        "rows: at once on a device; FLOPs: compiled / formula; ideal: sent / what parameters split over fsdp take; "
        "step: at least so long"
    )
    for result in results:
        if not result["fits"]:
            lines.append(
                f"{result['target']}: {result['reason']}; try {' or '.join(result['remedies']) or 'a larger one'}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(preflight)
