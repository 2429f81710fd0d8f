"""Preflight reports as text: one report in lines, several as a table."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llava_jax.cli import narrowed
from llava_jax.parallel.hardware import GiB
from llava_jax.training.flops import model_flops

if TYPE_CHECKING:
    from llava_jax.preflight.report import Bound, Collectives, CompiledFlops, Prediction, Report


def text(report: "Report") -> str:
    """One report."""
    lines = [*_head(report), *_memory_lines(report), *_flops_lines(report)]
    lines += _compiled_lines(report.compiled) if report.compiled else ()
    lines += _collective_lines(report.collectives) if report.collectives else ()
    lines += _bound_lines(report.bound) if report.bound else ()
    lines += _prediction_lines(report.prediction) if report.prediction else ()
    return "\n".join([*lines, *_found_lines(report)])


def _head(report: "Report") -> Iterator[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    yield f"{report.stage} of {report.model or 'the checkpoint'} on {report.target}"
    yield f"devices    {report.devices} x {report.device_kind}, {mesh}"
    yield (
        f"step       {report.batch_rows} rows of {report.max_length} tokens: {report.rows_per_device} at once "
        f"on a device, {report.microbatches} microbatches; {report.dtype}, remat {report.remat}; "
        f"{report.image_slots} image and {report.label_slots} label slots a group"
    )


def _memory_lines(report: "Report") -> Iterator[str]:
    memory = report.memory
    sizes = {"parameters": memory.parameters, "optimizer": memory.optimizer, "batch": memory.batch}
    if memory.needed is not None:
        sizes["gradients, activations and workspace"] = memory.activations
    if memory.margin:
        sizes["margin"] = memory.margin
    total = f" = {memory.needed / GiB:.2f}" if memory.needed is not None else ""
    parts = " + ".join(f"{name} {size / GiB:.2f}" for name, size in sizes.items())
    yield f"memory     {parts}{total} of {memory.available / GiB:.2f} GiB a device"
    if report.fits:
        yield f"fits       {(memory.available - memory.needed) / GiB:.2f} GiB to spare"
    else:
        over = f", {(memory.needed - memory.available) / GiB:.2f} GiB too much" if memory.needed is not None else ""
        yield f"unfit      {report.reason}{over}"
        yield f"try        {' or '.join(report.remedies) or 'a larger machine'}; --search=batch|slice tries more"


def _flops_lines(report: "Report") -> Iterator[str]:
    yield f"{'FLOPs':<19}{'forward':>12}{'activations':>13}{'weights':>12}{'recomputed':>12}   of a step, by formula"
    for name, part in report.flops.items():
        yield f"  {name:<17}{part.forward:>12.3g}{part.activations:>13.3g}{part.weights:>12.3g}{part.recomputed:>12.3g}"
    full, causal = (model_flops(report.flops, convention) for convention in ("full", "causal"))
    yield f"  in all without recomputation {full:.4g} with full attention, {causal:.4g} with causal"


def _compiled_lines(compiled: "CompiledFlops") -> Iterator[str]:
    kernels = f", without the kernels' {' and '.join(compiled.left_out)}" if compiled.left_out else ""
    yield f"  compiled {compiled.flops:.5g} a device, {compiled.ratio:.4f} of the formula{kernels}"
    if compiled.recomputed:
        yield f"  the compiler recomputes {compiled.recomputed:.3g} more, to save memory:"
        yield from (f"    {flops:.3g} at {place}" for place, flops in compiled.recomputed_at.items())
    for loop in compiled.loops_of_unknown_length:
        yield f"  {loop}: its number of iterations depends on data; counted once"


def _collective_lines(collectives: "Collectives") -> Iterator[str]:
    yield f"{'collectives':<22}{'dtype':<7}{'count':>7}{'payload GiB':>13}{'sent GiB':>10}   of a device in a step"
    for row in collectives.kinds:
        payload, wire = row["payload"] / GiB, row["wire"] / GiB
        yield f"  {row['kind']:<20}{row['dtype']:<7}{row['count']:>7}{payload:>13.3f}{wire:>10.3f}"
    ideal = f", {collectives.ratio:.2f} of the ideal {collectives.ideal / GiB:.2f}" if collectives.ratio else ""
    yield f"  in all {collectives.wire / GiB:.2f} GiB sent{ideal}"


def _bound_lines(bound: "Bound") -> Iterator[str]:
    seconds, peaks = bound.seconds, bound.peaks
    between = f" ({peaks['between_hosts'] / 1e9:.0f} GB/s between hosts)" if "between_hosts" in peaks else ""
    yield (
        f"time       {seconds['step']:.3f} s a step at least: compute {seconds['compute']:.3f} s at "
        f"{peaks['flops'] / 1e12:.0f} TFLOP/s, memory {seconds['memory']:.3f} s at {peaks['memory'] / 1e9:.0f} GB/s, "
        f"network {seconds['network']:.3f} s at {peaks['network'] / 1e9:.0f} GB/s{between}"
    )
    yield (
        f"           {bound.tokens_per_second_per_device:,.0f} tokens/s a device, MFU "
        f"{bound.mfu['full']:.1%} (full attention) or {bound.mfu['causal']:.1%} (causal) at most"
    )


def _prediction_lines(prediction: "Prediction") -> Iterator[str]:
    yield (
        f"predicted  {prediction.seconds:.3f} s a step, between {prediction.low:.3f} and {prediction.high:.3f} s: "
        f"{prediction.tokens_per_second_per_device:,.0f} tokens/s a device, MFU {prediction.mfu['full']:.1%} (full) or "
        f"{prediction.mfu['causal']:.1%} (causal); {prediction.exposed_communication:.3f} s wait for communication"
    )
    yield f"  {'seconds of a step':<26}{'compute':>9}{'memory':>9}{'network':>9}"
    for name, kinds in prediction.parts.items():
        yield f"  {name:<26}" + "".join(f"{seconds:>9.3f}" for seconds in kinds.values())
    yield "  longest operations"
    for one in prediction.longest:
        total, each = one["seconds"] * one["times"], one["seconds"] * 1e3
        yield f"  {one['part']:<26}{total:>9.3f} s = {one['times']} x {each:.3f} ms, {one['kind']}, {one['name']}"


def _found_lines(report: "Report") -> Iterator[str]:
    """What an epoch costs, and what a search found."""
    if report.cost:
        yield (
            f"epoch      {report.cost['samples']:,} samples, one a row, are {report.cost['steps']:,} steps: "
            f"{report.cost['hours']:,.3g} hours, {report.cost['money']:,.2f} at this price"
        )
    if report.search == "fastest":
        yield f"fastest    {' '.join(report.overrides) if report.fits else 'none fits'}"
        for overrides, seconds in sorted(report.tried.items(), key=lambda one: one[1] or math.inf):
            yield f"  {f'{seconds:.4g} s' if seconds else 'does not fit':<14}{overrides}"
    elif report.search:
        tried = ", ".join(f"{what} {'fits' if fits else 'does not'}" for what, fits in report.tried.items())
        yield f"search     {report.search}: {tried}"


def table(reports: "Sequence[Report]") -> str:
    """A line for each report, or two on a narrow terminal; then what was found besides."""
    lines = [
        f"{'target':<12}{'devices':>8}{'rows':>6}{'needed':>9}{'of GiB':>8}  {'fits':<5}{'FLOPs':>7}{'sent GiB':>10}"
        f"{'ideal':>7}{'step s':>8}{'bound by':>10}{'MFU':>7}"
        f"{'predicted s':>13}{'range':>15}{'MFU':>7}"
    ]
    lines += map(_row, reports)
    lines = narrowed(lines, beside=12, cut=74)  # the target; all but times
    lines.append(
        "rows: at once on a device; FLOPs: compiled / formula; ideal: sent / what parameters sharded over fsdp need; "
        "step: the least time; predicted: docs/prediction.md"
    )
    for report in reports:
        if not report.fits:
            lines.append(f"{report.target}: {report.reason}; try {' or '.join(report.remedies) or 'a larger one'}")
        lines += [f"{report.target}: {line}" for line in _found_lines(report)]
    return "\n".join(lines)


def _row(report: "Report") -> str:
    memory = report.memory
    needed = f"{memory.needed / GiB:.2f}" if memory.needed is not None else "?"
    line = (
        f"{report.target:<12}{report.devices:>8}{report.rows_per_device:>6}{needed:>9}"
        f"{memory.available / GiB:>8.2f}  {'yes' if report.fits else 'no':<5}"
    )
    if report.compiled:
        ratio = report.collectives.ratio
        line += f"{report.compiled.ratio:>7.3f}{report.collectives.wire / GiB:>10.2f}"
        line += f"{ratio:>7.2f}" if ratio else f"{'-':>7}"
    if report.bound:
        seconds = report.bound.seconds
        slowest = max(("compute", "memory", "network"), key=seconds.get)
        line += f"{seconds['step']:>8.3f}{slowest:>10}{report.bound.mfu['full']:>7.1%}"
    if report.prediction:
        found = report.prediction
        line += f"{found.seconds:>13.3f}{f'{found.low:.3f}-{found.high:.3f}':>15}{found.mfu['full']:>7.1%}"
    return line
