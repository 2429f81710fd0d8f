"""Stage 1, feature alignment: only the projector is trained. `--config=pretrain[:7b|13b][,v0|v1.5]`."""

from ml_collections import ConfigDict

from llava_jax.recipes import common
from llava_jax.recipes.arguments import parse, set_size


def get_config(arg: str = "") -> ConfigDict:
    size, recipe = parse(arg)
    config = common.get_config()
    set_size(config, recipe, size)
    config.update(stage="pretrain", image_aspect="square", save_every=1000)
    if recipe == "v0":  # CC3M 595K (paper, section 4.2 and appendix C)
        config.update(template="llava_v0", image_position="random")
        config.update(batch_rows=128, learning_rate=2e-3, clip_norm=1.0)
    else:  # LCS 558K: an image and its caption, without a prompt
        config.update(template="plain", batch_rows=256, learning_rate=1e-3)
    return config.lock()
