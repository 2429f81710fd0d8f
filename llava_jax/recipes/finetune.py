"""Stage 2, visual instruction tuning: projector and LLM. `--config=finetune[:7b|13b][,v0|v1.5]`."""

from ml_collections import ConfigDict

from llava_jax.recipes import common
from llava_jax.recipes.arguments import parse, set_size


def get_config(arg: str = "") -> ConfigDict:
    size, recipe = parse(arg)
    config = common.get_config()
    set_size(config, recipe, size)
    config.update(stage="finetune", learning_rate=2e-5, save_every=1000)
    if recipe == "v0":  # LLaVA-Instruct 158K (paper, section 4.2 and appendix C)
        config.update(template="llava_v0", image_position="random", image_aspect="square")
        config.update(batch_rows=32, epochs=3.0, clip_norm=1.0)
    else:  # mix 665K
        config.update(template="v1", image_aspect="pad", batch_rows=128)
    return config.lock()
