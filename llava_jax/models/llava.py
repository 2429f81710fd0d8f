"""LLaVA (Liu et al. 2023, section 4.1): H_v = W g(X_v) stands in the decoder's sequence beside the words.

Outside the modules, parameters are one flat dict from dotted name to array (`llm.layers.mlp.up_proj.kernel`):
freezing, sharding, optimizer groups and conversion are tables of patterns over these names. `build` makes the
modules from such a dict, under `jax.jit` too.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.models.clip import ClipVision, normalize
from llava_jax.models.config import LlavaConfig
from llava_jax.models.execution import SINGLE, Execution
from llava_jax.models.layers import unstack_layers
from llava_jax.models.llama import Llama
from llava_jax.models.projector import Projector
from llava_jax.models.siglip import SiglipVision

Params = dict[str, jax.Array]

TOWERS = {"clip": ClipVision, "siglip": SiglipVision}


class Llava(nnx.Module):
    """Vision tower, projector, decoder. `dtype` is that of the computation; logits and norms are float32."""

    def __init__(self, config: LlavaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.vision = TOWERS[config.vision.kind](config.vision, rngs=rngs)
        self.projector = Projector(config.projector_type, config.vision.hidden_size, config.text.hidden_size, rngs=rngs)
        self.llm = Llama(config.text, rngs=rngs)

    def unstack_layers(self, transposed: bool = False) -> None:
        """Arranges the layers for answering: as lists, without those of the tower that no feature comes from.

        `transposed`: see `Llama.unstack_layers`.
        """
        unstack_layers(self.vision, self.config.vision_layers_used)
        self.llm.unstack_layers(transposed)

    def visual_features(self, images: jax.Array, execution: Execution = SINGLE) -> jax.Array:
        """Z_v = g(X_v): uint8[N, H, W, 3] -> [N, P, D_vision], the patches of the selected layer."""
        pixels = normalize(images, self.config.image_mean, self.config.image_std).astype(self.dtype)
        hidden_NSD = self.vision(pixels, self.config.vision_layers_used, execution)
        drops_class_token = self.config.vision.class_token and self.config.select_feature == "patch"
        return hidden_NSD[:, 1:] if drops_class_token else hidden_NSD

    def encode_images(self, images: jax.Array, execution: Execution = SINGLE) -> jax.Array:
        """H_v = W Z_v: uint8[..., H, W, 3] -> [..., P, D]."""
        leading = images.shape[:-3]
        with jax.named_scope("vision"):
            features_NPD = self.visual_features(images.reshape(-1, *images.shape[-3:]), execution)
        with jax.named_scope("projector"):
            projected_NPD = execution.whole("projector", self.projector)(features_NPD)
        return projected_NPD.reshape(*leading, *projected_NPD.shape[1:])

    def embed(
        self,
        tokens_BT: jax.Array,
        images_GIHWC: jax.Array | None = None,
        image_feature_index_BT: jax.Array | None = None,
        execution: Execution = SINGLE,
    ) -> jax.Array:
        """The decoder's input [B, T, D]: word embeddings, and where the index is not -1 visual features.

        Rows come in G groups of B / G; the index (slot * P + patch) is local to the group's I image slots.
        """
        x_BTD = execution.lookup("llm.embed_tokens.embedding", self.llm.embed_tokens, tokens_BT).astype(self.dtype)
        if images_GIHWC is None or images_GIHWC.shape[1] == 0:  # no pictures at all: no time for them either
            return x_BTD
        features_GIPD = self.encode_images(images_GIHWC, execution)
        return place_features(x_BTD, features_GIPD, image_feature_index_BT)

    def __call__(self, batch: dict[str, jax.Array], execution: Execution = SINGLE) -> jax.Array:
        """A batch of the training layout -> hidden states [B, T, D]."""
        x_BTD = self.embed(batch["tokens"], batch["images"], batch["image_feature_index"], execution)
        return self.llm(x_BTD, batch["positions"], batch["segment_ids"], execution)


def place_features(x_BTD: jax.Array, features_GIPD: jax.Array, index_BT: jax.Array) -> jax.Array:
    """Takes feature `index` of the row's group where it is not -1, and x elsewhere."""
    B, T, D = x_BTD.shape
    G = features_GIPD.shape[0]
    # float32, since the gradient of a gather is a scatter-add that would round at every term.
    features_GND = features_GIPD.reshape(G, -1, D).astype(jnp.float32)
    index_GR = jnp.maximum(index_BT, 0).reshape(G, -1)  # negative indices would wrap
    placed_GRD = jax.vmap(lambda features_ND, index_R: features_ND[index_R])(features_GND, index_GR)
    placed_BTD = placed_GRD.reshape(B, T, D).astype(x_BTD.dtype)
    return jnp.where((index_BT >= 0)[..., None], placed_BTD, x_BTD)


@functools.cache
def _abstract(config: LlavaConfig, dtype: str) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    module = nnx.eval_shape(lambda: Llava(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, {_dotted(path): value.get_value() for path, value in nnx.to_flat_state(state)}


def _dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def abstract_params(config: LlavaConfig, dtype: jnp.dtype = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and (all the same) type of a model's parameters, without making any."""
    shapes = _abstract(config, "float32")[1]
    return {name: jax.ShapeDtypeStruct(value.shape, dtype) for name, value in shapes.items()}


def init_params(config: LlavaConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    return jax.jit(lambda key: module_params(Llava(config, rngs=nnx.Rngs(params=key))))(key)


def module_params(module: nnx.Module) -> Params:
    """A module's parameters as a flat dict."""
    return {_dotted(path): value.get_value() for path, value in nnx.to_flat_state(nnx.state(module))}


def build(config: LlavaConfig, params: Params, dtype: jnp.dtype = jnp.float32) -> Llava:
    """The model with these parameters, computing in `dtype`.

    Raises ValueError with all missing, unexpected and misshapen names.
    """
    check_names(params, _abstract(config, jnp.dtype(dtype).name)[1])
    return build_from_pieces(config, params, dtype)


def build_from_pieces(config: LlavaConfig, params: Params, dtype: jnp.dtype = jnp.float32) -> Llava:
    """The same from the pieces of parameters that a device has, whatever their shapes."""
    graphdef, shapes = _abstract(config, jnp.dtype(dtype).name)
    state = nnx.from_flat_state([(tuple(name.split(".")), nnx.Param(params[name])) for name in shapes])
    return nnx.merge(graphdef, state)


def check_names(params: dict, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises ValueError unless `params` has exactly these names and shapes."""
    problems = [f"missing {name}" for name in shapes if name not in params]
    problems += [f"unexpected {name}" for name in params if name not in shapes]
    problems += [
        f"{name} is {tuple(params[name].shape)}, not {shapes[name].shape}"
        for name in shapes
        if name in params and tuple(params[name].shape) != shapes[name].shape
    ]
    if problems:
        raise ValueError("; ".join(problems))
