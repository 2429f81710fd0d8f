"""LLaVA (Liu et al. 2023, section 4.1): the decoder's sequence has visual features H_v = W g(X_v) between the words.

Outside the modules, parameters are one flat dict from dotted name to array (`llm.layers.mlp.up_proj.kernel`): freezing,
sharding, optimizer groups and conversion are tables of patterns of these names. `build` makes modules from such a dict,
also inside `jax.jit`.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llava_jax.data.features import NEWLINE
from llava_jax.models import lora, pieces
from llava_jax.models.config import LlavaConfig
from llava_jax.models.execution import SINGLE, Execution
from llava_jax.models.layers import broadcast_last, unstack_layers
from llava_jax.models.llama import Llama
from llava_jax.models.projectors import projector_kind
from llava_jax.models.quantized import kept_dtype, quantize_linears
from llava_jax.models.registry import TOWERS

Params = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]  # of parameters by name, with types and maybe shardings
NEWLINE_PARAMETER = "image_newline"  # of models with AnyRes


class Llava(nnx.Module):
    """Vision tower, projector and decoder, computing in `dtype`; logits and norms are float32."""

    def __init__(self, config: LlavaConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.vision = TOWERS[config.vision.kind].module(config.vision, rngs=rngs)
        self.projector = build_projector(config, rngs)
        self.llm = Llama(config.text, rngs=rngs)
        if config.anyres and config.anyres.newline:
            width = config.text.hidden_size  # drawn as LLaVA-NeXT does
            self.image_newline = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        if config.base_dtype:
            quantize_linears(self.llm.layers, config.base_dtype)
        if config.lora:
            lora.attach(self, config.lora, rngs)

    def unstack_layers(self, transposed: bool = False) -> None:
        """Arranges the layers for inference: as lists, without unused layers of the tower.

        `transposed`: see `Llama.unstack_layers`.
        """
        unstack_layers(self.vision, self.config.vision_layers_used)
        self.llm.unstack_layers(transposed)

    def visual_features(self, images: jax.Array, execution: Execution = SINGLE) -> jax.Array:
        """Z_v = g(X_v): uint8[N, H, W, 3] -> [N, P, D_vision], the patches of the selected layer.

        Those of several layers are concatenated along the last axis.
        """
        config = self.config
        pixels = normalize(images, config.image_mean, config.image_std).astype(self.dtype)
        several = isinstance(config.select_layer, tuple)
        layers = config.selected_layers if several else config.vision_layers_used
        hidden_NSD = self.vision(pixels, layers, execution)
        return hidden_NSD[:, 1:] if config.drops_first else hidden_NSD

    def encode_images(self, images: jax.Array, execution: Execution = SINGLE) -> jax.Array:
        """H_v = W Z_v: uint8[..., H, W, 3] -> [..., P, D]."""
        leading = images.shape[:-3]
        with jax.named_scope("vision"):
            features_NPD = self.visual_features(images.reshape(-1, *images.shape[-3:]), execution)
        with jax.named_scope("projector"):
            projected_NPD = execution.gather("projector", self.projector)(features_NPD)
        return projected_NPD.reshape(*leading, *projected_NPD.shape[1:])

    def embed(
        self,
        tokens_BT: jax.Array,
        images_GIHWC: jax.Array | None = None,
        image_feature_index_BT: jax.Array | None = None,
        execution: Execution = SINGLE,
    ) -> jax.Array:
        """The decoder's input [B, T, D]: word embeddings where the index is TEXT, visual features elsewhere.

        The B rows form G groups; the index (slot * P + patch) refers to the I image slots of the row's group, and is
        NEWLINE for the learned newline of AnyRes.
        """
        x_BTD = execution.lookup("llm.embed_tokens.embedding", self.llm.embed_tokens, tokens_BT).astype(self.dtype)
        if images_GIHWC is None or images_GIHWC.shape[1] == 0:  # a batch without images: the tower does not run
            return x_BTD
        features_GIPD = self.encode_images(images_GIHWC, execution)
        x_BTD = place_features(x_BTD, features_GIPD, image_feature_index_BT)
        return self.place_newlines(x_BTD, image_feature_index_BT)

    def place_newlines(self, x_BTD: jax.Array, index_BT: jax.Array) -> jax.Array:
        """The learned newline where the index is `NEWLINE`, x elsewhere. Leading axes may be others."""
        if not (self.config.anyres and self.config.anyres.newline):
            return x_BTD
        newline_BTD = jnp.broadcast_to(self.image_newline[...], x_BTD.shape)  # float32, as is the sum of its gradients
        return jnp.where((index_BT == NEWLINE)[..., None], newline_BTD.astype(x_BTD.dtype), x_BTD)

    def __call__(self, batch: dict[str, jax.Array], execution: Execution = SINGLE) -> jax.Array:
        """A batch of the training layout -> hidden states [B, T, D]."""
        x_BTD = self.embed(batch["tokens"], batch["images"], batch["image_feature_index"], execution)
        return self.llm(x_BTD, batch["positions"], batch["segment_ids"], execution)


def build_projector(config: LlavaConfig, rngs: nnx.Rngs) -> nnx.Module:
    """W, with fresh float32 parameters."""
    kind = projector_kind(config.projector_type)
    return kind.build(config.projector_type, config.feature_size, config.text.hidden_size, rngs)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8[..., H, W, 3] -> float32, (x / 255 - mean) / std, on the device: images travel as bytes."""
    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32)
    shift = jnp.asarray([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
    x = images.astype(jnp.float32)
    return x * broadcast_last(scale, x) + broadcast_last(shift, x)


def place_features(x_BTD: jax.Array, features_GIPD: jax.Array, index_BT: jax.Array) -> jax.Array:
    """The features of the row's group at `index` where it is not -1, x elsewhere."""
    B, T, D = x_BTD.shape
    G = features_GIPD.shape[0]
    # float32, since the gradient of a gather is a scatter-add, which rounds each term.
    features_GND = features_GIPD.reshape(G, -1, D).astype(jnp.float32)
    index_GR = jnp.maximum(index_BT, 0).reshape(G, -1)  # negative indices would count from the end
    placed_GRD = jax.vmap(lambda features_ND, index_R: features_ND[index_R])(features_GND, index_GR)
    placed_BTD = placed_GRD.reshape(B, T, D).astype(x_BTD.dtype)
    return jnp.where((index_BT >= 0)[..., None], placed_BTD, x_BTD)


@functools.cache
def _abstract(config: LlavaConfig, dtype: str) -> tuple[nnx.GraphDef, Shapes]:
    module = nnx.eval_shape(lambda: Llava(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, _flat(state)


def _flat(state: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)}


def abstract_params(config: LlavaConfig, dtype: jnp.dtype = jnp.float32) -> Shapes:
    """Names and shapes of a model's parameters, without allocating them: of type `dtype`, unless they are quantized."""
    shapes = _abstract(config, "float32")[1]
    return {name: jax.ShapeDtypeStruct(v.shape, kept_dtype(name, v.dtype, dtype)) for name, v in shapes.items()}


def module_params(module: nnx.Module) -> Params:
    """A module's parameters as a flat dict."""
    return _flat(nnx.state(module))


def build(config: LlavaConfig, params: Params, dtype: jnp.dtype = jnp.float32) -> Llava:
    """The model with these parameters, computing in `dtype`.

    Args:
      params: by name; stacks may be split, see `models.pieces`.

    Raises ValueError that lists all missing, unexpected and misshapen parameters.
    """
    params = pieces.joined(params)
    check_names(params, _abstract(config, jnp.dtype(dtype).name)[1])
    return build_from_shards(config, params, dtype)


def build_from_shards(config: LlavaConfig, params: Params, dtype: jnp.dtype = jnp.float32) -> Llava:
    """The same from the shards of parameters that a device has, without a check of their shapes.

    Of a stack that is split, `layers` is a `Pieces`.
    """
    graphdef, shapes = _abstract(config, jnp.dtype(dtype).name)

    def merge(params: Params) -> Llava:
        state = nnx.from_flat_state([(tuple(name.split(".")), nnx.Param(params[name])) for name in shapes])
        return nnx.merge(graphdef, state)

    split = pieces.by_stack(params)
    whole = functools.reduce(operator.or_, (parts[0] for parts in split.values()), params)
    model = merge(whole)
    for stack, parts in split.items():
        owner, layers = stack.split(".")
        of_parts = [getattr(getattr(merge(whole | part), owner), layers) for part in parts]
        setattr(getattr(model, owner), layers, pieces.Pieces(of_parts))
    return model


def used_params(config: LlavaConfig, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What of the parameters of these shapes the model's output depends on, and what may therefore be trained.

    Layers of the tower after the one whose features are used, and its last norm, are stored for exports only. An
    adapter's are trained with the rest of it, since nothing else stores them.
    """
    unused, layers = TOWERS[config.vision.kind].unused, config.vision_layers_used
    parts = pieces.split(shapes, {"vision.layers": [layers]})

    def is_used(name: str) -> bool:
        if pieces.stack_of(name) == "vision.layers" and ".lora." not in name:
            return pieces.rows(name, parts[name])[0] < layers
        return not name.startswith(unused)

    return {name: leaf for name, leaf in parts.items() if is_used(name)}


def check_names(params: dict, shapes: Shapes) -> None:
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
