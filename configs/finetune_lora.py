"""The recipe of stage 2 with LoRA that the package ships: `--config=finetune_lora` is the same."""

from llava_jax.recipes.finetune_lora import get_config as get_config
