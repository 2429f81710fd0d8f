"""What the comparisons with transformers share: the model, its random weights, and a process for each side."""

import dataclasses
import functools
import hashlib
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from llava_jax.convert.names import entries_of, to_ours
from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from llava_jax.models.hf_names import Entry
from llava_jax.models.llava import abstract_params
from llava_jax.models.quantized import linear_of, quantize

# SmolLM2-135M's shape with a CLIP ViT-B/16 tower.
CONFIG = LlavaConfig(
    VisionConfig(768, 3072, num_layers=12, num_heads=12, image_size=224, patch_size=16),
    TextConfig(49152, 576, 1536, 30, 9, 3, 64, rope_theta=100000.0, tie_word_embeddings=True),
)
# Four layers of TinyLlama's width: the decoder's products have most of the FLOPs, as in large models.
WIDE = dataclasses.replace(CONFIG, text=TextConfig(32000, 2048, 5632, 4, 32, 4, 64))
TINY = LlavaConfig(
    VisionConfig(64, 96, num_layers=3, num_heads=4, image_size=224, patch_size=16),
    TextConfig(512, 48, 96, 2, 6, 2, 8, rope_theta=100000.0, tie_word_embeddings=True),
)
INITIAL = 0.02  # standard deviation of weights at the start of a training


class Side:
    """A process that calls `start(config)`'s result with what it is sent, so that its peak memory is its own."""

    def __init__(self, start: Callable[[LlavaConfig], Callable[[Any], Any]], config: LlavaConfig):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(start, config, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, argument: Any) -> tuple[Any, float]:
        """-> (result, seconds)"""
        self.connection.send(argument)
        return self.connection.recv()

    def stop(self) -> int:
        """Ends the process; -> its peak resident memory in bytes."""
        self.connection.send(None)
        peak = self.connection.recv()
        self.process.join()
        return peak


def _serve(start: Callable, config: LlavaConfig, connection: Connection) -> None:
    function = start(config)
    while (argument := connection.recv()) is not None:
        before = time.perf_counter()
        result = function(argument)
        connection.send((result, time.perf_counter() - before))
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def entries(config: LlavaConfig) -> Iterator[tuple[str, Entry]]:
    """Every parameter with the prefix of its names in `LlavaForConditionalGeneration`."""
    prefixes = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "")
    parts = dict(zip(prefixes, entries_of(config).values(), strict=True))
    return ((prefix, entry) for prefix, part in parts.items() for entry in part)


def random_tensor(name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """A function of its Hugging Face name: norms near one, all else near zero, by the standard deviation `scale`."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    noise = np.float32(scale) * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return noise + np.float32("norm" in name and name.endswith("weight"))


def our_parameters(config: LlavaConfig, scale: float = INITIAL) -> Iterator[tuple[str, np.ndarray]]:
    """The names and values of our parameters. A quantized base is quantized from the same values."""
    if config.base_dtype:
        plain = dict(our_parameters(dataclasses.replace(config, base_dtype=""), scale))
        for name, value in plain.items():
            if name in abstract_params(config):
                yield name, value
            else:
                parts = quantize(value, config.base_dtype)
                yield from ((f"{linear_of(name)}.{part}", codes) for part, codes in parts.items())
        return
    shapes = {name: leaf.shape for name, leaf in abstract_params(config).items()}
    for prefix, entry in entries(config):
        get = functools.partial(_tensor, prefix, entry.hf_shape(shapes[entry.name]), scale)
        yield entry.name, to_ours(entry, get)


def _tensor(prefix: str, shape: tuple[int, ...], scale: float, leaf: str) -> np.ndarray:
    return random_tensor(prefix + leaf, shape, scale)


def torch_model(config: LlavaConfig, scale: float = INITIAL) -> Any:
    """`LlavaForConditionalGeneration` with the same values and its default attention; the last id is `<image>`.

    Adapters are PEFT's.
    """
    import torch
    import transformers

    vision, text = config.vision, config.text
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_hidden_layers=text.num_layers,
                num_attention_heads=text.num_heads,
                num_key_value_heads=text.num_kv_heads,
                head_dim=text.head_dim,
                rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
                rms_norm_eps=text.rms_norm_eps,
                tie_word_embeddings=text.tie_word_embeddings,
            ),
            image_token_id=text.vocab_size - 1,
            tie_word_embeddings=text.tie_word_embeddings,
        )
    )
    if config.lora is not None:
        model = with_adapters(model, config)
    parameters = {_without_peft(name): parameter for name, parameter in model.named_parameters()}
    for prefix, entry in entries(config):
        for leaf in entry.leaves():
            parameter = parameters.pop(prefix + leaf)
            parameter.data.copy_(torch.from_numpy(random_tensor(prefix + leaf, tuple(parameter.shape), scale)))
    assert not parameters, f"not set: {list(parameters)}"
    return model


def with_adapters(model: Any, config: LlavaConfig) -> Any:
    """A torch model with PEFT's adapters where ours has some."""
    import peft

    adapters = [prefix + leaf for prefix, entry in entries(config) if ".lora." in entry.name for leaf in entry.leaves()]
    targets = sorted({name.partition(".lora_")[0] for name in adapters})
    lora = config.lora
    options = {"use_rslora": lora.rslora, "use_dora": lora.dora, "lora_dropout": lora.dropout}
    return peft.get_peft_model(
        model, peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, **options)
    )


def _without_peft(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default", "")
