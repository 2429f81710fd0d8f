"""`python -m llava_jax.hlo FILE`: the cost of a compiled program, see llava_jax/preflight/hlo_cost.py."""

from llava_jax import cli
from llava_jax.preflight.hlo_cost import main

if __name__ == "__main__":
    cli.run(main)
