"""A real chat model, SmolLM2-135M-Instruct, learns to see: `--config=configs/smollm2.py:pretrain` and `:finetune`.

Stage 1 trains only the projector: the frozen language model learns to name what an image shows. The tower is small and
the images are those of easy-VQA; learning rates are those of a model of this size.
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
    config.clip_norm = 1.0  # an untrained projector makes large gradients in a trained language model
    if stage == "pretrain":
        config.template = "plain"
        config.max_length = 80
        config.batch_rows = 8
        config.learning_rate = 5e-3
    elif stage == "finetune":
        config.template = "chatml"
        config.max_length = 448
        config.pack = True
        config.row_length = 1120  # four conversations about an image each
        config.batch_rows = 2
        config.steps = 90
        config.learning_rate = 3e-4
        config.projector_learning_rate = 1e-3
    else:
        raise ValueError(f"{stage!r} is neither pretrain nor finetune: --config=configs/smollm2.py:pretrain")
    return config.lock()
