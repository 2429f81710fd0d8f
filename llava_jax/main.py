"""Trains one stage: `python -m llava_jax.main --config=F[:ARGS] --workdir=D [--config.KEY=VALUE ...]`.

example:
  python -m llava_jax.main --config=finetune:13b,v1.5 --workdir=runs/finetune \\
    --config.init=runs/pretrain --config.data.json=mix665k.json --config.data.images=images

The same command again resumes the run. If its newest checkpoint is damaged, give --resume-from with an earlier step.
--config takes the name of a recipe (pretrain, finetune, finetune_lora, llava_next, scienceqa) or the path of one;
llava_jax/recipes/common.py explains every option. On several hosts, run the same command on each: on TPU pods and under
SLURM as it is, on other clusters with --coordinator, --num_processes and --process_id (docs/hosts.md).
"""

import sys

from absl import flags

from llava_jax import cli
from llava_jax.config_flag import CONFIG, parse_flags

flags.declare_key_flag("config")
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
    from llava_jax.parallel import distributed  # only now: JAX takes a second, and mistakes are reported before
    from llava_jax.training.run import train_and_plot

    with distributed.joined(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, START_TIMEOUT.value):
        train_and_plot(CONFIG.value, WORKDIR.value, RESUME_FROM.value)


if __name__ == "__main__":
    cli.run(main)
