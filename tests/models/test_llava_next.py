"""AnyRes models against `LlavaNextForConditionalGeneration` with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch_reference as reference
from llava_next import processor_of, torch_model
from PIL import Image

from llava_jax.data.anyres import AnyRes
from llava_jax.data.features import NEWLINE, TEXT, Size, joined
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import build

MODELS = {
    "clip": LlavaConfig(reference.VISION, reference.TEXT, image_aspect="anyres", anyres=AnyRes()),
    "siglip": LlavaConfig(
        reference.SIGLIP, reference.TEXTS["qwen2"], select_layer=-1, image_aspect="anyres", anyres=AnyRes()
    ),
}
CASES = {
    "base": [(20, 20)],
    "tall": [(20, 90)],
    "wide": [(300, 100)],
    "tiny": [(2, 3)],
    "huge": [(1500, 1100)],
    "several": [(40, 40), (100, 20), (17, 55)],
    "text only": [],
}
WORDS = 500


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    config = MODELS[request.param]
    theirs = torch_model(config)
    params = reference.llava_params(theirs, config)
    params["image_newline"] = theirs.model.image_newline.detach().numpy()
    return config, theirs, build(config, {name: jnp.asarray(value) for name, value in params.items()})


def prompt(config, sizes, rng):
    """Words with an image after every few, and its tiles."""
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]
    features = [config.tiling.features(Size(*image.size), len(images) > 1) for image in images]
    index = joined(features, config.image_tokens)
    parts, start = [], 0
    words = np.array_split(np.full(WORDS, TEXT), len(images) + 1)
    for i, image_words in enumerate(words):
        parts.append(image_words)
        if i < len(features):
            stop = start + len(features[i].index)
            parts.append(index[start:stop])
            start = stop
    index = np.concatenate(parts).astype(np.int32)
    tokens = np.where(index == TEXT, rng.integers(0, config.text.vocab_size - 1, index.shape), 0)
    tiles = [config.tiling.tiles(image, len(images) > 1) for image in images]
    return images, index, tokens, np.concatenate([np.zeros((0, *[config.vision.image_size] * 2, 3), np.uint8), *tiles])


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(both, case):
    config, theirs, ours = both
    images, index, tokens, tiles = prompt(config, CASES[case], np.random.default_rng(0))
    batch = {
        "tokens": tokens[None],
        "positions": np.arange(len(tokens))[None],
        "segment_ids": np.ones((1, len(tokens)), np.int32),
        "images": tiles[None],
        "image_feature_index": index[None],
    }
    logits = ours.llm.logits(ours({name: jnp.asarray(value) for name, value in batch.items()}))[0]
    inputs = processor_of(config)(images, return_tensors="pt") if images else {}
    ids = torch.tensor(np.where(index == TEXT, tokens, theirs.config.image_token_id))[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids, **inputs).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_gradients_of_the_newline_add_up_in_float32():
    config = MODELS["clip"]
    params = tiny.params(config)
    index = jnp.full((1, 4096), NEWLINE)
    x = jnp.zeros((1, 4096, config.text.hidden_size), jnp.bfloat16)

    def total(newline):
        model = build(config, params | {"image_newline": newline}, dtype=jnp.bfloat16)
        return model.place_newlines(x, index).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(total)(params["image_newline"]), 4096)


def test_config_survives_json():
    config = MODELS["clip"]
    assert LlavaConfig.from_dict(config.to_dict()) == config
    assert "anyres" not in reference.LLAVA.to_dict()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"anyres": None}, "image_aspect is 'anyres', but anyres is None"),
        ({"image_aspect": "pad"}, "image_aspect is 'pad', but anyres is AnyRes"),
        ({"select_feature": "cls_patch"}, "the features of AnyRes form a map"),
    ],
)
def test_configs_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODELS["clip"], **changes)
