"""The whole model against transformers' LLaVA, and what its gradients may touch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import llava_next
import numpy as np
import pytest
import tiny
import torch_reference as reference
from forward import logits, make_batch, random_images, torch_logits

from llava_jax.models.config import PRESETS, LlavaConfig
from llava_jax.models.llava import abstract_params, build, place_features

CONFIG = reference.LLAVA
P = CONFIG.image_tokens
VARIANTS = {
    "plain": CONFIG,
    "tied": dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tie_word_embeddings=True)),
    "cls": dataclasses.replace(CONFIG, select_feature="cls_patch", select_layer=3),
    "layers": dataclasses.replace(CONFIG, select_layer=(-2, 0, 4, -3)),
    "layers with cls": dataclasses.replace(CONFIG, select_feature="cls_patch", select_layer=(2, 1)),
}


CASES = {
    "text only": [[11], [11]],
    "one image": [[5, "image", 7]],
    "two images in a row": [[2, "image", 3, "image", 4]],
    "ragged": [[3, "image", 9], ["image", 2], [6], [1, "image", 2, "image", 1]],
    "500 tokens": [[200, "image", 300 - P]],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, case):
    config = VARIANTS[variant]
    torch_model = reference.llava(config)
    batch = make_batch(CASES[case], random_images(len(CASES[case]), 2), config=config)
    expected = torch_logits(torch_model, batch, config)
    actual = logits(config, reference.llava_params(torch_model, config), batch)
    real = batch["segment_ids"] > 0
    assert expected[real].std() > 0.5
    np.testing.assert_allclose(np.asarray(actual)[real], expected[real], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return reference.llava_params(reference.llava(CONFIG), CONFIG)


def test_rows_of_a_group_share_its_images(params):
    """One group of two rows and two slots equals two groups of one row."""
    images = random_images(2, 1)
    apart = make_batch([[5, "image", 3], [2, "image", 6]], images)
    shared = apart | {"images": images.reshape(1, 2, *images.shape[2:])}
    second_row = np.array([[False], [True]])
    shared["image_feature_index"] = np.where(
        second_row & (apart["image_feature_index"] >= 0), apart["image_feature_index"] + P, apart["image_feature_index"]
    )
    np.testing.assert_allclose(logits(CONFIG, params, shared), logits(CONFIG, params, apart), rtol=0, atol=1e-5)


def test_unused_images_do_not_matter(params):
    batch = make_batch([[5, "image", 3], [5 + P + 3]], random_images(2, 2))
    other = batch | {"images": batch["images"].copy()}
    other["images"][0, 1] = random_images(1, seed=5)
    other["images"][1] = random_images(2, seed=6)
    np.testing.assert_array_equal(logits(CONFIG, params, batch), logits(CONFIG, params, other))


def test_padding_changes_nothing(params):
    rows, images = [[5, "image", 3], [4, "image", 4]], random_images(2, 1)
    short, long = make_batch(rows, images), make_batch(rows, images, pad_to=8 + P + 5)
    np.testing.assert_allclose(
        logits(CONFIG, params, long)[:, : 8 + P], logits(CONFIG, params, short), rtol=0, atol=1e-5
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, params, batch):
    def loss(params):
        model = build(config, params)
        return jnp.sum(jnp.square(model(batch)) * (batch["segment_ids"] > 0)[..., None])

    return jax.grad(loss)(params)


def test_text_only_rows_give_the_projector_exactly_zero(params):
    text = make_batch([[9], [9]], random_images(2, 1) * 0)
    mixed = make_batch([[9], ["image"]], random_images(2, 1))
    zero, some = gradients(CONFIG, params, text), gradients(CONFIG, params, mixed)
    for name in params:
        if name.startswith("projector."):
            np.testing.assert_array_equal(zero[name], np.zeros_like(zero[name]), err_msg=name)
            assert np.abs(some[name]).max() > 1e-3, name
    assert np.abs(zero["llm.layers.mlp.up_proj.kernel"]).max() > 1e-3


def test_gradients_reach_the_layers_of_the_tower_that_run(params):
    """Whether they are taken is up to the step: it differentiates what the run trains."""
    batch, used = make_batch([[3, "image", 3]], random_images(1, 1)), CONFIG.vision_layers_used
    assert used < CONFIG.vision.num_layers
    for name, gradient in gradients(CONFIG, params, batch).items():
        if name.startswith("vision.layers.") and name.endswith("kernel"):
            assert np.abs(gradient[:used]).max() > 1e-6, name
        if name.startswith("vision.layers."):
            np.testing.assert_array_equal(gradient[used:], np.zeros_like(gradient[used:]), err_msg=name)
        if name.startswith("vision.post_layernorm."):
            np.testing.assert_array_equal(gradient, np.zeros_like(gradient), err_msg=name)


def test_layers_past_the_selected_one_never_count(params):
    """NaN in what is stored for export only reaches neither values nor gradients."""
    batch = make_batch([[3, "image", 3]], random_images(1, 1))
    poisoned = {name: value.copy() for name, value in params.items()}
    for name, value in poisoned.items():
        if name.startswith("vision.layers."):
            value[CONFIG.vision_layers_used :] = np.nan
        if name.startswith("vision.post_layernorm."):
            value[:] = np.nan
    np.testing.assert_array_equal(logits(CONFIG, poisoned, batch), logits(CONFIG, params, batch))
    clean, dirty = gradients(CONFIG, params, batch), gradients(CONFIG, poisoned, batch)
    for name in params:
        if not name.startswith("vision."):
            np.testing.assert_array_equal(dirty[name], clean[name], err_msg=name)


def test_features_are_placed_where_the_index_says():
    features = jnp.arange(2 * 2 * 3 * 1, dtype=jnp.float32).reshape(2, 2, 3, 1)  # 2 groups, 2 slots, 3 patches
    index = jnp.array([[-1, 0, 5], [3, -1, 2], [0, 1, 2], [-1, -1, 5]])  # two rows a group
    placed = place_features(jnp.full((4, 3, 1), -7.0), features, index)
    assert placed[..., 0].tolist() == [[-7, 0, 5], [3, -7, 2], [6, 7, 8], [-7, -7, 11]]


def test_gradients_of_placed_features_add_up_in_float32():
    """One patch used 1,000 times: bfloat16 would stop adding ones at 256."""
    T = 1000
    features = jnp.ones((1, 1, 2, 1), jnp.bfloat16)

    def loss(features):
        return place_features(jnp.zeros((1, T, 1), jnp.bfloat16), features, jnp.zeros((1, T), jnp.int32)).sum()

    gradient = jax.jit(jax.grad(loss))(features)
    assert gradient.dtype == jnp.bfloat16
    assert gradient.ravel().tolist() == [1000, 0]


def test_gradients_of_embeddings_add_up_in_float32(params):
    """The same for a word that fills a row, computed in bfloat16 with float32 weights."""
    tokens = jnp.full((1, 1000), 3)

    def loss(params):
        return build(CONFIG, params, jnp.bfloat16).embed(tokens).sum()

    gradient = jax.jit(jax.grad(loss))(params)["llm.embed_tokens.embedding"]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[3], np.full(CONFIG.text.hidden_size, 1000))


def test_bfloat16_is_close_to_float32(params):
    batch = make_batch([[5, "image", 7]], random_images(1, 1))
    model = build(CONFIG, params, jnp.bfloat16)
    hidden = jax.jit(lambda batch: model(batch))(batch)
    assert hidden.dtype == jnp.bfloat16
    exact = np.asarray(logits(CONFIG, params, batch))
    error = np.asarray(model.llm.logits(hidden)) - exact
    assert 0 < error.std() < 0.1 * exact.std()


def test_build_lists_every_problem(params):
    wrong = dict(params)
    del wrong["llm.norm.scale"], wrong["projector.linear_1.bias"]
    wrong["projector.linear_3.kernel"] = np.zeros((2, 2))
    wrong["vision.class_embedding"] = np.zeros(5)
    with pytest.raises(ValueError) as error:
        build(CONFIG, wrong)
    message = str(error.value)
    for problem in (
        "missing llm.norm.scale",
        "missing projector.linear_1.bias",
        "unexpected projector.linear_3.kernel",
        "vision.class_embedding is (5,), not (32,)",
    ):
        assert problem in message
    assert message.count(";") == 3


def test_fresh_parameters_have_the_shapes_that_are_announced():
    fresh, abstract = tiny.params(CONFIG), abstract_params(CONFIG)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert abstract_params(CONFIG, jnp.bfloat16)["llm.norm.scale"].dtype == jnp.bfloat16


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_models_have_the_parameters_of_hugging_face(preset):
    config = PRESETS[preset]
    count = sum(int(np.prod(x.shape)) for x in abstract_params(config).values())
    if config.anyres:
        torch_count = reference.num_parameters(lambda: llava_next.untrained(config))
    else:
        torch_count = reference.num_parameters(
            lambda: reference.LlavaForConditionalGeneration(reference.torch_llava_config(config))
        )
    if config.projector_type == "linear":  # Hugging Face always has a second layer
        torch_count -= config.text.hidden_size**2 + config.text.hidden_size
    assert count == torch_count


def test_config_survives_json():
    for config in PRESETS.values():
        assert LlavaConfig.from_dict(config.to_dict()) == config
