"""A small LLaMA and its tokenizer, trained on the text of the training split: it never sees an image.

Like the language models that LLaVA starts from, it can hold a conversation before it can see, and only answers are
learned. The words of captions take the place of images, up to as many as an image has patches: it learns to repeat
what it is told, to read questions and to answer them from what stands before. Lessons have one question each: with all
questions of an image in one conversation it would rather combine earlier answers than compare the question with what
it sees. They start short, since to compare is found out much sooner where little else is to be looked at.
"""

import functools
import itertools
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

from examples.easy_vqa.data import AskedImage, asked_images, caption
from examples.easy_vqa.hugging_face import save_llama
from examples.easy_vqa.optimizer import muon, scale_by_fan_in, with_params
from llava_jax.data.conversation import render
from llava_jax.data.templates import IMAGE_TOKEN, Template, get_template
from llava_jax.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_turns
from llava_jax.models.config import TextConfig
from llava_jax.models.llama import Llama
from llava_jax.models.llava import Params, module_params
from llava_jax.training.loss import cross_entropy

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", IMAGE_TOKEN]
VOCABULARY = 448  # 256 bytes, the special tokens and the words of the data set
CHAT, PLAIN = get_template("v1"), get_template("plain")
BATCH, LEARNING_RATE = 64, 5e-3
STEPS_A_CALL = 50


class Grade(NamedTuple):
    """Lessons of a kind."""

    steps: int
    length: int  # tokens; no lesson is longer
    most_words: int  # in the place of an image
    systems: tuple[str | None, ...]  # one of these system prompts; None is the template's, longer than all else


GRADES = (Grade(300, 24, 2, ("",)), Grade(100, 112, 64, ("", None)))


def train(directory: Path, seed: int = 0) -> None:
    """Trains tokenizer and model and writes them to `directory` as Hugging Face has them."""
    order = random.Random(seed)
    known = [image for image in asked_images("train") if caption(image)]
    taught = [order.sample(list(lessons(known, grade, order)), grade.steps * BATCH) for grade in GRADES]
    tokenizer = train_tokenizer([render(lesson.turns, lesson.template).text for lesson in itertools.chain(*taught)])
    config = TextConfig(
        len(tokenizer), 128, 256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, tie_word_embeddings=True
    )
    params = scale_by_fan_in(module_params(Llama(config, rngs=nnx.Rngs(seed))))
    steps = sum(grade.steps for grade in GRADES)
    optimizer = muon(params, LEARNING_RATE, steps)
    state, step, began = (params, optimizer.init(params)), 0, time.monotonic()
    for grade, part in zip(GRADES, taught, strict=True):
        data = tokenize(part, grade.length, tokenizer)
        for start in range(0, grade.steps, STEPS_A_CALL):
            state, loss = run_steps(config, optimizer, state, *(array[start : start + STEPS_A_CALL] for array in data))
            step += STEPS_A_CALL
            print(f"language model: step {step}/{steps}, loss {loss:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    save_llama(directory, config, {f"llm.{name}": value for name, value in state[0].items()}, tokenizer)


class Lesson(NamedTuple):
    turns: list[tuple[str, str]]
    template: Template
    image: list[str]  # the words in its place


def lessons(known: list[AskedImage], grade: Grade, order: random.Random) -> Iterator[Lesson]:
    """What can be learned from images whose caption is known."""
    for image in known:
        words = caption(image).split()[1:]
        yield Lesson([("user", IMAGE_TOKEN), ("assistant", caption(image))], PLAIN, repeat(words, grade, order))
        for question in image.questions:
            system = order.choice(grade.systems)
            turns = [("user", f"{IMAGE_TOKEN}\n{question.text}"), ("assistant", question.answer)]
            turns = turns if system is None else [("system", system), *turns]
            yield Lesson(turns, CHAT, repeat(words, grade, order))


def repeat(words: list[str], grade: Grade, order: random.Random) -> list[str]:
    """The words again and again in any order, each at least once: so do the patches of an image tell them."""
    more = order.randint(0, grade.most_words - len(words))
    return order.sample(words + order.choices(words, k=more), k=len(words) + more)


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


def tokenize(taught: list[Lesson], length: int, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the tokens to predict next, int32[steps, BATCH, length] both."""
    tokens = np.zeros((len(taught), length), np.int32)
    labels = np.full_like(tokens, IGNORE_INDEX)
    for row, lesson in enumerate(taught):
        encoded = encode_turns(lesson.turns, lesson.template, tokenizer)
        (mark,) = np.flatnonzero(encoded.input_ids == IMAGE_TOKEN_INDEX)
        image = tokenizer.encode("".join(f" {word}" for word in lesson.image), add_special_tokens=False)
        for array, part, filling in (
            (tokens, encoded.input_ids, image),
            (labels, encoded.labels, [IGNORE_INDEX] * len(image)),
        ):
            whole = [*part[:mark], *filling, *part[mark + 1 :]]
            array[row, : len(whole)] = whole
    targets = np.roll(labels, -1, axis=1)
    return tokens.reshape(-1, BATCH, length), targets.reshape(-1, BATCH, length)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def run_steps(
    config: TextConfig,
    optimizer: optax.GradientTransformation,
    state: tuple,
    tokens_NBT: jax.Array,
    targets_NBT: jax.Array,
) -> tuple:
    """A step for each of N batches; -> the new state and the mean loss."""

    def mean_loss(params: Params, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        llm = with_params(lambda: Llama(config, rngs=nnx.Rngs(0)), params)
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        # Padding follows what is learned, and a token sees only what precedes it: one segment will do.
        hidden_BTD = llm(llm.embed_tokens(tokens_BT), positions_BT, jnp.ones_like(tokens_BT))
        weight = 1 / jnp.sum(targets_BT != IGNORE_INDEX)
        return cross_entropy(llm.head(hidden_BTD)[0], hidden_BTD, targets_BT, weight)

    def step(state: tuple, batch: tuple) -> tuple:
        params, moments = state
        loss, gradients = jax.value_and_grad(mean_loss)(params, *batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state, losses = jax.lax.scan(step, state, (tokens_NBT, targets_NBT))
    return state, losses.mean()
