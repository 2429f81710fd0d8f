"""Stage 1, feature alignment: only the projector is trained. `--config=pretrain[:7b|13b][,v0|v1.5]`."""

from ml_collections import ConfigDict

from llava_jax.recipes import common
from llava_jax.recipes.arguments import parse, set_size


def get_config(arg: str = "") -> ConfigDict:
    size, recipe = parse(arg)
    config = common.get_config()
    config.stage = "pretrain"
    set_size(config, recipe, size)
    config.image_aspect = "square"
    config.save_every = 1000
    if recipe == "v0":  # CC3M 595K (paper, section 4.2 and appendix C)
        config.template = "llava_v0"
        config.image_position = "random"
        config.batch_rows = 128
        config.learning_rate = 2e-3
        config.clip_norm = 1.0
    else:  # LCS 558K: an image and its caption, without a prompt
        config.template = "plain"
        config.batch_rows = 256
        config.learning_rate = 1e-3
    return config.lock()
