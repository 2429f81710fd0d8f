"""A real chat model, SmolLM2-135M-Instruct, learns to see: `--config=configs/smollm2.py:pretrain` and `:finetune`.

Stage 1 trains the projector alone, so that the language model, which never changes, learns to name what it sees. The
tower is small and the pictures are easy-VQA's; learning rates are those of a model of this size.
"""

from ml_collections import ConfigDict

from llava_jax.recipes import common


def get_config(stage: str = "") -> ConfigDict:
    config = common.get_config()
    config.stage = stage
    config.image_aspect = "square"
    config.data.holdout = 40
    config.remat = "none"  # memory is no concern
    config.save_every = 100
    config.clip_norm = 1.0  # a projector that knows nothing yet makes large gradients in a model that knows much
    if stage == "pretrain":
        config.template = "plain"
        config.max_length = 80
        config.batch_rows = 8
        config.learning_rate = 5e-3
    elif stage == "finetune":
        config.template = "chatml"
        config.max_length = 448
        config.pack = True
        config.row_length = 1120  # four conversations about a picture each
        config.batch_rows = 2
        config.steps = 90
        config.learning_rate = 3e-4
        config.projector_learning_rate = 1e-3
    else:
        raise ValueError(f"{stage!r} is neither pretrain nor finetune: --config=configs/smollm2.py:pretrain")
    return config.lock()
