"""Compiles the training step for machines that are elsewhere: does it fit, what does it compute and send, how fast can
it be? `python -m llava_jax.preflight --config=F[:ARGS] --target=T[,T...] [--config.KEY=VALUE ...]`.

example:
  python -m llava_jax.preflight --config=configs/finetune.py:7b --target=v5e:4x4
  python -m llava_jax.preflight --config=configs/finetune.py:7b --target=v5e:4x4,v6e:2x4,h100:8
  python -m llava_jax.preflight --config=configs/finetune.py:7b --target=v5e:4x4 --search=batch
  python -m llava_jax.preflight --config=configs/finetune.py:13b --target=h100 --search=slice

Targets are slices of TPU v4, v5e, v5p, v6e and 7x (`v5e:4x4`, `v5p:2x2x4`), GPUs a100, h100, h200 and b200 (`h100:8`,
`h100:2x8` for two hosts) and `cpu`; none of them has to be there. It takes no weights and no data: where a recipe
leaves slots to the data, every row has a picture and every position is learned. Exits with 3 if anything does not fit.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from llava_jax import cli, main, targets
from llava_jax.machines import GiB

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


def preflight(argv: list[str] | None = None) -> int:
    """-> the exit status."""
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        print(__doc__ + flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag("target")))
        return 0
    main.parse_flags(argv, (main.CONFIG, TARGET))
    targets.prepare_environment()
    results = []
    for name in TARGET.value:
        results.append(_search(name) if SEARCH.value else report(main.CONFIG.value, name))
        if JSON.value:
            print(json.dumps(results[-1]), flush=True)
        elif len(TARGET.value) == 1:
            print(text(results[-1]))
    if not JSON.value and len(TARGET.value) > 1:
        print(table(results))
    return 0 if all(result["fits"] for result in results) else UNFIT


# ---------------------------------------------------------------------------------------------------------- one target


def report(config: Any, name: str) -> dict[str, Any]:
    """Compiles and measures; every figure of the report, bytes, FLOPs and seconds, ready for JSON."""
    from llava_jax import ahead, flops, sharding

    target = targets.parse(name)
    print(f"compiling for {name} ...", file=sys.stderr, flush=True)
    program = ahead.build(config, target)
    compiled = ahead.compile_program(program, MEMORY_FRACTION.value if MEMORY_FRACTION.present else None)
    settings, memory = program.settings, compiled.memory
    parts = ahead.step_parts(program)
    result = {
        "target": name,
        "fits": memory.fits,
        "devices": program.mesh.size,
        "device_kind": program.mesh.devices.flat[0].device_kind,
        "mesh": sharding.axis_sizes(program.mesh),
        "stage": config.stage,
        "model": config.model,
        "remat": settings.remat,
        "dtype": settings.dtype.name,
        "batch_rows": settings.layout.batch_rows,
        "rows_per_device": program.rows,
        "microbatches": settings.accumulation,
        "max_length": settings.layout.max_length,
        "image_slots": settings.layout.image_slots,
        "label_slots": settings.layout.label_slots,
        "memory": dataclasses.asdict(memory),
        "flops": {
            "parts": {part: dataclasses.asdict(value) for part, value in parts.items()},
            "model": {convention: flops.model_flops(parts, convention) for convention in flops.CONVENTIONS},
        },
        "compile_seconds": compiled.seconds,
    }
    if not memory.fits:
        larger = {other: targets.parse(other).devices for other in target.larger}
        result |= {"reason": compiled.reason, "remedies": ahead.remedies(compiled, larger)}
    if compiled.account is not None:
        result |= _measured(compiled, parts)
    return result


def _measured(compiled: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """What the compiled text says: FLOPs beside the formula, collectives, and the bound of the time."""
    from llava_jax import ahead, flops

    program, account = compiled.program, compiled.account
    hidden = ahead.hidden_parts(account)
    expected = flops.executed_flops(parts, without=hidden) / program.mesh.size
    ideal = ahead.ideal_wire(program)
    measured = {
        "compiled": {
            "flops": account.flops,
            "formula": expected,
            "ratio": account.flops / expected,
            "recomputed": account.recomputed_flops,
            "kernels": account.kernels,
            "left_out": list(hidden),
            "loops_of_unknown_length": list(account.unknown_loops),
        },
        "collectives": {
            "kinds": account.by_kind(),
            "wire": account.wire,
            "ideal": ideal,
            "ratio": account.wire / ideal if ideal else None,
        },
    }
    machine = program.target.machine
    if machine is None:
        return measured
    seconds = ahead.lower_bound(compiled)
    tokens = program.settings.layout.batch_rows * program.settings.layout.max_length
    peaks = {"flops": machine.flops, "memory": machine.bandwidth, "network": program.target.send_rate}
    if program.target.platform == "gpu":
        peaks["between_hosts"] = machine.network
    return measured | {
        "bound": {
            "seconds": seconds,
            "peaks": peaks,
            "tokens_per_second_per_device": tokens / seconds["step"] / program.mesh.size,
            "mfu": flops.mfu(parts, seconds["step"], program.mesh.size, machine.flops),
        }
    }


# ------------------------------------------------------------------------------------------------------------- searches


def _search(name: str) -> dict[str, Any]:
    return (
        largest_batch(main.CONFIG.value, name) if SEARCH.value == "batch" else smallest_slice(main.CONFIG.value, name)
    )


def largest_batch(config: Any, name: str) -> dict[str, Any]:
    """The report of the most rows at once on a device that fit, `batch_rows` being rounded up to a multiple."""
    tried: dict[int, dict[str, Any]] = {}

    def fits(groups: int) -> bool:
        tried[groups] = report(with_rows(config, name, groups * config.rows_per_group), name)
        return tried[groups]["fits"]

    good, bad = 0, 1
    while bad <= config.batch_rows // config.rows_per_group and fits(bad):
        good, bad = bad, bad * 2
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    rows = {groups * config.rows_per_group: result["fits"] for groups, result in sorted(tried.items())}
    return tried[good or 1] | {"search": "batch", "tried": rows}


def with_rows(config: Any, name: str, rows: int) -> Any:
    """The configuration with so many rows on a device at once and, if need be, more rows in a step."""
    from llava_jax import sharding

    shards = sharding.batch_shards(sharding.make_mesh(config.mesh.to_dict(), targets.devices(targets.parse(name))))
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.max_rows_per_device = rows
        changed.batch_rows = -(-config.batch_rows // (rows * shards)) * rows * shards
    return changed


def smallest_slice(config: Any, kind: str) -> dict[str, Any]:
    """The report of the least machine of a kind that fits. Rows on a device at once are as the configuration says,
    `batch_rows` being rounded up to a multiple; the largest where none fits."""
    names = targets.family(kind.partition(":")[0])
    tried: dict[str, bool] = {}
    for name in names:
        rows = max(config.max_rows_per_device, config.rows_per_group)
        result = report(with_rows(config, name, rows), name)
        tried[name] = result["fits"]
        if result["fits"]:
            break
    return result | {"search": "slice", "tried": tried}


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


def _head(result: dict[str, Any]):
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    yield f"{result['stage']} of {result['model'] or 'the checkpoint'} on {result['target']}"
    yield f"devices    {result['devices']} x {result['device_kind']}, {mesh}"
    yield (
        f"step       {result['batch_rows']} rows of {result['max_length']} tokens: {result['rows_per_device']} at once "
        f"on a device, {result['microbatches']} microbatches; {result['dtype']}, remat {result['remat']}; "
        f"{result['image_slots']} image and {result['label_slots']} label slots a group"
    )


def _memory_lines(result: dict[str, Any]):
    memory = {part: value / GiB if value is not None else None for part, value in result["memory"].items()}
    parts = [
        f"parameters {memory['parameters']:.2f}",
        f"optimizer {memory['optimizer']:.2f}",
        f"batch {memory['batch']:.2f}",
    ]
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


def _flops_lines(result: dict[str, Any]):
    yield f"{'FLOPs':<17}{'forward':>12}{'activations':>13}{'weights':>12}{'recomputed':>12}   of a step, by formula"
    for name, part in result["flops"]["parts"].items():
        yield (
            f"  {name:<15}{part['forward']:>12.3g}{part['activations']:>13.3g}{part['weights']:>12.3g}"
            f"{part['recomputed']:>12.3g}"
        )
    full, causal = (result["flops"]["model"][convention] for convention in ("full", "causal"))
    yield f"  in all without recomputation {full:.4g} with full attention, {causal:.4g} with causal"
    if "compiled" in result:
        compiled = result["compiled"]
        kernels = f", without the kernels' {' and '.join(compiled['left_out'])}" if compiled["left_out"] else ""
        yield (
            f"  compiled {compiled['flops']:.5g} a device, {compiled['ratio']:.4f} of the formula{kernels}"
            + (f"; the compiler recomputes {compiled['recomputed']:.3g} unasked" if compiled["recomputed"] else "")
        )


def _collective_lines(result: dict[str, Any]):
    yield f"{'collectives':<22}{'dtype':<7}{'count':>7}{'payload GiB':>13}{'sent GiB':>10}   of a device in a step"
    for row in result["collectives"]["kinds"]:
        payload, wire = row["payload"] / GiB, row["wire"] / GiB
        yield f"  {row['kind']:<20}{row['dtype']:<7}{row['count']:>7}{payload:>13.3f}{wire:>10.3f}"
    ratio = result["collectives"]["ratio"]
    yield f"  in all {result['collectives']['wire'] / GiB:.2f} GiB sent" + (
        f", {ratio:.2f} of the ideal {result['collectives']['ideal'] / GiB:.2f}" if ratio else ""
    )


def _bound_lines(result: dict[str, Any]):
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
