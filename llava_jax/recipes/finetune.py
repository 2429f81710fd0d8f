"""Stage 2, visual instruction tuning: projector and LLM. `--config=finetune[:7b|13b][,v0|v1.5]`."""

from ml_collections import ConfigDict

from llava_jax.recipes import common
from llava_jax.recipes.arguments import parse, set_size


def get_config(arg: str = "") -> ConfigDict:
    size, recipe = parse(arg)
    config = common.get_config()
    config.stage = "finetune"
    set_size(config, recipe, size)
    config.learning_rate = 2e-5
    config.save_every = 1000
    if recipe == "v0":  # LLaVA-Instruct 158K (paper, section 4.2 and appendix C)
        config.template = "llava_v0"
        config.image_position = "random"
        config.image_aspect = "square"
        config.batch_rows = 32
        config.epochs = 3.0
        config.clip_norm = 1.0
    else:  # mix 665K
        config.template = "v1"
        config.image_aspect = "pad"
        config.batch_rows = 128
    return config.lock()
