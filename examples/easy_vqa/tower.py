"""A small CLIP vision tower, trained to tell shapes and colours from the training split.

LLaVA reads the patch features of the last layer but one. A class head on the last layer would leave them blind, so
every patch feature of that layer has to tell shape and colour of the image. Two things make two minutes on two cores
enough: Muon (Jordan et al. 2024) for the matrices, and windows of 32 x 32 pixels around the shape, a quarter of the
tokens, for all epochs but the last.
"""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from examples.easy_vqa.data import COLOURS, IMAGES, SHAPES, AskedImage, asked_images, facts
from examples.easy_vqa.hugging_face import save_clip
from examples.easy_vqa.optimizer import muon, scale_by_fan_in, with_params
from llava_jax.models.config import CLIP_MEAN, CLIP_STD, VisionConfig
from llava_jax.models.llava import Params, module_params, normalize
from llava_jax.models.towers.clip import ClipVision

CONFIG = VisionConfig(128, 512, num_layers=3, num_heads=4, image_size=64, patch_size=8, projection_dim=128)
LAYERS = CONFIG.num_layers - 1  # up to the features that LLaVA selects; the last layer stays as it was made
WINDOW = 4  # patches
BATCH, EPOCHS, LEARNING_RATE = 50, 10, 3e-3
UNKNOWN = -1


def train(directory: Path, seed: int = 0) -> None:
    """Trains the tower and writes it to `directory` as Hugging Face has it."""
    examples = asked_images("train")
    images, labels = read(examples)
    boxes = np.array([bounding_box(image) for image in images], np.int32)
    params = init(jax.random.key(seed))
    steps = len(images) // BATCH
    optimizer = muon(params, LEARNING_RATE, EPOCHS * steps)
    state = (params, optimizer.init(params))
    shuffle, began = np.random.default_rng(seed), time.monotonic()
    for epoch in range(EPOCHS):
        chosen = shuffle.permutation(len(images))[: steps * BATCH].reshape(steps, BATCH)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed + 1), epoch), steps)
        window = WINDOW if epoch < EPOCHS - 1 else CONFIG.image_size // CONFIG.patch_size
        data = (images[chosen], labels[chosen], boxes[chosen], keys)
        state, loss = run_epoch(optimizer, window * CONFIG.patch_size, state, data)
        print(f"tower: epoch {epoch + 1}/{EPOCHS}, loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    save_clip(directory, CONFIG, {f"vision.{name}": value for name, value in state[0].items()})


def read(examples: list[AskedImage]) -> tuple[np.ndarray, np.ndarray]:
    """uint8[N, 64, 64, 3] and int32[N, 2]: shape and colour, UNKNOWN where the questions do not tell."""
    images = np.stack([np.asarray(Image.open(IMAGES / example.name).convert("RGB")) for example in examples])
    labels = [
        [
            values.index(fact) if fact else UNKNOWN
            for fact, values in zip(facts(example), (SHAPES, COLOURS), strict=True)
        ]
        for example in examples
    ]
    return images, np.array(labels, np.int32)


def bounding_box(image: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what differs from the corners."""
    background = np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int), axis=0)
    differs = np.abs(image - background).sum(-1) > 30
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def init(key: jax.Array) -> Params:
    """The tower and a linear probe of its patch features."""
    outputs = len(SHAPES) + len(COLOURS)
    probe = {"probe.kernel": jnp.zeros((CONFIG.hidden_size, outputs)), "probe.bias": jnp.zeros(outputs)}
    return scale_by_fan_in(module_params(ClipVision(CONFIG, rngs=nnx.Rngs(params=key)))) | probe


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run_epoch(optimizer: optax.GradientTransformation, size: int, state: tuple, data: tuple) -> tuple:
    """All steps of an epoch on windows of `size` pixels; -> the new state and the mean loss."""

    def step(state, batch):
        params, moments = state
        images, labels, boxes, key = batch
        loss, gradients = jax.value_and_grad(probe_loss)(params, images, labels, boxes, key, size)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state, losses = jax.lax.scan(step, state, data)
    return state, losses.mean()


def probe_loss(params, images, labels, boxes, key, size: int) -> jax.Array:
    """Mean cross-entropy of shape and colour, told from every patch by a linear probe."""
    crop_key, place_key = jax.random.split(key)
    images = crop(images, boxes, crop_key, size)
    features = patch_features(params, images, place_key)
    logits = features @ params["probe.kernel"] + params["probe.bias"][None, None]
    parts = zip(jnp.split(logits, [len(SHAPES)], axis=-1), labels.T, strict=True)
    return sum(cross_entropy(part, label) for part, label in parts)


def patch_features(params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
    """Normalised features [N, patches, D] of the selected layer, the window standing anywhere in the image."""
    side, width = CONFIG.image_size // CONFIG.patch_size, images.shape[1] // CONFIG.patch_size
    D = CONFIG.hidden_size
    table = params["position_embedding"]
    top, left = jax.random.randint(key, (2,), 0, side - width + 1)
    window = jax.lax.dynamic_slice(table[1:].reshape(side, side, D), (top, left, 0), (width, width, D))
    params = params | {"position_embedding": jnp.concatenate([table[:1], window.reshape(-1, D)])}
    tower = with_params(lambda: ClipVision(CONFIG, rngs=nnx.Rngs(0)), params)
    features = tower(normalize(images, CLIP_MEAN, CLIP_STD), LAYERS)[:, 1:]
    return features * jax.lax.rsqrt(jnp.square(features).mean(-1, keepdims=True) + 1e-6)


def crop(images: jax.Array, boxes: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """Windows of `size` x `size` pixels that hold the whole shape where it fits, half of them mirrored.

    Pixels wrap around: the background is the same everywhere.
    """

    def crop_one(image, box, key):
        keys = jax.random.split(key, 3)

        def rows(low, high, key):
            room = jnp.maximum(size - (high - low), 0)
            return (low - jax.random.randint(key, (), 0, room + 1) + jnp.arange(size)) % image.shape[0]

        vertical, horizontal = rows(box[0], box[1], keys[0]), rows(box[2], box[3], keys[1])
        horizontal = jnp.where(jax.random.bernoulli(keys[2]), horizontal[::-1], horizontal)
        return image[vertical][:, horizontal]

    return jax.vmap(crop_one)(images, boxes, jax.random.split(key, len(images)))


def cross_entropy(logits_NPV: jax.Array, labels_N: jax.Array) -> jax.Array:
    """Mean over patches and over the images whose label is known."""
    known = labels_N != UNKNOWN
    likelihood = jax.nn.log_softmax(logits_NPV).mean(1)
    chosen = jnp.take_along_axis(likelihood, jnp.maximum(labels_N, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(chosen * known) / jnp.maximum(known.sum(), 1)
