"""Prints the FLOPs and collectives of a compiled program: `python -m llava_jax.hlo FILE`.

FILE has the HLO text of `compiled.as_text()`, see llava_jax/preflight/hlo_cost.py.
"""

import sys
from pathlib import Path

from llava_jax import cli
from llava_jax.preflight.hlo_cost import cost, table


def main() -> None:
    if {"-h", "--help"}.intersection(sys.argv):
        cli.say(__doc__)
    elif len(sys.argv) == 2:
        cli.say(table(cost(Path(sys.argv[1]).read_text())))
    else:
        raise cli.UserError("give the file of an HLO text; see --help")


if __name__ == "__main__":
    cli.run(main)
