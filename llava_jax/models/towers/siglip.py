"""SigLIP vision transformer (Zhai et al. 2023): CLIP's layers, without a class token.

Axes: N images, P patches, D embed.
"""

import jax
from flax import nnx

from llava_jax.models.config import VisionConfig
from llava_jax.models.execution import SINGLE, Execution
from llava_jax.models.hf_fields import Json
from llava_jax.models.hf_names import Entry
from llava_jax.models.layers import WEIGHT_INIT, LayerNorm, stack_layers
from llava_jax.models.towers import Tower, register
from llava_jax.models.towers.clip import ClipLayer, PatchEmbedding, run_layers

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)  # pixels in -1..1


class SiglipVision(nnx.Module):
    """Pixels to the hidden states after some of the layers. It has no pooling head, which LLaVA does not use."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        D = config.hidden_size
        self.patch_embedding = PatchEmbedding(config.patch_size, D, bias=True, rngs=rngs)
        self.position_embedding = nnx.Param(WEIGHT_INIT(rngs.params(), (config.num_patches, D)))
        self.layers = stack_layers(lambda rngs: ClipLayer(config, rngs=rngs), config.num_layers, rngs)
        self.post_layernorm = LayerNorm(D, config.layer_norm_eps)  # stored for export only, as CLIP's

    def __call__(
        self, pixels_NHWC: jax.Array, num_layers: int | tuple[int, ...], execution: Execution = SINGLE
    ) -> jax.Array:
        """float[N, image_size, image_size, 3], normalised -> [N, patches, D] as of `run_layers`."""
        patch_embedding = execution.gather("vision.patch_embedding", self.patch_embedding)
        position_embedding = execution.gather("vision.position_embedding", self.position_embedding)
        x_NPD = patch_embedding(pixels_NHWC)
        x_NPD += position_embedding[...].astype(x_NPD.dtype)[None]
        return run_layers(self.layers, x_NPD, num_layers, execution)


@register
class Siglip(Tower):
    """SigLIP, by itself or the tower of a whole SigLIP."""

    name = "siglip"
    module = SiglipVision
    model_type, whole_model_type = "siglip_vision_model", "siglip"
    defaults = {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
    image_mean, image_std = SIGLIP_MEAN, SIGLIP_STD
    image_aspect = "resize"
    ignored = (r"(?:.+\.)?head\..+",)

    def embedding_entries(self) -> list[Entry]:
        return super().embedding_entries() + [Entry("vision.patch_embedding.bias", "embeddings.patch_embedding.bias")]

    def write(self, config: VisionConfig) -> Json:
        return super().write(config) | {"vision_use_head": False}
