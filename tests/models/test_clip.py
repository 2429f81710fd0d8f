"""The vision towers, CLIP's and SigLIP's, against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
import transformers
from flax import nnx

from llava_jax.models.config import CLIP_L_14, CLIP_L_14_336, CLIP_MEAN, CLIP_STD, VisionConfig
from llava_jax.models.llava import build, normalize
from llava_jax.models.registry import TOWERS
from llava_jax.models.towers.siglip import SIGLIP_MEAN, SIGLIP_STD

CONFIG, SIGLIP = reference.VISION, reference.SIGLIP

# Published towers and how many parameters they have, SigLIP's without their pooling head.
GELU_TANH = {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "kind": "siglip"}
PUBLISHED = {
    "clip-vit-base-patch32": (VisionConfig(768, 3072, 12, 12, 224, 32, projection_dim=512), 87_456_000),
    "clip-vit-base-patch16": (VisionConfig(768, 3072, 12, 12, 224, 16, projection_dim=512), 85_799_424),
    "clip-vit-large-patch14": (CLIP_L_14, 303_179_776),
    "clip-vit-large-patch14-336": (CLIP_L_14_336, 303_507_456),
    "siglip-base-patch16-224": (VisionConfig(768, 3072, 12, 12, 224, 16, **GELU_TANH), 85_797_120),
    "siglip2-base-patch16-256": (VisionConfig(768, 3072, 12, 12, 256, 16, **GELU_TANH), 85_843_200),
    "siglip-so400m-patch14-384": (VisionConfig(1152, 4304, 27, 16, 384, 14, **GELU_TANH), 412_987_248),
}


def random_pixels(config=CONFIG, num_images=3):
    return (
        np.random.default_rng(0).normal(size=(num_images, config.image_size, config.image_size, 3)).astype(np.float32)
    )


def tower(config, params):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: TOWERS[config.kind].module(config, rngs=nnx.Rngs(0))))
    paths = [tuple(name.split(".")) for name in params]
    assert set(paths) == {path for path, _ in nnx.to_flat_state(state)}
    return nnx.merge(
        graphdef,
        nnx.from_flat_state([(p, nnx.Param(jnp.asarray(v))) for p, v in zip(paths, params.values(), strict=True)]),
    )


features = nnx.jit(lambda model, pixels, num_layers: model(pixels, num_layers), static_argnames="num_layers")


def torch_hidden_states(model, pixels_NHWC):
    with torch.no_grad():
        return model(torch.from_numpy(pixels_NHWC.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states


@pytest.mark.parametrize(
    "config", [CONFIG, dataclasses.replace(CONFIG, hidden_act="gelu"), SIGLIP], ids=["quick_gelu", "gelu", "siglip"]
)
def test_every_hidden_state_equals_transformers(config):
    torch_model = reference.clip(config)
    ours = tower(config, reference.part(reference.clip_params(torch_model, config), "vision."))
    expected = torch_hidden_states(torch_model, random_pixels(config))
    assert len(expected) == config.num_layers + 1
    for num_layers, states in enumerate(expected):
        assert states.std() > 0.5
        actual = features(ours, jnp.asarray(random_pixels(config)), num_layers)
        np.testing.assert_allclose(actual, states.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_equal_transformers(name):
    """Two layers of each: the widths, heads and pictures are the true ones."""
    config = dataclasses.replace(PUBLISHED[name][0], num_layers=2)
    torch_model, pixels = reference.clip(config), random_pixels(config, num_images=1)
    ours = tower(config, reference.part(reference.clip_params(torch_model, config), "vision."))
    expected = torch_hidden_states(torch_model, pixels)[-1].numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(features(ours, jnp.asarray(pixels), 2), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("select_feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("select_layer", [-1, -2, -4, 0, 1, 3, (3,), (-1, 0, -4, 2)], ids=str)
def test_selected_features_equal_those_of_hugging_face(select_layer, select_feature):
    config = dataclasses.replace(reference.LLAVA, select_layer=select_layer, select_feature=select_feature)
    torch_model = reference.llava(config)
    images = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), np.uint8)
    pixels = ((images / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
    states = torch_hidden_states(torch_model.model.vision_tower, pixels)
    layers = select_layer if isinstance(select_layer, tuple) else (select_layer,)
    expected = np.concatenate([states[layer].numpy() for layer in layers], axis=-1)
    expected = expected if select_feature == "cls_patch" else expected[:, 1:]

    model = build(config, reference.llava_params(torch_model, config))
    for listed in (False, True):
        if listed:
            model.unstack_layers()
        actual = nnx.jit(lambda model, images: model.visual_features(images))(model, jnp.asarray(images))
        assert actual.shape == (2, config.image_tokens, config.feature_size)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_siglips_features_equal_those_of_hugging_face():
    config = dataclasses.replace(
        reference.LLAVA, vision=SIGLIP, select_layer=-1, image_mean=SIGLIP_MEAN, image_std=SIGLIP_STD
    )
    torch_model = reference.llava(config)
    images = np.random.default_rng(1).integers(0, 256, (2, 30, 30, 3), np.uint8)
    pixels = (images / 127.5 - 1).astype(np.float32)
    expected = torch_hidden_states(torch_model.model.vision_tower, pixels)[-1].numpy()
    model = build(config, reference.llava_params(torch_model, config))
    actual = nnx.jit(lambda model, images: model.visual_features(images))(model, jnp.asarray(images))
    assert actual.shape == (2, config.image_tokens, SIGLIP.hidden_size) == (2, 9, 32)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cls_patch.*no class token"):
        dataclasses.replace(config, select_feature="cls_patch")
    with pytest.raises(ValueError, match="after_first.*class token"):
        dataclasses.replace(reference.LLAVA, select_feature="after_first")


@pytest.mark.parametrize("config", [CONFIG, SIGLIP], ids=["clip", "siglip"])
def test_layers_past_the_selected_one_are_never_computed(config):
    """Their parameters may hold NaN, and the loop over layers ends before them."""
    params = reference.part(reference.clip_params(reference.clip(config), config), "vision.")
    used = config.num_layers - 1
    pixels = jnp.asarray(random_pixels(config))
    expected = features(tower(config, params), pixels, used)
    for name in params:
        if name.startswith("layers."):
            params[name][used:] = np.nan
    np.testing.assert_array_equal(features(tower(config, params), pixels, used), expected)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: TOWERS[config.kind].module(config, rngs=nnx.Rngs(0))))
    jaxpr = jax.make_jaxpr(lambda state, pixels: nnx.merge(graphdef, state)(pixels, used))(state, pixels)
    assert [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] == [used]


def test_bytes_are_normalised_as_clips_image_processor_does():
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    expected = processor(list(images), return_tensors="np", input_data_format="channels_last").pixel_values
    actual = normalize(jnp.asarray(images), CLIP_MEAN, CLIP_STD)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_black_and_white_are_the_ends_of_the_scale():
    ends = normalize(jnp.array([[[[0, 0, 0], [255, 255, 255]]]], jnp.uint8), (0.5, 0.25, 0.0), (0.5, 0.25, 0.1))
    np.testing.assert_allclose(ends[0, 0], [[-1, -1, 0], [1, 3, 10]], atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_towers_have_the_published_parameters(name):
    config, count = PUBLISHED[name]
    state = nnx.state(nnx.eval_shape(lambda: TOWERS[config.kind].module(config, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == count
    torch_config = reference.torch_vision_config(config)
    assert reference.num_parameters(lambda: transformers.AutoModel.from_config(torch_config)) == count
