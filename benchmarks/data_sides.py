"""What `data.py` compares: `Batches.iterate`, and `LlavaProcessor` in a torch `DataLoader`, on the same batches."""

import io
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from synthetic import write_json, write_pictures

from llava_jax.data.conversation import render
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import measure
from llava_jax.data.pipeline import Batch, Batches, ImageDecoder
from llava_jax.data.plan import Lengths, Order, plan_layout
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import IMAGE_TOKEN, get_template
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.models.config import CLIP_MEAN

SIZE, PATCH, LENGTH = 336, 14, 2048
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = get_template("v1")
SAMPLES, PICTURES = 20_000, 400


@dataclass(frozen=True)
class Task:
    """What both read, and how."""

    encoded: EncodedSource
    lengths: Lengths
    order: Order
    decode: ImageDecoder


def make_task(folder: Path, rows: int, aspect: str) -> Task:
    """Writes samples and pictures, and measures the samples."""
    write_json(folder / "samples.json", SAMPLES, PICTURES)
    write_pictures(folder / "pictures", PICTURES)
    source = LlavaJson(folder / "samples.json", folder / "pictures")
    encode = TextEncoder(TEMPLATE, load_tokenizer(tokenizer_directory(folder)), IMAGE_TOKENS, LENGTH)
    encoded = EncodedSource(source, encode)
    order = Order(np.arange(len(source)), rows, seed=0)
    return Task(encoded, measure(encoded), order, ImageDecoder(SIZE, aspect, CLIP_MEAN))


def tokenizer_directory(folder: Path) -> Path:
    """A directory with Mistral's `tokenizer.model`, as LLaMA's comes."""
    (package,) = find_spec("mistral_common").submodule_search_locations
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(Path(package) / "data" / "tokenizer.model.v1", folder / "tokenizer" / "tokenizer.model")
    return folder / "tokenizer"


def our_batches(task: Task, steps: int, workers: int) -> Iterator[Batch]:
    layout = plan_layout(
        [(task.order, steps)],
        task.lengths,
        rows_per_group=1,
        max_length=LENGTH,
        image_tokens=IMAGE_TOKENS,
        image_size=SIZE,
    )
    batches = Batches(task.encoded, task.decode, task.order, layout)
    return (read.batch for read in batches.iterate(0, steps, workers))


def peer_batches(task: Task, processor: Any, steps: int, workers: int) -> Iterator[dict[str, Any]]:
    import torch

    loader = torch.utils.data.DataLoader(
        PeerSamples(task.encoded.source),
        batch_sampler=[list(itertools.chain(*task.order.rows(step))) for step in range(steps)],
        collate_fn=PeerCollation(processor),
        num_workers=workers,
        multiprocessing_context="spawn",
    )
    return iter(loader)


def peer_processor(folder: Path, aspect: str) -> Any:
    """`LlavaProcessor` as the published checkpoints have it, or with the padding of the original."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = load_tokenizer(tokenizer_directory(folder))
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.unk_token, "right"
    shape = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    pictures = LlavaImageProcessorPil(do_pad=True, **shape) if aspect == "pad" else CLIPImageProcessorPil(**shape)
    return LlavaProcessor(
        pictures, tokenizer, PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


class PeerSamples:
    """index -> text and pictures: what a data set for `LlavaProcessor` returns."""

    def __init__(self, source: LlavaJson):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, list[Image.Image]]:
        sample = self.source[index]
        images = self.source.read_images(index, sample.images)
        return peer_text(sample.turns), [peer_decode(data) for data in images]


def peer_text(turns: Sequence[tuple[str, str]]) -> str:
    return render(turns, TEMPLATE)[0]


def peer_decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


class PeerCollation:
    """Texts and pictures -> a batch padded to its longest sample."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, samples: Sequence[tuple[str, list[Image.Image]]]) -> dict[str, Any]:
        texts, pictures = zip(*samples, strict=True)
        batch = self.processor(
            text=list(texts),
            images=list(itertools.chain(*pictures)) or None,
            padding=True,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return dict(batch)
