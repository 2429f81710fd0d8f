"""Logits of a small LLaVA on a batch of the training layout, here and in transformers."""

import functools

import jax
import numpy as np
import torch
import torch_reference as reference

from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import build

CONFIG = reference.LLAVA


def random_images(*leading: int, seed: int = 0, size: int = CONFIG.vision.image_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*leading, size, size, 3), np.uint8)


def make_batch(rows: list[list], images: np.ndarray, pad_to: int | None = None, config=CONFIG) -> dict[str, np.ndarray]:
    """The training layout from rows of words (`int` many random tokens) and images (`"image"`).

    One row a group; `images` is [G, I, H, W, 3].
    """
    rng, P = np.random.default_rng(7), config.image_tokens
    tokens, index = [], []
    for row in rows:
        row_tokens, row_index = [], []
        for item in row:
            if item == "image":
                row_tokens += [0] * P
                start = max(row_index, default=-1) + 1
                row_index += range(start, start + P)
            else:
                row_tokens += rng.integers(0, config.text.vocab_size - 1, item).tolist()
                row_index += [-1] * item
        tokens.append(row_tokens)
        index.append(row_index)
    length = pad_to or max(map(len, tokens))

    def padded(values, filler):
        return np.array([row + [filler] * (length - len(row)) for row in values], np.int32)

    return {
        "tokens": padded(tokens, 0),
        "image_feature_index": padded(index, -1),
        "segment_ids": padded([[1] * len(row) for row in tokens], 0),
        "positions": padded([list(range(len(row))) for row in tokens], 0),
        "images": images,
    }


@functools.partial(jax.jit, static_argnums=0)
def logits(config: LlavaConfig, params, batch):
    model = build(config, params)
    return model.llm.logits(model(batch))


@torch.no_grad()
def torch_logits(model, batch: dict[str, np.ndarray], config: LlavaConfig) -> np.ndarray:
    """Hugging Face expects `<image>` P times for each picture, and the pictures that occur, in order."""
    image = batch["image_feature_index"] >= 0
    ids = np.where(image, model.config.image_token_id, batch["tokens"])
    inputs = {"input_ids": ids, "attention_mask": batch["segment_ids"], "position_ids": batch["positions"]}
    inputs = {name: torch.from_numpy(value).long() for name, value in inputs.items()}
    used = image.sum(axis=1) // config.image_tokens
    pictures = [slots[:n] for slots, n in zip(batch["images"], used, strict=True) if n]
    if pictures:
        pixels = ((np.concatenate(pictures) / 255 - config.image_mean) / config.image_std).astype(np.float32)
        inputs["pixel_values"] = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return model(**inputs).logits.numpy()
