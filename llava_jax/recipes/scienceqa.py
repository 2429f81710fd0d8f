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
    set_size(config, "v0", arg or None, published="13b")
    config.update(stage="finetune", template="llava_v0", image_aspect="square", save_every=1000)
    config.image_position = "as_is"  # after the question, as in the data
    config.update(batch_rows=32, epochs=12.0, learning_rate=2e-5, clip_norm=1.0)
    return config.lock()
