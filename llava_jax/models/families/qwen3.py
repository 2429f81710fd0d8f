"""Qwen3: LLaMA with RMS norms of the heads of queries and keys, before their rotation."""

import jax
from flax import nnx

from llava_jax.models.config import TextConfig
from llava_jax.models.families import Family, register
from llava_jax.models.hf_names import Entry
from llava_jax.models.layers import RMSNorm
from llava_jax.models.llama import LlamaAttention, LlamaLayer


class Qwen3Attention(LlamaAttention):
    """All heads of a layer share the H weights of `q_norm`, and those of `k_norm`."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))

    def heads(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BTNH, k_BTKH, v_BTKH = super().heads(x_BTD)
        return self.q_norm(q_BTNH), self.k_norm(k_BTKH), v_BTKH


class Qwen3Layer(LlamaLayer):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attention = Qwen3Attention(config, rngs=rngs)


@register
class Qwen3Family(Family):
    name, hf_class = "qwen3", "Qwen3ForCausalLM"
    layer = Qwen3Layer
    defaults = {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    }
    # With `use_sliding_window`, its last layers would have a window; no published one does.
    fixed = {"use_sliding_window": False, "attention_bias": False}

    def layer_entries(self, config: TextConfig, ours: str, hf: str) -> list[Entry]:
        return super().layer_entries(config, ours, hf) + [
            Entry(f"{ours}.attention.{norm}.scale", f"{hf}.self_attn.{norm}.weight") for norm in ("q_norm", "k_norm")
        ]
