"""Small models as transformers and the original LLaVA write them, to be converted, and what shows that they were."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch_reference as reference
import transformers
from forward import logits as our_logits
from forward import make_batch, random_images, torch_logits
from safetensors.numpy import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.convert.__main__ import main
from llava_jax.convert.outgoing import Tensor, write_shards
from llava_jax.convert.tensors import open_directory


def byte_level(specials=("<s>", "</s>", "<pad>"), vocab_size=300, eos="</s>"):
    """A small byte-level BPE, as the quickstart trains one."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["what is the colour of the shape? blue, a circle"] * 2, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos, pad_token="<pad>")


TOKENIZER = byte_level(specials=("<s>", "</s>", "<pad>", "<image>"))
TEXT = dataclasses.replace(reference.TEXT, vocab_size=len(TOKENIZER))
CONFIG = dataclasses.replace(reference.LLAVA, text=TEXT)
TIED = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, tie_word_embeddings=True))
WIDE = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, hidden_size=128, num_heads=2))
# What each layout has where a fresh save of transformers 5.23 (L4) has the first.
LAYOUTS = {
    "L1": {"vision_tower.": "vision_tower.vision_model."},
    "L2": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "L3": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head": "lm_head",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "L4": {},
}
ORIGINAL_NAMES = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "lm_head.": "lm_head.",
}


def rename(tensors: dict, prefixes: dict[str, str]) -> dict:
    def new(name):
        for old, replacement in prefixes.items():
            if name.startswith(old):
                return replacement + name.removeprefix(old)
        return name

    return {new(name): tensor for name, tensor in tensors.items()}


def save_sharded(tensors: dict, directory: Path) -> None:
    (directory / "model.safetensors").unlink(missing_ok=True)
    lazy = [
        Tensor(name, tensor.shape, tensor.dtype, functools.partial(tensors.get, name))
        for name, tensor in tensors.items()
    ]
    write_shards(directory, lazy, max_bytes=100_000)
    assert (directory / "model.safetensors.index.json").exists()


def edit(directory: Path, change) -> None:
    """Rewrites the tensors of a directory through `change(dict)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors_of(directory: Path) -> dict:
    return {name: tensor.read() for name, tensor in open_directory(directory).items()}


def save_llava(config, directory: Path, **settings) -> LlavaForConditionalGeneration:
    model = reference.llava(config)
    model.config.image_token_id = 3
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return model


def convert(*arguments) -> None:
    main([str(argument) for argument in arguments])


def check_logits(model, directory: Path) -> None:
    """The checkpoint in `directory` computes what `model` does."""
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    batch = make_batch([[5, "image", 7, "image", 3], [9]], random_images(2, 2), pad_to=40, config=config)
    ours = np.asarray(our_logits(config, checkpoint.load(), batch))
    theirs = torch_logits(model, batch, config)[..., : ours.shape[-1]]  # an export may have more rows
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=1e-5)


def load(directory: Path) -> LlavaForConditionalGeneration:
    """Through transformers, which must find every tensor and know each."""
    model, info = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def original_tensors(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in model.named_parameters():
        prefix = next(prefix for prefix in ORIGINAL_NAMES if name.startswith(prefix))
        found[ORIGINAL_NAMES[prefix] + name.removeprefix(prefix)] = tensor.detach().clone()
    return found
