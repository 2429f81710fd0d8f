"""Trains one stage: `python -m llava_jax.main --config=F[:ARGS] --workdir=D [--config.KEY=VALUE ...]`.

example:
  python -m llava_jax.main --config=configs/finetune.py:13b,v1.5 --workdir=runs/finetune \\
    --config.init=runs/pretrain --config.data.json=mix665k.json --config.data.images=images

The same command again resumes. configs/common.py explains every key. On several hosts the same command runs on each:
on TPU pods and under SLURM as it is, elsewhere with --coordinator, --num_processes and --process_id (docs/hosts.md).
"""

import difflib
import re
import runpy
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from llava_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe in configs/, with its argument after a colon.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and logs go; a run found there is resumed.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes meet.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait until all have met.", lower_bound=1)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        print(__doc__ + flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag("workdir")))
        return
    parse_flags(argv, (CONFIG, WORKDIR))
    from llava_jax import distributed  # only now: importing JAX takes a second, and a typing error need not wait
    from llava_jax.train import train

    with distributed.joined(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, START_TIMEOUT.value):
        train(CONFIG.value, WORKDIR.value)


def parse_flags(argv: list[str], required: Sequence[flags.FlagHolder]) -> None:
    """Sets `CONFIG` and the other flags, `~` expanded in all that are paths; every mistake becomes one line."""
    argv = [_expand_home(argument) for argument in argv]
    try:
        remaining = flags.FLAGS(argv)
        missing = [f"--{flag.name}" for flag in required if flag.value is None]
        if not missing:
            _expand_config(CONFIG.value)  # a file that cannot be read is noticed at its first use
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise cli.UserError(_unknown_key(argv) or _last_line(error)) from None
    if len(remaining) > 1:
        raise cli.UserError(f"unexpected argument {remaining[1]!r}: every option begins with --")
    if missing:
        raise cli.UserError(f"{' and '.join(missing)} must be given; see --help")


def _expand_home(argument: str) -> str:
    """`~/D` and `--workdir=~/D` with the home directory. No flag is a text that begins with `~` but is no path."""
    flag, path = re.fullmatch(r"(--[\w.]+=)?(.*)", argument, re.DOTALL).groups()
    return (flag or "") + cli.expand_home(path)


def _expand_config(config: ConfigDict) -> None:
    """The same for what a config file says."""
    with config.unlocked():
        for key, value in config.items():
            if isinstance(value, ConfigDict):
                _expand_config(value)
            elif (expanded := cli.expand_home(value)) != value:
                config[key] = expanded


def _unknown_key(argv: list[str]) -> str | None:
    """If an override names a key that the config lacks, a sentence that names the nearest one."""
    following = [*argv[1:], ""]
    files = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    files += [value for argument, value in zip(argv, following, strict=True) if argument == "--config"]
    keys = [argument[len("--config.") :].split("=")[0] for argument in argv if argument.startswith("--config.")]
    if not files or not keys:
        return None
    file, _, argument = files[-1].partition(":")
    try:
        known = _paths(runpy.run_path(file)["get_config"](argument))
    except (OSError, KeyError, ValueError):
        return None  # the file itself is what is wrong
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            return f"the config has no key {key!r}; the nearest is {nearest!r}"
    return None


def _paths(config: ConfigDict, prefix: str = "") -> list[str]:
    paths = []
    for key, value in config.items():
        paths.append(prefix + key)
        if isinstance(value, ConfigDict):
            paths += _paths(value, f"{prefix}{key}.")
    return paths


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\w+Error: ", "", lines[-1]) if lines else repr(error)


if __name__ == "__main__":
    cli.run(main)
