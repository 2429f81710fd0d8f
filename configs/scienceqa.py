"""The recipe of ScienceQA that the package ships: `--config=scienceqa` is the same."""

from llava_jax.recipes.scienceqa import get_config as get_config
