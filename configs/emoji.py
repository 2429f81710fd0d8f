"""SmolLM2-135M-Instruct learns to see emoji: `--config=configs/emoji.py:pretrain` and `:finetune`.

As in configs/smollm2.py, stage 1 trains the projector and stage 2 projector and language model, with the learning
rates of a model of this size.
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
        # Not `plain`: SmolLM2 begins a text with no token of its own, so the image would come first there, and the
        # tokens after it attend mostly to the first position, whatever it holds.
        config.template = "chatml"
        config.max_length = 108
        config.pack = True
        config.row_length = 432  # five samples
        config.batch_rows = 2
        config.steps = 300  # here the names are learned
        config.learning_rate = 4e-3
        config.warmup_ratio = 0.1  # with less the loss may first rise for a hundred steps
    elif stage == "finetune":
        config.template = "chatml"
        config.max_length = 320
        config.pack = True
        config.row_length = 480  # three or four conversations; attention to longer rows costs more
        config.batch_rows = 2
        config.steps = 200
        config.learning_rate = 2e-4
        config.projector_learning_rate = 5e-4
    else:
        raise ValueError(f"{stage!r} is neither pretrain nor finetune: --config=configs/emoji.py:pretrain")
    return config.lock()
