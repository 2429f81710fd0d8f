"""CLIP vision transformer (Radford et al. 2021; Dosovitskiy et al. 2021), the visual encoder g of the paper.

Axes: N images, S = 1 + patches tokens, D embed, C channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.config import CLIP_L_14, CLIP_L_14_336, VisionConfig
from llava_jax.models.execution import SINGLE, Execution
from llava_jax.models.hf_fields import Json, get
from llava_jax.models.hf_names import Entry, layer_norm
from llava_jax.models.layers import WEIGHT_INIT, LayerNorm, Linear, add_bias, stack_layers
from llava_jax.models.pieces import Pieces
from llava_jax.models.towers import Tower, register


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's towers were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


_FUNCTIONS = {  # the names are `VisionConfig.ACTIVATIONS`
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class ClipVision(nnx.Module):
    """Pixels to the hidden states after some of the layers."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, p = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(WEIGHT_INIT(rngs.params(), (D,)))
        self.patch_embedding = PatchEmbedding(p, D, bias=False, rngs=rngs)
        self.position_embedding = nnx.Param(WEIGHT_INIT(rngs.params(), (1 + config.num_patches, D)))
        self.pre_layernorm = LayerNorm(D, config.layer_norm_eps)
        self.layers = stack_layers(lambda rngs: ClipLayer(config, rngs=rngs), config.num_layers, rngs)
        self.post_layernorm = LayerNorm(D, config.layer_norm_eps)  # of CLIP's head: stored for export only

    def __call__(
        self, pixels_NHWC: jax.Array, num_layers: int | tuple[int, ...], execution: Execution = SINGLE
    ) -> jax.Array:
        """float[N, image_size, image_size, 3], normalised -> [N, 1 + patches, D] as of `run_layers`."""
        patch_embedding = execution.gather("vision.patch_embedding", self.patch_embedding)
        position_embedding = execution.gather("vision.position_embedding", self.position_embedding)
        patches_NPD = patch_embedding(pixels_NHWC)
        token = self.class_embedding[...].astype(patches_NPD.dtype)
        token_N1D = jnp.broadcast_to(token[None, None], (len(patches_NPD), 1, len(token)))
        x_NSD = jnp.concatenate([token_N1D, patches_NPD], axis=1)
        x_NSD += position_embedding[...].astype(x_NSD.dtype)[None]
        return run_layers(self.layers, self.pre_layernorm(x_NSD), num_layers, execution)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its width, with `kernel` [patch, patch, 3, D] and optionally `bias` [D]."""

    def __init__(self, patch_size: int, features: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(WEIGHT_INIT(rngs.params(), (patch_size, patch_size, 3, features)))
        self.bias = nnx.Param(jnp.zeros(features)) if bias else None

    def __call__(self, pixels_NHWC: jax.Array) -> jax.Array:
        p, _, C, D = self.kernel.shape
        N, rows, columns = pixels_NHWC.shape[0], pixels_NHWC.shape[1] // p, pixels_NHWC.shape[2] // p
        # A matrix product over flattened patches: the same sum as a convolution, and faster on all hardware.
        patches = pixels_NHWC[:, : rows * p, : columns * p].reshape(N, rows, p, columns, p, C)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(N, rows * columns, p * p * C)
        return add_bias(patches @ self.kernel[...].astype(patches.dtype).reshape(p * p * C, D), self.bias)


def run_layers(
    layers: nnx.Module, x_NSD: jax.Array, num_layers: int | tuple[int, ...], execution: Execution
) -> jax.Array:
    """x after the first `num_layers` layers of a tower, which are stacked (maybe in `Pieces`) or a list.

    Of several numbers of layers, x after each of them, concatenated along the last axis.
    """

    def step(x_NSD: jax.Array, layer: ClipLayer) -> jax.Array:
        return execution.gather("vision.layers", layer)(x_NSD, execution)

    def keeping_step(carry: tuple, layer: ClipLayer) -> tuple:
        x_NSD, done, kept = step(carry[0], layer), carry[1] + 1, carry[2]
        return x_NSD, done, [jnp.where(done == n, x_NSD, y) for n, y in zip(num_layers, kept, strict=True)]

    if isinstance(num_layers, tuple):
        start = (x_NSD, jnp.int32(0), [x_NSD] * len(num_layers))
        return jnp.concatenate(_run(keeping_step, start, layers, max(num_layers), execution)[2], axis=-1)
    return _run(step, x_NSD, layers, num_layers, execution)


def _run(step: Callable, x: Any, layers: nnx.Module, count: int, execution: Execution) -> Any:
    """x = step(x, layer) for the first `count` layers."""
    if not isinstance(layers, nnx.List) or isinstance(layers, Pieces):
        with jax.named_scope("vision_layers"):
            return execution.scan_layers(step, x, layers, count)
    for layer in list(layers)[:count]:
        x = step(x, layer)
    return x


class ClipLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.layernorm1 = LayerNorm(D, config.layer_norm_eps)
        self.attention = ClipAttention(config, rngs=rngs)
        self.layernorm2 = LayerNorm(D, config.layer_norm_eps)
        self.mlp = ClipMlp(config, rngs=rngs)

    def __call__(self, x_NSD: jax.Array, execution: Execution = SINGLE) -> jax.Array:
        x_NSD += self.attention(self.layernorm1(x_NSD), execution)
        x_NSD += self.mlp(self.layernorm2(x_NSD))
        return x_NSD


class ClipAttention(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.num_heads = config.num_heads
        projections = (Linear(D, D, bias=True, rngs=rngs) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections

    def __call__(self, x_NSD: jax.Array, execution: Execution) -> jax.Array:
        N, S, D = x_NSD.shape
        q, k, v = (
            project(x_NSD).reshape(N, S, self.num_heads, D // self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(execution.attend(q, k, v).reshape(N, S, D))


class ClipMlp(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(_FUNCTIONS[self.activation](self.fc1(x)))


@register
class Clip(Tower):
    """CLIP, by itself or the tower of a whole CLIP."""

    name = "clip"
    module = ClipVision
    class_token = True
    model_type, whole_model_type = "clip_vision_model", "clip"
    defaults = Tower.defaults | {"projection_dim": 512}
    original = {"openai/clip-vit-large-patch14": CLIP_L_14, "openai/clip-vit-large-patch14-336": CLIP_L_14_336}

    def embedding_entries(self) -> list[Entry]:
        return super().embedding_entries() + [
            Entry("vision.class_embedding", "embeddings.class_embedding"),
            *layer_norm("vision.pre_layernorm", "pre_layrnorm"),  # (sic)
        ]

    def read_fields(self, json: Json, where: str) -> dict[str, object]:
        return {"projection_dim": get(json, "projection_dim", VisionConfig.projection_dim, where)}

    def write(self, config: VisionConfig) -> Json:
        return super().write(config) | {"projection_dim": config.projection_dim}
