"""Trains one stage: `python -m llava_jax.main --config=F[:ARGS] --workdir=D [--config.KEY=VALUE ...]`.

example:
  python -m llava_jax.main --config=finetune:13b,v1.5 --workdir=runs/finetune \\
    --config.init=runs/pretrain --config.data.json=mix665k.json --config.data.images=images

The same command again resumes the run. If its newest checkpoint is damaged, give --resume-from with an earlier step.
--config takes the name of a recipe (pretrain, finetune, scienceqa) or the path of one; llava_jax/recipes/common.py
explains every option. On several hosts, run the same command on each: on TPU pods and under SLURM as it is, on other
clusters with --coordinator, --num_processes and --process_id (docs/hosts.md).
"""

import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from llava_jax import cli, flag_errors, recipes

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe, by name or path, with its argument after a colon: finetune:13b, my/recipe.py."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The directory of checkpoints, metrics and logs; a run found there is resumed."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, which the other processes connect to.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.", lower_bound=0)
START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait until all processes are connected.", lower_bound=1
)
RESUME_FROM = flags.DEFINE_integer(
    "resume_from",
    None,
    "Resume from this step, not from the newest: later checkpoints are moved to set_aside/.",
    lower_bound=0,
)
flags.DEFINE_alias("resume-from", "resume_from")


def command(argv: list[str]) -> None:
    """`llava train`: the arguments without the name of the program, which comes first in those of Abseil."""
    main(["llava train", *argv])


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        own = flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag("workdir"))
        cli.say(cli.as_typed(__doc__) + own)
        return
    parse_flags(argv, (CONFIG, WORKDIR))
    from llava_jax.training.run import train_on_hosts  # only now: JAX takes a second, and mistakes are reported before

    hosts = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, START_TIMEOUT.value)
    train_on_hosts(CONFIG.value, WORKDIR.value, RESUME_FROM.value, *hosts)


def parse_flags(argv: list[str], required: Sequence[flags.FlagHolder]) -> None:
    """Parses the flags, with `~` expanded in paths. Raises UserError, one line, for every mistake."""
    argv = _find_recipe([_expand_home(argument) for argument in argv])
    try:
        remaining = flags.FLAGS(argv)
        missing = [f"--{flag.name}" for flag in required if flag.value is None]
        if file := flag_errors.recipe_file(argv):
            if CONFIG.value is not None:
                CONFIG.value.keys()  # raises the error of a file that cannot be read
            if not isinstance(CONFIG.value, ConfigDict):
                raise cli.UserError(f"{file}: get_config() returns no ConfigDict")
            recipes.expand_paths(CONFIG.value)
    except Exception as error:  # a recipe may raise any
        raise cli.UserError(flag_errors.explain(error, argv)) from None
    if len(remaining) > 1:
        raise cli.UserError(f"unexpected argument {remaining[1]!r}: every option begins with --")
    if missing:
        raise cli.UserError(f"{' and '.join(missing)} must be given; see --help")


def _find_recipe(argv: list[str]) -> list[str]:
    """Replaces the name of a recipe in `--config=NAME` or `--config NAME` by the path of its file."""
    found = list(argv)
    for index, argument in enumerate(argv):
        if match := re.match(r"--?config=(?=.)", argument):
            found[index] = match[0] + recipes.find(argument[match.end() :])
        elif argument in ("--config", "-config") and index + 1 < len(argv):
            found[index + 1] = recipes.find(argv[index + 1])
    return found


def _expand_home(argument: str) -> str:
    """`~/D`, `--workdir=~/D` and `-workdir=~/D` with the home directory. No flag is a text that begins with `~` but is
    no path."""
    flag, path = re.fullmatch(r"(--?[\w.]+=)?(.*)", argument, re.DOTALL).groups()
    return (flag or "") + cli.expand_home(path)


if __name__ == "__main__":
    cli.run(main)
