"""Gemma 3 (text): LLaMA with norms after attention and MLP, too, and mostly layers that see a window only."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.cli import UserError, shown
from llava_jax.models.config import Span, TextConfig
from llava_jax.models.families import register
from llava_jax.models.families.qwen3 import Qwen3Attention, Qwen3Family
from llava_jax.models.hf_fields import Json, get, part
from llava_jax.models.hf_names import Entry
from llava_jax.models.layers import RMSNorm
from llava_jax.models.llama import Embedding, LlamaLayer, SwiGLU

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # transformers' words
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


@dataclasses.dataclass(frozen=True)
class Gemma3Config(TextConfig):
    """`sliding_window` and `local_rope_theta` are of all layers but each `global_every`-th."""

    local_rope_theta: float = LOCAL_THETA
    global_every: int = 6

    @property
    def spans(self) -> tuple[Span, ...]:
        local = Span(self.sliding_window, self.local_rope_theta)
        return local, Span(None, self.rope_theta, self.rope_scaling)

    def span_of(self, layer: int) -> int:
        return int((layer + 1) % self.global_every == 0)


class GemmaNorm(RMSNorm):
    """Its weights are 1 + `scale`."""

    def __init__(self, features: int, eps: float):
        super().__init__(features, eps)
        self.scale = nnx.Param(jnp.zeros(features))

    @property
    def weight(self) -> jax.Array:
        return 1.0 + self.scale[...].astype(jnp.float32)


class ScaledEmbedding(Embedding):
    """Words are multiplied by sqrt(D), rounded to the table's type; the features of images are not."""

    def __init__(self, vocab_size: int, features: int, *, rngs: nnx.Rngs):
        super().__init__(vocab_size, features, rngs=rngs)
        self.factor = features**0.5  # the table may be a shard, with fewer columns

    def __call__(self, tokens: jax.Array) -> jax.Array:
        words = super().__call__(tokens)
        return words * jnp.asarray(self.factor, words.dtype)


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) * up(x))."""

    activation = staticmethod(jax.nn.gelu)  # tanh's approximation


class Gemma3Layer(LlamaLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, H, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.attention, self.mlp = Qwen3Attention(config, rngs=rngs), GeGLU(config, rngs=rngs)
        self.attention.q_norm, self.attention.k_norm = GemmaNorm(H, eps), GemmaNorm(H, eps)
        self.input_layernorm, self.post_attention_layernorm = GemmaNorm(D, eps), GemmaNorm(D, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = GemmaNorm(D, eps), GemmaNorm(D, eps)

    def after_attention(self, x_BTD, attended_BTNH) -> jax.Array:
        attended_BTD = self.attention.o_proj(attended_BTNH.reshape(*x_BTD.shape[:2], -1))
        x_BTD += self.post_attention_layernorm(attended_BTD)
        with jax.named_scope("mlp"):
            x_BTD += self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD)))
        return x_BTD


@register
class Gemma3Family(Qwen3Family):
    name, hf_class = "gemma3_text", "Gemma3ForCausalLM"
    layer, norm, embedding, config_class = Gemma3Layer, GemmaNorm, ScaledEmbedding, Gemma3Config
    defaults = {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }
    fixed = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }

    def plain(self, json: Json, where: str) -> Json:
        """With one rope, that of the global layers, and no list of layers, which `read_fields` reads."""
        ropes, types = part(json, "rope_parameters", where), get(json, "layer_types", [], where)
        plain = {field: value for field, value in json.items() if field not in ("layer_types", "rope_parameters")}
        if unknown := ropes.keys() - {GLOBAL, LOCAL}:
            raise UserError(f"{where}: rope_parameters has {shown(min(unknown))}, not {LOCAL} and {GLOBAL} alone")
        rope, local = (part(ropes, kind, f"{where}: rope_parameters") for kind in (GLOBAL, LOCAL))
        if not local.keys() <= {"rope_type", "rope_theta"} or local.get("rope_type", "default") != "default":
            raise UserError(
                f"{where}: rope_parameters.{LOCAL} is {shown(local)}; only rope_type 'default' is supported"
            )
        if rope.get("rope_theta") is None and plain.get("rope_theta") is None:
            plain["rope_theta"] = GLOBAL_THETA
        if local.get("rope_theta") is not None:
            plain["rope_local_base_freq"] = local["rope_theta"]
        if types:
            every = 1 + types.index(GLOBAL) if GLOBAL in types else 1 + len(types)
            if types != [GLOBAL if (layer + 1) % every == 0 else LOCAL for layer in range(len(types))]:
                raise UserError(f"{where}: layer_types has no {GLOBAL} at each {every}th place alone: not supported")
            plain["sliding_window_pattern"] = every
        return plain | {"rope_parameters": rope}

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        heads = get(json, "head_dim", 256, where)
        if get(json, "query_pre_attn_scalar", 256, where) != heads:
            raise UserError(f"{where}: query_pre_attn_scalar is not head_dim, {heads}, which alone is supported")
        return super().read_fields(json, where) | {
            "sliding_window": get(json, "sliding_window", 4096, where),
            "local_rope_theta": get(json, "rope_local_base_freq", LOCAL_THETA, where),
            "global_every": get(json, "sliding_window_pattern", 6, where),
        }

    def write_fields(self, config: Gemma3Config) -> Json:
        scaling = config.rope_scaling
        rope = {"rope_type": scaling.kind, "factor": scaling.factor} if scaling else {"rope_type": "default"}
        return {
            "hidden_act": None,
            "query_pre_attn_scalar": config.head_dim,
            "sliding_window": config.sliding_window,
            "sliding_window_pattern": config.global_every,
            "layer_types": [(LOCAL, GLOBAL)[config.span_of(layer)] for layer in range(config.num_layers)],
            "rope_local_base_freq": config.local_rope_theta,
            "rope_parameters": {
                GLOBAL: rope | {"rope_theta": config.rope_theta},
                LOCAL: {"rope_type": "default", "rope_theta": config.local_rope_theta},
            },
        }

    def layer_entries(self, config: TextConfig, ours: str, hf: str) -> list[Entry]:
        return super().layer_entries(config, ours, hf) + [
            Entry(f"{ours}.{norm}.scale", f"{hf}.{norm}.weight")
            for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        ]
