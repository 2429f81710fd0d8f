"""The quickstart's two stages on easy-VQA: `--config=configs/quickstart.py:pretrain` and `:finetune`.

A model of a million parameters needs larger learning rates than one of billions; all else is as in the recipes.
"""

from ml_collections import ConfigDict

from llava_jax.recipes import common


def get_config(stage: str = "") -> ConfigDict:
    config = common.get_config()
    config.stage = stage
    config.image_aspect = "square"
    config.data.holdout = 100
    config.remat = "none"  # memory is no concern
    config.save_every = 100
    if stage == "pretrain":
        config.template = "plain"
        config.max_length = 80
        config.batch_rows = 32
        config.epochs = 2.0
        config.learning_rate = 2e-3
    elif stage == "finetune":
        config.template = "v1"
        config.max_length = 256
        config.batch_rows = 25
        config.epochs = 3.0  # with 2 some runs end before they learn all shapes
        config.learning_rate = 1e-3
    else:
        raise ValueError(f"{stage!r} is neither pretrain nor finetune: --config=configs/quickstart.py:pretrain")
    return config.lock()
