"""Every option of a run, as the package ships it: recipes of your own can start from it."""

from llava_jax.recipes.common import get_config as get_config
