"""Decoder families: LLaMA (models/llama.py) and its relatives. A family is a module that registers one `Family`."""

from collections.abc import Mapping

from flax import nnx

from llava_jax.models.config import TextConfig
from llava_jax.models.hf_fields import Json
from llava_jax.models.hf_names import TABLE, TRANSPOSE, Entry, linears, stacked
from llava_jax.models.layers import RMSNorm
from llava_jax.models.llama import Embedding, LlamaLayer
from llava_jax.models.registry import FAMILIES, registers


class Family:
    """A family of decoders. Subclasses set the attributes and override the methods where they differ from LLaMA."""

    name: str  # the `model_type` of transformers, and what `TextConfig.family` calls it
    hf_class: str  # its model class in transformers, `...ForCausalLM`
    layer: type[nnx.Module] = LlamaLayer  # or a subclass that computes differently
    norm: type[nnx.Module] = RMSNorm  # after the last layer
    embedding: type[nnx.Module] = Embedding  # the table of words
    config_class: type[TextConfig] = TextConfig  # or a subclass with more fields
    defaults: Json = {}  # where transformers' configuration class differs from LLaMA's
    fixed: Json = {}  # fields of its `config.json` that change the computation, with the only value supported
    original: str | None = None  # the `model_type` that the original LLaVA gives its models of this family, if any
    # Of parameters that `parallel.sharding.PARAMETER_AXES` has no pattern for.
    parameter_axes: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    def fits(self, config: TextConfig) -> bool:
        """Whether this family computes what `config` says.

        Checkpoints name every family but the three oldest, which are told by their fields.
        """
        return config.family == self.name

    def plain(self, json: Json, where: str) -> Json:
        """Its `config.json` with LLaMA's fields where others mean the same."""
        return json

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        """Fields of `config_class` that LLaMA's `config.json` does not have."""
        return {"family": self.name}

    def write_fields(self, config: TextConfig) -> Json:
        """The same fields in an export's `text_config`."""
        return {}

    def entries(self, config: TextConfig) -> list[Entry]:
        """Our parameters (`llm.layers.mlp.up_proj.kernel`) and transformers' (`layers.0.mlp.up_proj.weight`).

        All but the vocabulary projection, which `head_entries` has.
        """
        return [
            Entry("llm.embed_tokens.embedding", "embed_tokens.weight", TABLE),
            *stacked(self.layer_entries(config, "llm.layers", "layers.{layer}"), config.num_layers),
            Entry("llm.norm.scale", "norm.weight"),
        ]

    def layer_entries(self, config: TextConfig, ours: str, hf: str) -> list[Entry]:
        """The entries of a layer, whose names begin with `ours` and `hf`."""
        return [
            Entry(f"{ours}.input_layernorm.scale", f"{hf}.input_layernorm.weight"),
            Entry(f"{ours}.post_attention_layernorm.scale", f"{hf}.post_attention_layernorm.weight"),
            *linears(f"{ours}.attention", f"{hf}.self_attn", ["q_proj", "k_proj", "v_proj"], bias=config.qkv_bias),
            *linears(f"{ours}.attention", f"{hf}.self_attn", ["o_proj"], bias=False),
            *linears(f"{ours}.mlp", f"{hf}.mlp", ["gate_proj", "up_proj", "down_proj"], bias=False),
        ]

    def fused(self, config: TextConfig) -> Mapping[str, Mapping[str, int]]:
        """Matrices of its files (`qkv_proj`) that hold several of the entries' -> the rows of each, in their order."""
        return {}


register = registers(FAMILIES)


def family_of(config: TextConfig, model_type: str | None = None) -> Family:
    """The family of a decoder; of several that compute the same, the one with this `model_type`, or the first."""
    fitting = [family for family in FAMILIES.values() if family.fits(config)]
    return next((family for family in fitting if family.name == model_type), fitting[0])


def head_entries(config: TextConfig) -> list[Entry]:
    """`lm_head.weight`; nothing where it is tied to the embeddings."""
    return [] if config.tie_word_embeddings else [Entry("llm.lm_head.kernel", "lm_head.weight", TRANSPOSE)]
