"""A tiny model, a tokenizer and a data set on disk, for tests of what uses them."""

import contextlib
import functools
import json
import os
import socket
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.writing import write_model
from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.models.llava import Llava, Params, abstract_params, module_params
from llava_jax.models.quantized import linear_of, quantize

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}
TEXT = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT:",
    "What colour is it? It is red. It is green. It is blue. It is white.",
]
VOCAB = 400


# Names of images that no folder has: `add_irregular` makes the last ones.
OUTSIDE = ["../secret.png", "a/../../secret.png", "/dev/zero", "．．/secret.png", "C:\\secret.png", "a\0.png"]
IRREGULAR = ["pipe.png", "zeros.png", "folder.png", "socket.png"]

# Texts that a terminal obeys: colours, titles, links, the clipboard, lines that overwrite others, reversed directions.
ESCAPES = "\x1b[31m\x1b]0;t\x07\x1b]8;;http://x\x1b\\\x1b]52;c;eA==\x07\x9b2J\x9d0;t\x9c\rhid\x08\x7f\u202egnp\u2066"


def obeyed(text: str) -> set[str]:
    """What a terminal would obey, or be misled by, in what was printed."""
    return {c for c in text if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in "\u202e\u2066"}


def add_irregular(folder: Path) -> None:
    """A picture above a folder, and in it what is there but is no file: to open some of them blocks for ever."""
    Image.new("RGB", (4, 4)).save(folder.parent / "secret.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as made:  # a path may have 107 characters
        made.bind("socket.png")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that can write anything, with `<s>`, `</s>`, `<unk>` and `<pad>` as ids 0..3."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def config(**changes) -> LlavaConfig:
    vision = VisionConfig(32, 64, 3, 4, image_size=16, patch_size=8)
    text = TextConfig(VOCAB, 48, 96, 2, 4, 2, 12)
    return LlavaConfig(**{"vision": vision, "text": text, "projector_type": "mlp2x_gelu"} | changes)


@functools.lru_cache(maxsize=32)
def _fresh(model: LlavaConfig, seed: int) -> dict[str, np.ndarray]:
    """Not jitted: the program of each model takes longer to compile than these few numbers to compute."""
    return jax.device_get(module_params(Llava(model, rngs=nnx.Rngs(params=jax.random.key(seed)))))


def params(model: LlavaConfig, seed: int = 0) -> Params:
    """Fresh parameters, with adapters that change what the model computes."""
    made = {name: jnp.array(value) for name, value in _fresh(model, seed).items()}
    for name, value in made.items():
        if name.endswith(".lora.b"):
            made[name] = 0.1 * jax.random.normal(jax.random.key(seed), value.shape)
        elif name.endswith(".lora.magnitude"):  # the columns of kernels are about as long
            made[name] = 0.15 * jnp.exp(0.3 * jax.random.normal(jax.random.key(seed), value.shape))
    return made


def quantized_params(params: Params, model: LlavaConfig) -> Params:
    """The parameters of a quantized model, from those of a plain one."""
    kept = {name: value for name, value in params.items() if name in abstract_params(model)}
    for name, kernel in params.items():
        if name not in kept:
            parts = quantize(kernel, model.base_dtype)
            kept |= {f"{linear_of(name)}.{part}": value for part, value in parts.items()}
    return kept


def save_model(directory: Path | str, params: Params, description: Description, tokenizer_dir: Path | str) -> None:
    """Writes parameters as `convert import` does."""
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
    slices = ((name, None, np.asarray(value)) for name, value in params.items())
    write_model(directory, shapes, slices, description, os.fspath(tokenizer_dir))


def adapted_params(model: LlavaConfig) -> Params:
    """Parameters whose adapters change what the model computes."""
    found = params(model)
    for number, name in enumerate(sorted(name for name in found if name.endswith((".lora.b", ".lora.magnitude")))):
        noise = jax.random.normal(jax.random.key(number), found[name].shape)
        found[name] = 0.3 * noise if name.endswith(".b") else 0.2 + 0.1 * noise
    return found


def checkpoint(
    directory: Path, model: LlavaConfig | None = None, template: str = "v1", params: Params | None = None
) -> Path:
    """Writes what `convert import` would: `directory`/model."""
    model = model or config()
    tokenizer().save_pretrained(directory / "hf_tokenizer")
    description = Description(model, template)
    save_model(directory / "model", params or adapted_params(model), description, str(directory / "hf_tokenizer"))
    return directory / "model"


def data(directory: Path, samples: int = 12) -> tuple[Path, Path]:
    """Pictures of one colour and questions about it: (JSON, image folder). Every fourth sample has no picture."""
    images = directory / "images"
    images.mkdir(parents=True)
    lines = []
    for i in range(samples):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        Image.fromarray(np.full((20, 24, 3), colour, np.uint8)).save(images / f"{i}.png")
        turns = [("human", "<image>\nWhat colour is it?"), ("gpt", f"It is {name}.")]
        sample = {"id": f"sample-{i}", "image": f"{i}.png"}
        if i % 4 == 3:
            sample = {"id": f"sample-{i}"}
            turns = [("human", f"Say {name}."), ("gpt", name)]
        lines.append(sample | {"conversations": [{"from": role, "value": text} for role, text in turns]})
    file = directory / "data.json"
    file.write_text(json.dumps(lines))
    return file, images
