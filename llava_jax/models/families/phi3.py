"""Phi-3 with a context of 4k: LLaMA with a sliding window, whose files have some matrices as one."""

from llava_jax.models.config import TextConfig
from llava_jax.models.families import Family, register
from llava_jax.models.hf_fields import Json


@register
class Phi3Family(Family):
    name, hf_class = "phi3", "Phi3ForCausalLM"
    defaults = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }
    fixed = {
        "attention_bias": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,  # which matters with `longrope` only
    }

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        return super().read_fields(json, where) | {"sliding_window": json["sliding_window"]}

    def write_fields(self, config: TextConfig) -> Json:
        return {"sliding_window": config.sliding_window}

    def fused(self, config: TextConfig) -> dict[str, dict[str, int]]:
        heads, kv_heads = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
        return {
            "qkv_proj": {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads},
            "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
        }
