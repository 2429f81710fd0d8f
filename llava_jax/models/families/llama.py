"""LLaMA (Touvron et al. 2023), Vicuna and everything else that transformers loads as a LLaMA."""

from llava_jax.models.config import TextConfig
from llava_jax.models.families import Family, register
from llava_jax.models.hf_fields import Json


@register
class LlamaFamily(Family):
    name, hf_class = "llama", "LlamaForCausalLM"
    fixed = {"attention_bias": False, "mlp_bias": False, "sliding_window": None}
    original = "llava_llama"

    def fits(self, config: TextConfig) -> bool:
        return config.family is None and not config.qkv_bias and config.sliding_window is None

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        return {}
