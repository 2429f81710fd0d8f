"""A small LLaMA and its tokenizer, trained on the text of the training split: it never sees a picture.

Like the language models that LLaVA starts from, it can hold a conversation before it can see, and only answers are
learned. Captions take the place of pictures: it learns to repeat what it is told, to read questions and to answer them
from what stands before. Lessons are short, one question each: with all questions of a picture in one conversation it
would rather combine earlier answers than compare the question with the caption.
"""

import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
from llava_jax.data.conversation import IMAGE_TOKEN, Template, get_template, render
from llava_jax.data.tokenization import IGNORE_INDEX, encode_turns
from llava_jax.loss import cross_entropy_sum
from llava_jax.models.config import TextConfig
from llava_jax.models.llama import Llama
from llava_jax.models.llava import Params, module_params

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", IMAGE_TOKEN]
VOCABULARY = 448  # 256 bytes, the special tokens and the words of the data set
CHAT, PLAIN = get_template("v1"), get_template("plain")
MOST_COPIES = 8  # of a caption that takes the place of a picture: a picture tells the same at every patch
LENGTH = 52  # tokens; no lesson is longer
BATCH, STEPS, LEARNING_RATE = 64, 350, 5e-3
STEPS_A_CALL = 50


def train(directory: Path, seed: int = 0) -> None:
    """Trains tokenizer and model and writes them to `directory` as Hugging Face has them."""
    order = random.Random(seed)
    taught = order.sample(list(lessons(order)), STEPS * BATCH)
    tokenizer = train_tokenizer([render(lesson.turns, CHAT).text for lesson in taught])
    config = TextConfig(
        len(tokenizer), 128, 256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, tie_word_embeddings=True
    )
    params = scale_by_fan_in(module_params(Llama(config, rngs=nnx.Rngs(seed))))
    optimizer = muon(params, LEARNING_RATE, STEPS)
    state = (params, optimizer.init(params))
    data = tokenize(taught, tokenizer)
    began = time.monotonic()
    for start in range(0, STEPS, STEPS_A_CALL):
        stop = start + STEPS_A_CALL
        state, loss = run_steps(config, optimizer, state, tuple(part[start:stop] for part in data))
        print(f"language model: step {stop}/{STEPS}, loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    save_llama(directory, config, {f"llm.{name}": value for name, value in state[0].items()}, tokenizer)


class Lesson(NamedTuple):
    turns: list[tuple[str, str]]
    template: Template


def lessons(order: random.Random) -> Iterator[Lesson]:
    """What can be learned from the pictures of the training split whose caption is known."""
    for picture in pictures("train"):
        description = caption(picture)
        if not description:
            continue
        seen = " ".join([description] * order.randint(1, MOST_COPIES))
        yield Lesson([("user", ""), ("assistant", f"{seen}\n{description}")], PLAIN)
        for question in picture.questions:
            if order.random() < 0.5:  # without the system prompt, which is longer than all else
                seen, system = " ".join([description] * order.randint(1, MOST_COPIES)), [("system", "")]
            else:
                seen, system = description, []
            yield Lesson([*system, ("user", f"{seen}\n{question.text}"), ("assistant", question.answer)], CHAT)


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
    return PreTrainedTokenizerFast(tokenizer_object=bpe, extra_special_tokens=[IMAGE_TOKEN], **names)


def tokenize(taught: list[Lesson], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the tokens to predict next, int32[STEPS, BATCH, LENGTH] both."""
    tokens = np.zeros((len(taught), LENGTH), np.int32)
    labels = np.full_like(tokens, IGNORE_INDEX)
    for row, lesson in enumerate(taught):
        encoded = encode_turns(lesson.turns, lesson.template, tokenizer)
        tokens[row, : len(encoded.input_ids)] = encoded.input_ids
        labels[row, : len(encoded.labels)] = encoded.labels
    targets = np.roll(labels, -1, axis=1)
    return tokens.reshape(STEPS, BATCH, LENGTH), targets.reshape(STEPS, BATCH, LENGTH)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run_steps(config: TextConfig, optimizer: optax.GradientTransformation, state: tuple, data: tuple) -> tuple:
    """A step for each batch; -> the new state and the mean loss."""

    def mean_loss(params: Params, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        llm = with_params(lambda: Llama(config, rngs=nnx.Rngs(0)), params)
        positions_BT = jnp.broadcast_to(jnp.arange(LENGTH)[None], tokens_BT.shape)
        # Padding follows what is learned, and a token sees only what precedes it: one segment will do.
        hidden_BTD = llm(llm.embed_tokens(tokens_BT), positions_BT, jnp.ones_like(tokens_BT))
        return cross_entropy_sum(llm, hidden_BTD, targets_BT) / jnp.sum(targets_BT != IGNORE_INDEX)

    def step(state: tuple, batch: tuple) -> tuple:
        params, moments = state
        loss, gradients = jax.value_and_grad(mean_loss)(params, *batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state, losses = jax.lax.scan(step, state, data)
    return state, losses.mean()
