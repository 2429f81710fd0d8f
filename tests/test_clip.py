"""The vision tower against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
import transformers
from flax import nnx

from llava_jax.models.clip import ClipVision, normalize
from llava_jax.models.config import CLIP_L_14, CLIP_L_14_336, CLIP_MEAN, CLIP_STD
from llava_jax.models.llava import build

CONFIG = reference.VISION


def random_pixels(config=CONFIG, num_images=3):
    return (
        np.random.default_rng(0).normal(size=(num_images, config.image_size, config.image_size, 3)).astype(np.float32)
    )


def tower(config, params):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0))))
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


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_every_hidden_state_equals_transformers(hidden_act):
    config = dataclasses.replace(CONFIG, hidden_act=hidden_act)
    torch_model = reference.clip(config)
    ours = tower(config, reference.part(reference.clip_params(torch_model, config), "vision."))
    expected = torch_hidden_states(torch_model, random_pixels(config))
    assert len(expected) == config.num_layers + 1
    for num_layers, states in enumerate(expected):
        assert states.std() > 0.5
        actual = features(ours, jnp.asarray(random_pixels(config)), num_layers)
        np.testing.assert_allclose(actual, states.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("select_feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("select_layer", [-1, -2, -4, 0, 1, 3])
def test_selected_features_equal_those_of_hugging_face(select_layer, select_feature):
    config = dataclasses.replace(reference.LLAVA, select_layer=select_layer, select_feature=select_feature)
    torch_model = reference.llava(config)
    images = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3), np.uint8)
    pixels = ((images / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
    states = torch_hidden_states(torch_model.model.vision_tower, pixels)[select_layer]
    expected = states.numpy() if select_feature == "cls_patch" else states.numpy()[:, 1:]

    model = build(config, reference.llava_params(torch_model, config))
    actual = nnx.jit(lambda model, images: model.visual_features(images))(model, jnp.asarray(images))
    assert actual.shape == (2, config.image_tokens, config.vision.hidden_size)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_layers_past_the_selected_one_are_never_computed():
    """Their parameters may hold NaN, and the loop over layers ends before them."""
    params = reference.part(reference.clip_params(reference.clip(CONFIG), CONFIG), "vision.")
    used = CONFIG.num_layers - 1
    expected = features(tower(CONFIG, params), jnp.asarray(random_pixels()), used)
    for name in params:
        if name.startswith("layers."):
            params[name][used:] = np.nan
    np.testing.assert_array_equal(features(tower(CONFIG, params), jnp.asarray(random_pixels()), used), expected)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: ClipVision(CONFIG, rngs=nnx.Rngs(0))))
    jaxpr = jax.make_jaxpr(lambda state, pixels: nnx.merge(graphdef, state)(pixels, used))(state, random_pixels())
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


@pytest.mark.parametrize("config, count", [(CLIP_L_14, 303_179_776), (CLIP_L_14_336, 303_507_456)])
def test_full_size_towers_have_the_published_parameters(config, count):
    state = nnx.state(nnx.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == count
    torch_config = reference.torch_vision_config(config)
    assert reference.num_parameters(lambda: transformers.CLIPVisionModel(torch_config)) == count
