"""Stage 2 of LLaVA-1.6: projector, LLM, newline and vision tower, on tiles (AnyRes). `--config=llava_next[:7b|13b]`.

Stage 1 is that of LLaVA-1.5, `--config=pretrain`. The rates are those of LLaVA-NeXT's
scripts/train/direct_finetune_clip.sh; its global batch is not published.
"""

from ml_collections import ConfigDict

from llava_jax.recipes import common
from llava_jax.recipes.arguments import CHOICES, set_size


def get_config(arg: str = "") -> ConfigDict:
    """Raises ValueError for a size that has no recipe."""
    if arg and arg not in CHOICES["size"]:
        raise ValueError(f"{arg!r} is none of {', '.join(CHOICES['size'])}")
    config = common.get_config()
    set_size(config, "v1.6-vicuna", arg or None)
    config.update(stage="finetune", template="v1", image_aspect="anyres", save_every=1000)
    config.max_rows_per_device = 1  # a row can have five tiles and 2928 features of an image
    config.update(max_length=4096, batch_rows=128, learning_rate=1e-5, vision_learning_rate=2e-6, clip_norm=1.0)
    config.trainable = (
        (r"projector\.", "projector"), (r"llm\.", "llm"), ("image_newline", "newline"), (r"vision\.", "vision")
    )  # fmt: skip
    return config.lock()
