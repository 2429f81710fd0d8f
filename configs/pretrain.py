"""The recipe of stage 1 that the package ships: `--config=pretrain` is the same."""

from llava_jax.recipes.pretrain import get_config as get_config
