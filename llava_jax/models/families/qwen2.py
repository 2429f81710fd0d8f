"""Qwen2 and Qwen2.5: LLaMA with biases of queries, keys and values."""

from llava_jax.models.config import TextConfig
from llava_jax.models.families import Family, register
from llava_jax.models.hf_fields import Json


@register
class Qwen2Family(Family):
    name, hf_class = "qwen2", "Qwen2ForCausalLM"
    defaults = {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    }
    # With `use_sliding_window`, Qwen2 has a window in its last layers only; no published one does.
    fixed = {"use_sliding_window": False, "mlp_bias": False}

    def fits(self, config: TextConfig) -> bool:
        return config.family is None and config.qkv_bias

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        return {"qkv_bias": True}
