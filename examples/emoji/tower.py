"""A small CLIP, trained contrastively on images of emoji and what they are called (Radford et al. 2021).

The image encoder is CLIP's vision transformer, the text encoder CLIP's bag of words. An image is compared with the
texts of all names, all kinds and all keywords: with a thousand texts there is no need to take only those of a batch.
LLaVA reads the patch features of the last layer but one, so these are what is trained: the embedding of an image is
the mean of unit vectors, one of each patch. It is long only if patches agree, so each learns what the image shows.
Half of the patches of an image are seen at a time, at half the cost (FLIP, Li et al. 2023).
"""

import functools
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from examples.easy_vqa.hugging_face import save_clip
from examples.easy_vqa.optimizer import muon, scale_by_fan_in, with_params
from examples.emoji import data
from examples.emoji.data import HELD_OUT, TRAINED, Emoji
from examples.emoji.drawing import between, variation
from llava_jax.cli import Parser, run, say, time_left
from llava_jax.files.writing import atomic_file
from llava_jax.models.config import CLIP_MEAN, CLIP_STD, VisionConfig
from llava_jax.models.execution import SINGLE
from llava_jax.models.llava import Params, module_params, normalize
from llava_jax.models.towers.clip import ClipVision, run_layers

CONFIG = VisionConfig(192, 768, num_layers=5, num_heads=6, image_size=48, patch_size=8, projection_dim=192)
LAYERS = CONFIG.num_layers - 1  # up to the features that LLaVA selects; the last layer stays as it was made
SEEN = 0.5  # of the patches, in all epochs but the last tenth
BATCH, EPOCHS, LEARNING_RATE = 64, 210, 3e-3
BLENDED = 0.3  # share of images between those of two vendors
WEIGHTS = (1.0, 0.5, 0.5)  # of names, kinds and keywords in the loss


class Texts(NamedTuple):
    """Texts as bags of words: float32[texts, words], rows sum to 1; and which are right, float32[emoji, texts].

    Both are tuples: of names, kinds and keywords. Rows of `right` sum to 1, or 0 for an emoji without keywords.
    """

    bags: tuple[np.ndarray, ...]
    right: tuple[np.ndarray, ...]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.emoji.tower", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, metavar="D", help="of examples.emoji.data; gets clip/")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"default: {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    emoji = data.read(args.root)
    texts = bags_of_words(emoji)
    params = train(emoji, texts, args.root / "images", args.epochs, args.seed)
    save_clip(args.root / "clip", CONFIG, {f"vision.{name}": value for name, value in params.items()})
    chosen = zero_shot(params, texts, [args.root / "images" / one.image(HELD_OUT) for one in emoji])
    kinds = sorted({one.kind for one in emoji})
    answers = {one.id: [emoji[name].name, kinds[kind]] for one, name, kind in zip(emoji, *chosen, strict=True)}
    with atomic_file(args.root / "clip/zero_shot.json") as file:
        file.write(json.dumps(answers, ensure_ascii=False, indent=1).encode() + b"\n")
    right = np.mean([answers[one.id] == [one.name, one.kind] for one in emoji])
    say(f"{args.root}/clip: names and kinds of {right:.1%} of {HELD_OUT}'s images are those nearest to them")


def bags_of_words(emoji: Sequence[Emoji]) -> Texts:
    """The texts that images are compared with."""
    said = [[(one.name,) for one in emoji], [(one.kind,) for one in emoji], [one.keywords for one in emoji]]
    listed = [[one.name for one in emoji], *(sorted({text for own in group for text in own}) for group in said[1:])]
    words = sorted({word for group in listed for text in group for word in text.lower().split()})
    place = {word: i for i, word in enumerate(words)}
    bags, right = [], []
    for group, texts in zip(said, listed, strict=True):
        bag = np.zeros((len(texts), len(words)), np.float32)
        for row, text in zip(bag, texts, strict=True):
            for word in text.lower().split():
                row[place[word]] += 1 / len(text.split())
        number = {text: i for i, text in enumerate(texts)}
        shares = np.zeros((len(emoji), len(texts)), np.float32)
        for row, own in zip(shares, group, strict=True):
            row[[number[text] for text in own]] = 1 / max(len(own), 1)
        bags.append(bag)
        right.append(shares)
    return Texts(tuple(bags), tuple(right))


def train(
    emoji: Sequence[Emoji], texts: Texts, images: Path, epochs: int, seed: int, vendors: Sequence[str] = TRAINED
) -> Params:
    """The parameters of both encoders."""
    drawings = [[Image.open(images / one.image(vendor)).convert("RGB") for vendor in vendors] for one in emoji]
    params = init(jax.random.key(seed), texts)
    batch = min(BATCH, len(emoji) * len(vendors))
    steps = len(emoji) * len(vendors) // batch
    optimizer = muon(params, LEARNING_RATE, epochs * steps)
    state, began, shown = (params, optimizer.init(params)), time.monotonic(), 0.0
    order = random.Random(seed)
    batches = epoch_of(drawings, order, steps, batch)
    for epoch in range(epochs):
        seen = SEEN if epoch < epochs - epochs // 10 else 1.0
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed + 1), epoch), steps)
        state, loss = run_epoch(optimizer, seen, state, texts, (*batches, keys))
        batches = epoch_of(drawings, order, steps, batch)  # while the epoch is computed
        loss.block_until_ready()
        now = time.monotonic() - began
        if now - shown >= 10 or epoch + 1 == epochs:
            left = time_left(now / (epoch + 1) * (epochs - epoch - 1))
            say(f"tower: epoch {epoch + 1}/{epochs}, loss {loss:.3f}, {left} left", file=sys.stderr)
            shown = now
    return state[0]


