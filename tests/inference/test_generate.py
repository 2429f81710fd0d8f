"""Answers: against transformers' `generate`, in batches against one by one, streamed against whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch_reference as reference
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.data.conversation import render
from llava_jax.data.sources import Sample
from llava_jax.data.templates import TEMPLATES, Template, get_template
from llava_jax.data.tokenization import encode_sample, expand
from llava_jax.inference import generate
from llava_jax.inference.decoding import Slots
from llava_jax.inference.generate import Generator
from llava_jax.inference.prompts import PromptEncoder, share_prefixes
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import CLIP_MEAN, CLIP_STD
from llava_jax.models.llava import build

TEMPLATE = get_template("v1")
SHORT = Sampling(max_new_tokens=20)
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), np.uint8)) for seed in range(4)
]


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return tiny.tokenizer()


CONFIG = tiny.config()
CONFIG = dataclasses.replace(
    CONFIG,  # one id more than the tokenizer has, which is transformers' image
    text=dataclasses.replace(CONFIG.text, vocab_size=len(tiny.tokenizer()) + 1, max_position_embeddings=512),
)


@functools.cache
def torch_model() -> transformers.LlavaForConditionalGeneration:
    model = reference.llava(CONFIG)
    with torch.no_grad():
        model.lm_head.weight[-1] = 0  # an image is never the likeliest token
    return model


@functools.cache
def params() -> dict:
    return jax.tree.map(jnp.asarray, reference.llava_params(torch_model(), CONFIG))


def make(template: Template = TEMPLATE, **options) -> Generator:
    return Generator(build(CONFIG, params()), PromptEncoder(CONFIG, tokenizer(), template, **options))


@functools.cache
def generator() -> Generator:
    return make()


def question(text: str, *images: Image.Image) -> Request:
    return Request([("user", text)], images)


def torch_answer(request: Request, max_new_tokens: int) -> list[int]:
    """The ids that transformers generates after the same ids."""
    prompt = generator().prompts.encode(request)
    ids = np.where(prompt.image_feature_index >= 0, CONFIG.text.vocab_size - 1, prompt.tokens)
    pixels = {}
    if request.images:
        images = np.concatenate([generator().prompts.read(picture).tiles for picture in request.images])
        normalized = ((images / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)
        pixels = {"pixel_values": torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())}
    output = torch_model().generate(
        input_ids=torch.from_numpy(ids)[None].long(),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
        **pixels,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "request_, max_new_tokens",
    [
        (question("Say something."), 20),
        (question("<image>\nWhat colour is it?", IMAGES[0]), 20),
        (question("Between <image>\n and <image>?", IMAGES[1], IMAGES[2]), 20),
        (question("Tell me a long story."), generate.HEADROOM + 100),  # the cache grows
    ],
)
def test_greedy_answers_equal_transformers(request_, max_new_tokens):
    ids = torch_answer(request_, max_new_tokens)
    text = tokenizer().decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()
    assert generator().answer([request_], Sampling(max_new_tokens=max_new_tokens)) == [text]
    assert len(ids) > 3


PARTS = st.lists(st.sampled_from(["Is it red? ", "<image>", "white ", "\n", "🦙", "What colour"]), max_size=5)
TURNS = st.lists(PARTS.map("".join), min_size=1, max_size=2)


@st.composite
def requests(draw) -> Request:
    """One or two turns of the user, with pictures anywhere or nowhere."""
    texts = draw(TURNS)
    turns = [turn for text in texts for turn in (("user", text), ("assistant", "It is."))][:-1]
    marks = sum(text.count("<image>") for text in texts)
    return Request(turns, [IMAGES[draw(st.integers(0, 3))] for _ in range(marks)])


@settings(max_examples=8)  # each compiles programs
@given(batch=st.lists(requests(), min_size=4, max_size=4))
def test_a_batch_answers_as_one_by_one(batch):
    together = generator().answer(batch, SHORT)
    assert together == [generator().answer([request], SHORT)[0] for request in batch]


def test_questions_that_share_the_computation_of_a_picture_are_answered_as_one_by_one():
    padding = "white " * 30
    batch = [
        question(f"<image>\nWhat {'colour ' * (i % 3)}is it?", picture) for picture in IMAGES[:2] for i in range(7)
    ]
    batch = [Request([("system", padding), *request.turns], request.images) for request in batch]
    assert share_prefixes([generator().prompts.encode(request) for request in batch])
    together = generator().answer(batch, SHORT, batch_rows=14)
    assert together == [generator().answer([request], SHORT)[0] for request in batch]
    assert len(set(together)) > 2


def test_batch_rows_and_duplicates_change_nothing():
    batch = [question("<image>\nIt?", picture) for picture in IMAGES] * 2
    whole = generator().answer(batch, SHORT)
    assert generator().answer(batch, SHORT, batch_rows=3) == whole
    assert whole[:4] == whole[4:]
    assert len(set(whole)) > 1
    assert generator().answer([], SHORT) == []


def test_pictures_are_paths_as_well(tmp_path):
    IMAGES[0].save(tmp_path / "a.png")
    paths = [question("<image>\nIt?", path) for path in (tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert generator().answer(paths, SHORT) == generator().answer([question("<image>\nIt?", IMAGES[0])], SHORT) * 2


@pytest.mark.parametrize("sampling", [SHORT, Sampling(temperature=1.0, seed=3, max_new_tokens=45)])
def test_streamed_pieces_make_the_answer(sampling):
    request = question("<image>\nWhat colour is it?", IMAGES[0])
    pieces = list(generator().stream(request, sampling))
    assert [*pieces] != [] and all(pieces)
    assert "".join(pieces) == generator().answer([request], sampling)[0]
    assert len(pieces) > 1


def test_logits_and_image_features_are_those_of_the_model():
    request = question("Between <image>\n and <image>?", *IMAGES[:2])
    prompt = generator().prompts.encode(request)
    pixels = np.concatenate([generator().prompts.read(image).tiles for image in request.images])
    model, length = build(CONFIG, params()), len(prompt.tokens)
    batch = {"tokens": prompt.tokens, "image_feature_index": prompt.image_feature_index, "images": pixels}
    batch |= {"positions": np.arange(length), "segment_ids": np.ones(length, np.int32)}
    hidden = model({name: jnp.asarray(value)[None] for name, value in batch.items()})
    np.testing.assert_allclose(generator().logits(request), model.llm.logits(hidden)[0], rtol=0, atol=1e-4)
    features = generator().encode_images(request.images)
    assert features.shape == (2, CONFIG.image_tokens, CONFIG.text.hidden_size)
    np.testing.assert_allclose(features, model.encode_images(jnp.asarray(pixels)), rtol=0, atol=1e-5)


def test_samples_are_a_function_of_request_and_seed():
    batch = [question("<image>\nWhat colour is it?", IMAGES[0]), question("Hello")]
    sampling = Sampling(temperature=1.5, seed=1, max_new_tokens=12)
    answers = generator().answer(batch, sampling)
    assert generator().answer(batch, sampling) == answers
    assert generator().answer(batch[1:], sampling) == answers[1:]
    assert generator().answer(batch, dataclasses.replace(sampling, seed=2)) != answers
    assert generator().answer(batch, dataclasses.replace(sampling, top_p=1e-6)) == generator().answer(
        batch, Sampling(max_new_tokens=12)
    )


def test_a_stop_string_ends_answers_wherever_tokens_end():
    request = question("<image>\nWhat colour is it?", IMAGES[0])
    answer = generator().answer([request], Sampling(max_new_tokens=40))[0]
    for start in (4, 9, 15):
        stop = answer[start : start + 5].strip()
        stopping = make(dataclasses.replace(TEMPLATE, end=stop))
        expected = answer[: answer.index(stop)].strip()
        assert stopping.answer([request], Sampling(max_new_tokens=40)) == [expected]
        assert "".join(stopping.stream(request, Sampling(max_new_tokens=40))) == expected


def test_end_tokens_end_rows_and_when_all_have_ended_the_device_stops():
    batch = [question("Hello"), question("Say something.")]
    ids = [torch_answer(request, 30) for request in batch]
    ends = [row[k] for row, k in zip(ids, (3, 6), strict=True)]
    ending = make(end_ids=ends)
    cut = [row[: min(row.index(end) for end in ends if end in row)] for row in ids]
    expected = [tokenizer().decode(row, skip_special_tokens=True).rstrip("\ufffd").strip() for row in cut]
    assert ending.answer(batch, Sampling(max_new_tokens=30)) == expected

    first, cache = ending._prefill([ending.prompts.encode(request) for request in batch], None, 64)
    positions = np.array([len(ending.prompts.encode(request).tokens) for request in batch], np.int32)
    slots = Slots(first, positions, np.full(2, 64))
    sampled, _ = ending.decoder.decode(slots=slots, stop_ids=np.array(ending.prompts.stop_ids), steps=30, cache=cache)
    written = np.asarray(sampled.tokens)
    steps = max(map(len, cut))  # the first token came before, the end token comes after
    assert (written[:, steps:] == -1).all()
    assert written[int(np.argmax([len(row) for row in cut])), steps - 1] in ends


def test_bfloat16_computes_and_answers():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    rough = Generator(build(CONFIG, half, jnp.bfloat16), PromptEncoder(CONFIG, tokenizer(), TEMPLATE))
    batch = [question("<image>\nIt?", IMAGES[0]), question("Hello")]
    assert all(rough.answer(batch, SHORT))


def test_a_checkpoint_brings_its_template_tokenizer_and_end_tokens(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    hf = {"generation_config": {"eos_token_id": [1, 300]}}
    description = Description(CONFIG, "plain", hf)
    tiny.save_model(tmp_path / "model", params(), description, str(tmp_path / "tokenizer"))
    loaded = Generator.from_checkpoint(open_checkpoint(tmp_path / "model"))
    assert loaded.prompts.template.name == "plain"
    assert {1, 300} <= set(loaded.prompts.stop_ids)
    request = question("<image>\nIt?", IMAGES[0])
    other = Generator.from_checkpoint(open_checkpoint(tmp_path / "model"), TEMPLATE)
    other.prompts.stop_ids = generator().prompts.stop_ids
    assert other.answer([request], SHORT) == generator().answer([request], SHORT)


def test_an_answer_that_may_not_fit_is_refused_and_one_that_just_fits_is_not():
    request = question("<image>\nHello", IMAGES[0])
    room = generator().room(request)
    length = CONFIG.text.max_position_embeddings - room
    for ask in (lambda s: generator().answer([request], s), lambda s: list(generator().stream(request, s))):
        with pytest.raises(UserError, match=f"Hello.*takes {length} positions .* up to {room + 1}, .* has 512"):
            ask(Sampling(max_new_tokens=room + 1))
    assert generator().answer([request], Sampling(max_new_tokens=room))
    long = question("word " * 600)
    assert generator().room(long) < 0
    with pytest.raises(UserError, match="shorten the conversation"):
        generator().answer([long], Sampling(max_new_tokens=1))


def test_pictures_and_marks_have_to_agree():
    for request in (question("<image>\nIt?"), question("It?", IMAGES[0])):
        with pytest.raises(UserError, match=r"'(<image> )?It\?': \d <image> in the text, but \d images"):
            generator().answer([request], SHORT)


@pytest.mark.parametrize("position", ["first", "as_is"])
def test_images_of_a_request_go_where_the_model_was_trained_with_them(position):
    text = " Look at <image>, then "
    sample = Sample("id", ("a.jpg",), (("user", text), ("assistant", "x")))
    trained = expand(encode_sample(sample, TEMPLATE, tokenizer(), image_position=position), CONFIG.image_tokens, 1000)
    prompts = PromptEncoder(dataclasses.replace(CONFIG, image_position=position), tokenizer(), TEMPLATE)
    prompt = prompts.encode(question(text, IMAGES[0]))
    length = len(prompt.tokens)
    assert prompt.tokens.tolist() == trained.tokens[:length].tolist()
    assert prompt.image_feature_index.tolist() == trained.image_feature_index[:length].tolist()


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_begun_answer_has_the_ids_of_the_text_whole(template, llama_tokenizer):
    template = get_template(template)
    turns, answer = [("user", "<image>\nHow many?"), ("assistant", "Two."), ("user", "Sure?")], "There are 12 of them"
    for begun in ("There", "There are ", "There are 12", "\nThere"):
        prompt = PromptEncoder(CONFIG, llama_tokenizer, template).encode(Request(turns, IMAGES[:1], begun))
        text, spans = render([*turns, ("assistant", "\n" * begun.startswith("\n") + answer)], template)
        stripped = begun.strip() if template.strip else begun
        whole = text[: text.index(stripped, spans[-1][0]) + len(stripped)].split("<image>")
        ids = [llama_tokenizer(part).input_ids[bool(i) :] for i, part in enumerate(whole)]
        assert prompt.tokens.tolist() == [*ids[0], *[0] * CONFIG.image_tokens, *ids[1]]


def test_an_empty_prompt_is_refused():
    bare = tiny.tokenizer()
    bare.backend_tokenizer.post_processor = None  # no BOS
    plain = Generator(build(CONFIG, params()), PromptEncoder(CONFIG, bare, get_template("plain")))
    with pytest.raises(UserError, match="template plain makes an empty prompt"):
        plain.answer([question("dropped by this template")], SHORT)


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}]
)
def test_meaningless_sampling_is_refused(values):
    with pytest.raises(UserError, match="it has to be"):
        Sampling(**values)
    with pytest.raises(UserError, match="max-new-tokens"):
        Sampling(max_new_tokens=0)
