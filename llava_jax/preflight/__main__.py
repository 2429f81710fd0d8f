"""Compiles the training step for hardware you don't have: whether it fits, its FLOPs and bytes, and how long it takes.
`python -m llava_jax.preflight --config=F[:ARGS] --target=T[,T...] [--config.KEY=VALUE ...]`.

example:
  python -m llava_jax.preflight --config=finetune:7b --target=v5e:4x4
  python -m llava_jax.preflight --config=finetune:7b --target=v5e:4x4,v6e:2x4,h100:8
  python -m llava_jax.preflight --config=finetune:7b --target=v5e:4x4 --search=batch
  python -m llava_jax.preflight --config=finetune:13b --target=h100 --search=slice
  python -m llava_jax.preflight --config=finetune:7b --target=v5e:4x4 --search=fastest --price=1.2 --samples=665000

Targets are slices of TPU v4, v5e, v5p, v6e and 7x (`v5e:4x4`, `v5p:2x2x4`), GPUs l4, a10g, rtx4090, l40s,
a100-40, a100, h100, h200 and b200 (`h100:8`, `h100:2x8` for two hosts) and `cpu`. Compilation is ahead of time: no such
device, no weights and no data are needed. If a recipe leaves slots to the data, every row has an image (packed rows as
many as fit) and every position is a target. Exits with 3 if anything does not fit.
"""

import dataclasses
import json
import sys

from absl import flags

from llava_jax import cli
from llava_jax.config_flag import CONFIG, parse_flags
from llava_jax.preflight import targets

TARGET = flags.DEFINE_list("target", None, "What to compile for, for example v5e:4x4,h100:8; --search=slice takes v5e.")
SEARCH = flags.DEFINE_enum(
    "search",
    None,
    ["batch", "slice", "fastest"],
    "Find the most rows on a device, or the smallest slice, that fit; or rows on a device, remat policy and mesh of "
    "the shortest predicted step.",
)
PRICE = flags.DEFINE_float("price", None, "Of a chip for an hour: the cost of an epoch of --samples.", lower_bound=0.0)
SAMPLES = flags.DEFINE_integer("samples", None, "Of an epoch, for --price.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object a target, one a line.")
MEMORY_FRACTION = flags.DEFINE_float(
    "memory_fraction",
    None,
    "The share of a GPU's memory that JAX takes; by default XLA_PYTHON_CLIENT_MEM_FRACTION or, as JAX, 0.75.",
    lower_bound=0.1,
    upper_bound=1.0,
)
UNFIT = 3


def command(argv: list[str]) -> int:
    """`llava preflight`: the arguments without the name of the program."""
    return preflight(["llava preflight", *argv])


def preflight(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        own = flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag("target"))
        cli.say(cli.as_typed(__doc__) + own)
        return 0
    parse_flags(argv, (CONFIG, TARGET))
    targets.prepare_environment()
    from llava_jax.preflight import report, search, text  # only now: libtpu and JAX read the environment at import

    if (PRICE.value is None) != (SAMPLES.value is None):
        raise cli.UserError(
            "--price and --samples belong together: the price of a chip for an hour, samples of an epoch"
        )
    if PRICE.value is not None and "cpu" in TARGET.value:
        raise cli.UserError("--price: times are predicted for TPUs and GPUs, not for cpu")
    searches = {"batch": search.largest_batch, "slice": search.smallest_slice, "fastest": search.fastest}
    find = searches.get(SEARCH.value, report.report)
    reports = []
    for name in cli.track(TARGET.value, "compiling", every=0.0) if len(TARGET.value) > 1 else TARGET.value:
        found = find(CONFIG.value, name, MEMORY_FRACTION.value)
        if PRICE.value is not None and found.fits:
            found = dataclasses.replace(found, cost=found.epoch_cost(PRICE.value, SAMPLES.value))
        reports.append(found)
        if JSON.value:
            print(json.dumps(found.to_json()), flush=True)
        elif len(TARGET.value) == 1:
            cli.say(cli.wrapped(found.to_text()))
    if not JSON.value and len(TARGET.value) > 1:
        cli.say(cli.wrapped(text.table(reports)))
    return 0 if all(report.fits for report in reports) else UNFIT


if __name__ == "__main__":
    cli.run(preflight)