def epoch_of(
    drawings: list[list[Image.Image]], order: random.Random, steps: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """A variation of each drawing, and its emoji's number: uint8[steps, batch, S, S, 3] and int32[steps, batch]."""
    all_of_them = [(number, vendor) for number, own in enumerate(drawings) for vendor in range(len(own))]
    chosen = order.sample(all_of_them, steps * batch)
    pixels = []
    for number, vendor in chosen:
        drawing = drawings[number][vendor]
        if order.random() < BLENDED:
            drawing = between(drawing, order.choice(drawings[number]), order)
        pixels.append(np.asarray(variation(drawing, order, CONFIG.image_size)))
    size = CONFIG.image_size
    return (
        np.stack(pixels).reshape(steps, batch, size, size, 3),
        np.array([number for number, _ in chosen], np.int32).reshape(steps, batch),
    )


def init(key: jax.Array, texts: Texts) -> Params:
    """Both encoders, and the scale of similarities, e to the power of `scale`."""
    D, E = CONFIG.hidden_size, CONFIG.projection_dim
    keys = jax.random.split(key, 3)
    encoders = {
        "projection.kernel": jax.random.normal(keys[1], (D, E)) / D**0.5,
        "text.words": jax.random.normal(keys[2], (texts.bags[0].shape[1], E)),
        "scale": jnp.log(10.0),
    }
    return scale_by_fan_in(module_params(ClipVision(CONFIG, rngs=nnx.Rngs(params=keys[0])))) | encoders


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run_epoch(
    optimizer: optax.GradientTransformation, seen: float, state: tuple, texts: Texts, batches: tuple
) -> tuple[tuple, jax.Array]:
    """All steps of an epoch; -> the new state and the mean loss."""

    def step(state: tuple, batch: tuple) -> tuple:
        params, moments = state
        loss, gradients = jax.value_and_grad(contrastive_loss)(params, texts, *batch, seen)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state, losses = jax.lax.scan(step, state, batches)
    return state, losses.mean()


def contrastive_loss(
    params: Params, texts: Texts, images: jax.Array, numbers_N: jax.Array, key: jax.Array, seen: float
) -> jax.Array:
    """Cross-entropy of the right texts among all, of names, kinds and keywords."""
    similarities = compare(params, embed_images(params, images, key, seen), texts)
    losses = [
        -jnp.mean(jnp.sum(right[numbers_N] * jax.nn.log_softmax(logits), axis=-1))
        for logits, right in zip(similarities, texts.right, strict=True)
    ]
    return sum(weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True))


def embed_images(params: Params, images: jax.Array, key: jax.Array | None = None, seen: float = 1.0) -> jax.Array:
    """uint8[N, S, S, 3] -> float[N, E]: the mean of unit vectors, one of each patch that is seen."""
    tower = with_params(lambda: ClipVision(CONFIG, rngs=nnx.Rngs(0)), params)
    patches_NPD = tower.patch_embedding(normalize(images, CLIP_MEAN, CLIP_STD))
    N, P, D = patches_NPD.shape
    positions = tower.position_embedding[...]
    patches_NPD += positions[None, 1:]
    if seen < 1:
        kept = jax.vmap(lambda key: jax.random.permutation(key, P)[: round(seen * P)])(jax.random.split(key, N))
        patches_NPD = jnp.take_along_axis(patches_NPD, kept[..., None], axis=1)
    token_N1D = jnp.broadcast_to((tower.class_embedding[...] + positions[0])[None, None], (N, 1, D))
    tokens = tower.pre_layernorm(jnp.concatenate([token_N1D, patches_NPD], axis=1))
    features_NPD = run_layers(tower.layers, tokens, LAYERS, SINGLE)[:, 1:]
    features_NPD *= jax.lax.rsqrt(jnp.square(features_NPD).mean(-1, keepdims=True) + 1e-6)
    return unit(features_NPD @ params["projection.kernel"]).mean(1)


def compare(params: Params, images_NE: jax.Array, texts: Texts) -> list[jax.Array]:
    """Similarities of images with the texts of each group, float[N, texts]."""
    return [jnp.exp(params["scale"]) * images_NE @ unit(bag @ params["text.words"]).T for bag in texts.bags]


def unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def zero_shot(params: Params, texts: Texts, files: Sequence[Path]) -> list[np.ndarray]:
    """The numbers of the nearest name and the nearest kind of each image, int[N] each."""
    size = (CONFIG.image_size,) * 2
    images = np.stack([np.asarray(Image.open(file).resize(size, Image.Resampling.BICUBIC)) for file in files])
    similarities = jax.jit(compare)(params, jax.jit(embed_images)(params, images), texts)
    return [np.asarray(group.argmax(-1)) for group in similarities[:2]]


if __name__ == "__main__":
    run(main)
