"""The recipe of LLaVA-1.6 that the package ships: `--config=llava_next` is the same."""

from llava_jax.recipes.llava_next import get_config as get_config
