"""A small LLaMA and its tokenizer, trained on the text of the training split: it never sees a picture.

Like the language models that LLaVA starts from, it can follow a conversation before it can see: pictures are replaced
by their captions, so it learns to repeat what it is told, to read questions and to answer them from what stands before.
"""

import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from examples.easy_vqa.data import caption, pictures
from examples.easy_vqa.hugging_face import save_llama
from examples.easy_vqa.optimizer import muon, scale_by_fan_in, with_params
from llava_jax.data.conversation import get_template, render
from llava_jax.data.tokenization import encode_turns
from llava_jax.loss import loss_sum, next_token_targets
from llava_jax.models.config import TextConfig
from llava_jax.models.llama import Llama
from llava_jax.models.llava import Params, module_params

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<image>"]
VOCABULARY = 448  # 256 bytes, the special tokens and the words of the data set
CHAT, PLAIN = get_template("v1"), get_template("plain")
LENGTH = 128
BATCH, EPOCHS, LEARNING_RATE = 28, 3, 3e-3


def train(directory: Path, seed: int = 0) -> None:
    """Trains tokenizer and model and writes them to `directory` as Hugging Face has them."""
    taught = list(lessons(random.Random(seed)))
    tokenizer = train_tokenizer([render(turns, CHAT).text for _, turns in taught])
    config = TextConfig(
        len(tokenizer), 128, 256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, tie_word_embeddings=True
    )
    data = tokenize(taught, tokenizer)
    params = scale_by_fan_in(module_params(Llama(config, rngs=nnx.Rngs(seed))))
    steps = len(taught) // BATCH
    optimizer = muon(params, LEARNING_RATE, EPOCHS * steps)
    state = (params, optimizer.init(params))
    shuffle, began = np.random.default_rng(seed), time.monotonic()
    for epoch in range(EPOCHS):
        chosen = shuffle.permutation(len(taught))[: steps * BATCH].reshape(steps, BATCH)
        state, loss = run_epoch(config, optimizer, state, tuple(part[chosen] for part in data))
        print(
            f"language model: epoch {epoch + 1}/{EPOCHS}, loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True
        )
    save_llama(directory, config, {f"llm.{name}": value for name, value in state[0].items()}, tokenizer)


def lessons(order: random.Random) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(caption, conversation) for each picture of the training split whose caption is known."""
    for picture in pictures("train"):
        description = caption(picture)
        if description:
            turns = []
            for question in order.sample(picture.questions, len(picture.questions)):
                turns += [("user", question.text), ("assistant", question.answer)]
            turns[0] = ("user", f"{description}\n{turns[0][1]}")
            yield description, turns


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it can write any text, and the words it knows are one token each."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=["<image>"], **names)


def tokenize(
    taught: list[tuple[str, list[tuple[str, str]]]], tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, positions and segment ids, int32[N, LENGTH]: a caption to repeat, then a conversation, cut to fit."""
    tokens, positions, segments = np.zeros((3, len(taught), LENGTH), np.int32)
    for row, (description, turns) in enumerate(taught):
        repeated = encode_turns([("user", ""), ("assistant", f"{description} {description}")], PLAIN, tokenizer)
        parts = [repeated.input_ids, encode_turns(turns, CHAT, tokenizer).input_ids]
        for array, values in (
            (tokens, parts),
            (positions, [np.arange(len(part)) for part in parts]),
            (segments, [np.full(len(part), i) for i, part in enumerate(parts, 1)]),
        ):
            joined = np.concatenate(values)[:LENGTH]
            array[row, : len(joined)] = joined
    return tokens, positions, segments


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run_epoch(config: TextConfig, optimizer: optax.GradientTransformation, state: tuple, data: tuple) -> tuple:
    """All steps of an epoch; -> the new state and the mean loss."""

    def mean_loss(params: Params, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """Of every next token, questions included: it is a language model."""
        llm = with_params(lambda: Llama(config, rngs=nnx.Rngs(0)), params)
        hidden = llm(llm.embed_tokens(tokens), positions, segments)
        targets = next_token_targets(jnp.where(segments > 0, tokens, -100), segments)
        return loss_sum(llm, hidden, targets, 1, tokens.size) / jnp.sum(targets >= 0)

    def step(state: tuple, batch: tuple) -> tuple:
        params, moments = state
        loss, gradients = jax.value_and_grad(mean_loss)(params, *batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state, losses = jax.lax.scan(step, state, data)
    return state, losses.mean()
