"""The recipe of stage 2 that the package ships: `--config=finetune` is the same."""

from llava_jax.recipes.finetune import get_config as get_config
