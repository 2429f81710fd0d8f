"""Vision towers: the encoder g of the paper. A tower is a module that registers one `Tower`: read clip.py next."""

from collections.abc import Mapping

from flax import nnx

from llava_jax.models.config import CLIP_MEAN, CLIP_STD, VisionConfig
from llava_jax.models.hf_fields import Json, get_all, in_hf, in_words_of_hf, require
from llava_jax.models.hf_names import OIHW_TO_HWIO, TABLE, Entry, layer_norm, linears, stacked
from llava_jax.models.registry import TOWERS, registers

# Fields of all towers, with transformers' defaults; the last ones are in `Tower.defaults`.
_FIELDS = {"hidden_size": 768, "intermediate_size": 3072, "num_layers": 12, "num_heads": 12, "image_size": 224}
_FIELDS |= {"patch_size": 0, "layer_norm_eps": 0.0, "hidden_act": ""}
# Fields of a `vision_config` that change the computation, with the only value supported.
_FIXED = {"num_channels": 3, "attention_dropout": 0.0}


class Tower:
    """A kind of vision tower. Subclasses set the attributes and override the methods where they differ from a ViT."""

    name: str  # what `VisionConfig.kind` calls it
    # `module(config, rngs=rngs)` has the stacked `layers` (`layers.stack_layers`), and maps (float[N, image_size,
    # image_size, 3] normalized pixels, number of layers to run, `Execution`) to [N, S, D]; for several numbers of
    # layers, to their states side by side, as `clip.run_layers` does.
    module: type[nnx.Module]
    config_class: type[VisionConfig] = VisionConfig  # or a subclass with more fields
    class_token = False  # whether the first of the S tokens is no patch
    model_type: str  # of the tower's `config.json` in transformers
    whole_model_type: str | None = None  # of a model of transformers that it is the `vision_config` of, if there is one
    # What transformers' configuration class has where a `config.json` says nothing of these fields.
    defaults: Json = {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
    fixed: Json = {}  # fields of its `config.json` that change the computation, with the only value supported
    hf_prefix = "vision_tower.vision_model."  # of the names of its tensors in a LLaVA of transformers
    # Of its training images, RGB in 0..1; used where no preprocessor_config.json says.
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    image_aspect: str | None = None  # "resize" if its own image processor stretches images to a square
    # Prefixes of our parameters that no feature depends on; they are stored for exports, and never trained.
    unused: tuple[str, ...] = ("vision.post_layernorm.",)
    ignored: tuple[str, ...] = ()  # patterns of tensors of transformers in such a tower that no feature depends on
    original: Mapping[str, VisionConfig] = {}  # towers that the original LLaVA knows by their names on the Hub
    # Of parameters that `parallel.sharding.PARAMETER_AXES` has no pattern for.
    parameter_axes: tuple[tuple[str, tuple[str | None, ...]], ...] = ()

    def entries(self, config: VisionConfig) -> list[Entry]:
        """Our parameters (`vision.layers.mlp.fc1.kernel`) and transformers' (`encoder.layers.0.mlp.fc1.weight`)."""
        ours, hf = "vision.layers", "encoder.layers.{layer}"
        layers = [
            *layer_norm(f"{ours}.layernorm1", f"{hf}.layer_norm1"),
            *layer_norm(f"{ours}.layernorm2", f"{hf}.layer_norm2"),
            *linears(f"{ours}.attention", f"{hf}.self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"]),
            *linears(f"{ours}.mlp", f"{hf}.mlp", ["fc1", "fc2"]),
        ]
        return [
            *self.embedding_entries(),
            *stacked(layers, config.num_layers),
            *layer_norm("vision.post_layernorm", "post_layernorm"),
        ]

    def embedding_entries(self) -> list[Entry]:
        """The entries before the layers."""
        return [
            Entry("vision.patch_embedding.kernel", "embeddings.patch_embedding.weight", OIHW_TO_HWIO),
            Entry("vision.position_embedding", "embeddings.position_embedding.weight", TABLE),
        ]

    def read(self, json: Json, where: str) -> VisionConfig:
        """A `config.json` of transformers, as ours. Raises `UserError` naming what is unsupported; `where` is it."""
        json = self.defaults | json
        require(json, _FIXED | self.fixed, where)
        with in_words_of_hf(where):
            fields = get_all(json, _FIELDS, where) | self.read_fields(json, where)
            return self.config_class(kind=self.name, **fields)

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        """Fields of `config_class` that other towers do not have, or that their `config.json` calls otherwise."""
        return {}

    def write(self, config: VisionConfig) -> Json:
        """The `vision_config` of an export; the inverse of `read`."""
        return _FIXED | self.fixed | {"model_type": self.model_type} | in_hf(config, _FIELDS)


register = registers(TOWERS)
