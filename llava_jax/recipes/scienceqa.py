"""ScienceQA, from a checkpoint of stage 1: `--config=scienceqa[:13b|7b]`.

The paper's recipe (section 5.2): 12 epochs, reasoning before the answer, which is the format of the data:
`python -m llava_jax.evaluate questions scienceqa --split train --format QCM-LEPA ...`.
"""

from ml_collections import ConfigDict

from llava_jax.recipes import common
from llava_jax.recipes.arguments import MAX_ROWS_PER_DEVICE, set_size


def get_config(arg: str = "") -> ConfigDict:
    if arg and arg not in MAX_ROWS_PER_DEVICE:
        raise ValueError(f"{arg!r} is none of {', '.join(MAX_ROWS_PER_DEVICE)}")
    config = common.get_config()
    config.stage = "finetune"
    set_size(config, "v0", arg or None, published="13b")
    config.template = "llava_v0"
    config.image_position = "as_is"  # after the question, as in the data
    config.image_aspect = "square"
    config.batch_rows = 32
    config.epochs = 12.0
    config.learning_rate = 2e-5
    config.clip_norm = 1.0
    config.save_every = 1000
    return config.lock()
