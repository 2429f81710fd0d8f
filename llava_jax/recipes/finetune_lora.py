"""Stage 2 with LoRA, as published for LLaVA-1.5. `--config=finetune_lora[:7b|13b]`."""

from ml_collections import ConfigDict

from llava_jax.recipes import finetune


def get_config(arg: str = "") -> ConfigDict:
    """`finetune` with the published adapters and rates. Raises ValueError for v0, which has no recipe with LoRA."""
    if "v0" in (arg or "").split(","):
        raise ValueError(f"'v0' in {arg!r}: LoRA has a published recipe for v1.5 only")
    config = finetune.get_config(arg)
    config.update(learning_rate=2e-4, projector_learning_rate=2e-5)
    config.lora.update(rank=128, alpha=256.0, dropout=0.05)
    return config
