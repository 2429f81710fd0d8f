"""Mistral (Jiang et al. 2023): LLaMA, in v0.1 with a sliding window."""

from llava_jax.models.config import TextConfig
from llava_jax.models.families import Family, register
from llava_jax.models.hf_fields import Json


@register
class MistralFamily(Family):
    name, hf_class = "mistral", "MistralForCausalLM"
    defaults = {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }
    fixed = {"attention_bias": False, "mlp_bias": False}
    original = "llava_mistral"

    def fits(self, config: TextConfig) -> bool:
        return config.family is None and not config.qkv_bias

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        return {"sliding_window": json["sliding_window"]}

    def write_fields(self, config: TextConfig) -> Json:
        return {"sliding_window": config.sliding_window}
