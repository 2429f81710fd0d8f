"""Ids and masks against plain readings of the published algorithm, on two real tokenizers and wild text."""

import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from qwen3 import qwen3_tokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer

from llava_jax.cli import UserError
from llava_jax.data.conversation import render
from llava_jax.data.sources import Sample
from llava_jax.data.template_fit import require_fit
from llava_jax.data.templates import TEMPLATES, get_template, with_im_start_end
from llava_jax.data.tokenization import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Encoded,
    encode_sample,
    encode_turns,
    expand,
    load_tokenizer,
)

V1 = get_template("v1")
QUESTION, ANSWER = ("user", "<image>\nWhat is it?"), ("assistant", "A cat.")
TURNS = (QUESTION, ANSWER, ("user", "What colour?"), ("assistant", "Black, I think"))

TEMPTING = ["</s>", "<s>", "###", "### Assistant:", "USER:", " ASSISTANT: ", "<|im_end|>", "[/INST]", "<unk>", "hello"]
TEMPTING += ["", "\n", "\n\n", " ", "  ", "\t", "é", "e\u0301", "日本", "🧑‍🚀", "\u200b", "▁", "Ġ", "\u0000", "ﬁ"]
wild = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.lists(
    st.sampled_from(TEMPTING), max_size=8
).map("".join)
rounds = st.lists(st.tuples(wild, wild), min_size=1, max_size=3)


def as_turns(pairs, images):
    """Turns with a system prompt of their own, and the images all over the first question."""
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    turns[0] = ("user", "<image>".join([turns[0][1], *["x"] * (images - 1), ""]) if images else turns[0][1])
    return [("system", "Be brief."), *turns]


def published_ids(prompt, tokenizer):
    """The published `tokenizer_image_token`: -200 between chunks, and BOS before the first alone."""
    ids, *others = (tokenizer(chunk).input_ids for chunk in prompt.split("<image>"))
    for chunk in others:
        ids = [*ids, IMAGE_TOKEN_INDEX, *(chunk[1:] if tokenizer.add_bos_token else chunk)]
    return ids


def published_v1_labels(prompt, tokenizer):
    """The published mask of v1, from lengths: right where the answers are plain and the tokenizer is known."""
    ids = published_ids(prompt, tokenizer)
    labels, done = [IGNORE_INDEX], 1
    for i, text in enumerate(prompt.split("</s>")[:-1]):
        instruction = text.partition("ASSISTANT: ")[0] + "ASSISTANT: "
        extra = int(i > 0 and not tokenizer.legacy)  # `▁`, which `USER` has only where it begins a text
        masked = len(published_ids(instruction, tokenizer)) - 2 - extra
        length = len(published_ids(text, tokenizer)) - extra
        labels += [IGNORE_INDEX] * masked + ids[done + masked : done + length]
        done += length
    return labels


def mask_by_characters(turns, template, tokenizer):
    """Which tokens are learned by the plainest means: a set of positions for the answers, one for each token."""
    text, spans = render(turns, template)
    wanted = {position for start, end in spans for position in range(start, end)}
    mask, start = [], 0
    for i, chunk in enumerate(text.split("<image>")):
        tokens = tokenizer(chunk, return_offsets_mapping=True)
        of_chunk = [bool(wanted & set(range(start + a, start + b))) for a, b in tokens.offset_mapping]
        mask += [False, *of_chunk[bool(tokenizer.add_bos_token) :]] if i else of_chunk
        start += len(chunk) + len("<image>")
    return mask


def learned_text(encoded, tokenizer):
    """The text of every run of learned tokens."""
    runs = np.split(encoded.labels, np.flatnonzero(np.diff(encoded.labels != IGNORE_INDEX)) + 1)
    return [tokenizer.decode(run) for run in runs if run[0] != IGNORE_INDEX]


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=rounds, images=st.integers(0, 2))
def test_ids_and_labels_of_wild_text(tokenizer, name, pairs, images):
    template = get_template(name)
    turns = as_turns(pairs[:1] if template.captions else pairs, images)
    if not template.lead:  # where an answer begins with white space, see the next tests
        turns = [(role, text.lstrip() if role == "assistant" else text) for role, text in turns]
    encoded = encode_turns(turns, template, tokenizer)
    assert encoded.input_ids.tolist() == published_ids(render(turns, template).text, tokenizer)
    learned = encoded.labels != IGNORE_INDEX
    assert learned.tolist() == mask_by_characters(turns, template, tokenizer)
    np.testing.assert_array_equal(encoded.labels[learned], encoded.input_ids[learned])
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32


@pytest.mark.parametrize("name", TEMPLATES)
@given(pairs=rounds, images=st.integers(0, 2))
@example(pairs=[("How many?", "2")], images=1)
@example(pairs=[("How many?", "\n\n2"), ("Sure?", "\n \nyes"), ("q", "  x"), ("q", "\u0301x")], images=2)
def test_every_answer_continues_its_prompt(tokenizer, name, pairs, images):
    """Ids of a prompt and labels of its answer are the ids of the training text, for every answer of a conversation."""
    template = get_template(name)
    turns = as_turns(pairs[:1] if template.captions else pairs, images)  # an image has one caption
    if unfit(template, tokenizer):
        return
    encoded = encode_turns(turns, template, tokenizer)
    learned = encoded.labels != IGNORE_INDEX
    for i, (role, answer) in enumerate(turns):
        if role == "assistant":
            prompt = encode_turns([*turns[:i], ("assistant", None)], template, tokenizer).input_ids
            np.testing.assert_array_equal(encoded.input_ids[: len(prompt)], prompt)
            assert learned[len(prompt)] and not learned[: len(prompt)][-1:].any(), (name, answer)


def unfit(template, tokenizer):
    try:
        require_fit(template, tokenizer)
    except UserError:
        return True
    return False


def test_the_space_before_an_answer_is_learned_where_it_is_a_token(llama_dir):
    """As the published code has it (mix665k, v1): `▁` alone before a digit, which generation has to give first."""
    tokenizer = load_tokenizer(llama_dir)
    turns = (("user", "<image>\nHow many?"), ("assistant", "2"))
    space, digit = tokenizer.convert_tokens_to_ids(["▁", "2"])
    for name in ("v1", "v1_mmtag", "llava_llama_2", "mistral_instruct"):
        encoded = encode_turns(turns, get_template(name), tokenizer)
        end = [space, 2] if get_template(name).end != "</s>" else [2]
        assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == [space, digit, *end], name


NUMBERS = [
    ("user", "<image>\nHow many?"),
    ("assistant", "2"),
    ("user", "Where?"),
    ("assistant", "日本"),
    ("user", "Sure?"),
]
NUMBERS += [("assistant", "3  cats"), ("user", "  How?"), ("assistant", "  x\n")]


@pytest.mark.parametrize(
    "turns", [TURNS, TURNS[:2], NUMBERS, [("user", "hi"), ("assistant", "It is 日本 🧑‍🚀\n- a\n- b")] * 3]
)
def test_v1_equals_the_published_code(llama_dir, turns):
    tokenizer = load_tokenizer(llama_dir)
    encoded = encode_turns(turns, V1, tokenizer)
    prompt = render(turns, V1).text
    assert encoded.input_ids.tolist() == published_ids(prompt, tokenizer)
    assert encoded.labels.tolist() == published_v1_labels(prompt, tokenizer)


class PublishedTokenizer:
    """LLaMA's slow tokenizer of transformers 4.37, which published checkpoints were trained with, on SentencePiece."""

    add_bos_token = True

    def __init__(self, directory, legacy):
        self.pieces, self.legacy = SentencePieceProcessor(model_file=str(directory / "tokenizer.model")), legacy
        self.unknown = len(self.pieces.encode("<unk>"))

    def __call__(self, text):
        parts = re.split("(<s>|</s>|<unk>)", text if self.legacy else text and "▁" + text.replace("▁", " "))
        ids = [1]
        for i, part in enumerate(parts):
            if part in ("<unk>", "<s>", "</s>"):
                ids.append(("<unk>", "<s>", "</s>").index(part))
            elif part and (self.legacy or not (i or part[0] in "▁ ")):
                ids += self.pieces.encode(part)
            elif part:  # without a space in front of it
                ids += self.pieces.encode("<unk>" + part)[self.unknown :]
        return SimpleNamespace(input_ids=ids)


WORDS = [
    "the",
    "cat",
    "Hello",
    "World",
    "def f():",
    "return",
    "1",
    "23",
    "yes",
    "日本",
    "été",
    "①",
    "x=1",
    ".",
    "!",
    "“q”",
]
WORDS += ["🧑‍🚀", "--", "##", "$5", "<b>b</b>", "", "\t"]
sentences = st.lists(st.sampled_from([*WORDS, "\n", "\n\n    if"]), min_size=1, max_size=9).map(" ".join)


@functools.cache
def both(llama_dir):
    tokenizer = load_tokenizer(llama_dir)
    return tokenizer, PublishedTokenizer(llama_dir, tokenizer.legacy)


@given(pairs=st.lists(st.tuples(sentences, sentences), min_size=1, max_size=4), image=st.booleans())
def test_ids_and_labels_equal_the_published_code_with_its_own_tokenizer(llama_dir, pairs, image):
    ours, theirs = both(llama_dir)
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    turns[0] = ("user", "<image>\n" * image + turns[0][1].strip())
    encoded, prompt = encode_turns(turns, V1, ours), render(turns, V1).text
    assert encoded.input_ids.tolist() == published_ids(prompt, theirs)
    assert encoded.labels.tolist() == published_v1_labels(prompt, theirs)


@pytest.mark.parametrize(
    ("model", "name", "end"),
    [
        ("llama", "v0", "\n###"),
        ("llama", "v1", "</s>"),
        ("llama", "llava_llama_2", " </s>"),
        ("smollm2", "v0", "\n###"),
        ("smollm2", "v1", "</s>"),
        ("smollm2", "mpt", "<|im_end|>"),
        ("smollm2", "chatml", "<|im_end|>"),
    ],
)
def test_learned_text(request, model, name, end):
    tokenizer = request.getfixturevalue(f"{model}_tokenizer")
    encoded = encode_turns(TURNS, get_template(name), tokenizer)
    assert [text.strip(" ") for text in learned_text(encoded, tokenizer)] == ["A cat." + end, "Black, I think" + end]


def test_plain_is_bos_image_caption(llama_tokenizer):
    encoded = encode_turns((QUESTION, ("assistant", "a cat")), get_template("plain"), llama_tokenizer)
    caption = llama_tokenizer("a cat\n").input_ids[1:]
    assert encoded.input_ids.tolist() == [1, IMAGE_TOKEN_INDEX, *caption]
    assert encoded.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, *caption]


def test_text_after_an_image_begins_as_a_text_of_its_own(llama_tokenizer):
    ids = encode_turns(TURNS, V1, llama_tokenizer).input_ids.tolist()
    after = ids.index(IMAGE_TOKEN_INDEX) + 1
    assert llama_tokenizer.convert_ids_to_tokens(ids[after : after + 3]) == ["▁", "<0x0A>", "What"]


def test_a_token_of_a_text_that_looks_like_bos_stays(smollm2_tokenizer):
    """SmolLM2's BOS is ChatML's `<|im_start|>`, which it never adds itself; the published code drops it then."""
    turns = [("user", "<image><|im_start|>hi<image>there")]
    ids = encode_turns(turns, get_template("chatml"), smollm2_tokenizer).input_ids.tolist()
    text = smollm2_tokenizer.decode([token for token in ids if token != IMAGE_TOKEN_INDEX])
    assert text.endswith("<|im_start|>user\n<|im_start|>hithere<|im_end|>\n")


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chatml_equals_smollm2s_own_chat_template(smollm2_tokenizer, opened, system):
    turns = [("system", system)] * (system is not None) + [("user", " What is it? "), ("assistant", "A cat.\n")]
    messages = [{"role": role, "content": text} for role, text in turns]
    if opened:
        turns.append(("user", "Sure?"))
        messages.append({"role": "user", "content": "Sure?"})
        turns.append(("assistant", None))
    reference = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=opened, return_dict=False)
    assert encode_turns(turns, get_template("chatml"), smollm2_tokenizer).input_ids.tolist() == reference


QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_5 = QWEN2.replace("a helpful", "Qwen, created by Alibaba Cloud. You are a helpful").replace("\n", "\\n")
NO_DEFAULT = QWEN2.replace("loop.first and", "false and")


@pytest.mark.parametrize("chat_template", [QWEN2, QWEN2_5, NO_DEFAULT.replace("You are a helpful assistant.", "")])
def test_chatml_has_the_system_prompt_of_the_tokenizers_chat_template(smollm2_dir, chat_template):
    tokenizer = load_tokenizer(smollm2_dir)
    tokenizer.chat_template = chat_template
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    turns = [(message["role"], message["content"]) for message in messages]
    reference = tokenizer.apply_chat_template(messages, return_dict=False)
    assert encode_turns(turns, get_template("chatml"), tokenizer).input_ids.tolist() == reference


def test_qwen3_learns_answers_after_the_prompt_of_its_chat_template(smollm2_dir):
    tokenizer = qwen3_tokenizer(smollm2_dir)
    rounds = [("What is it?", "A cat."), ("Sure?", "Yes.")]
    turns = [turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))]
    messages = [{"role": role, "content": text} for role, text in turns]
    template = get_template("qwen3")
    ids, labels = encode_sample(Sample("7", (), tuple(turns)), template, tokenizer)
    for asked, answer in ((1, "A cat."), (3, "Yes.")):
        prompt = encode_turns([*turns[:asked], ("assistant", None)], template, tokenizer).input_ids.tolist()
        if asked == 1:  # before later answers, the official prompt lacks the blocks of the earlier ones
            assert prompt == tokenizer.apply_chat_template(
                messages[:1], add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
        block = tokenizer.convert_ids_to_tokens(prompt[-4:])
        assert block == ["<think>", "ĊĊ", "</think>", "ĊĊ"]
        target = tokenizer.encode(f"{answer}<|im_end|>")
        assert ids[: len(prompt)].tolist() == prompt
        assert labels[len(prompt) - 4 :][: 4 + len(target)].tolist() == [IGNORE_INDEX] * 4 + target
    assert learned_text(Encoded(ids, labels), tokenizer) == ["A cat.<|im_end|>", "Yes.<|im_end|>"]
    official = tokenizer.apply_chat_template(messages[:2], return_dict=False)  # of one round: the same text
    assert encode_turns(turns[:2], template, tokenizer).input_ids.tolist() == official

    thinks = Sample("8", (), (turns[0], ("assistant", "<think>Hm</think>A cat.")))
    with pytest.raises(UserError, match="^sample 8: an answer has <think>"):
        encode_sample(thinks, template, tokenizer)


def test_offsets_without_white_space(smollm2_dir):
    """RoBERTa's kind of tokenizer trims its offsets, to nothing where a token is a space."""
    tokenizer = load_tokenizer(smollm2_dir)
    turns = (QUESTION, ("assistant", " A  cat \n on  a    mat "), ("user", " and\n \n"), ("assistant", ""))
    expected = encode_turns(turns, V1, tokenizer)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert tokenizer("a  b", return_offsets_mapping=True).offset_mapping[1] == (2, 2)
    np.testing.assert_array_equal(encode_turns(turns, V1, tokenizer).labels, expected.labels)


def test_image_position_is_applied(llama_tokenizer):
    sample = Sample("7", ("a.jpg",), (("user", "What is it?\n<image>"), ANSWER))
    first = encode_sample(sample, V1, llama_tokenizer).input_ids.tolist()
    as_is = encode_sample(sample, V1, llama_tokenizer, image_position="as_is").input_ids.tolist()
    random = [
        encode_sample(sample, V1, llama_tokenizer, image_position="random", seed=seed).input_ids.tolist()
        for seed in range(8)
    ]
    assert first == encode_turns((QUESTION, ANSWER), V1, llama_tokenizer).input_ids.tolist()
    assert first != as_is and all(ids in (first, as_is) for ids in random)
    assert first in random and as_is in random


def test_nothing_to_learn_is_an_error_with_the_id(tokenizer):
    for turns in ((QUESTION,), ()):
        with pytest.raises(UserError, match="sample 42: nothing to learn"):
            encode_sample(Sample("42", ("a.jpg",), turns), V1, tokenizer)
    encoded = encode_sample(Sample("42", ("a.jpg",), (QUESTION, ("assistant", ""))), V1, tokenizer)
    assert [text.strip() for text in learned_text(encoded, tokenizer)] == ["</s>"]


def test_im_start_end(bare_llama_dir):
    tokenizer = load_tokenizer(bare_llama_dir)
    with pytest.raises(UserError, match="lacks: <im_start>, <im_end>"):
        encode_turns(TURNS, with_im_start_end(V1, True), tokenizer)
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    encoded = encode_turns(TURNS, with_im_start_end(V1, True), tokenizer)
    image = encoded.input_ids.tolist().index(IMAGE_TOKEN_INDEX)
    assert encoded.input_ids[image - 1 : image + 2].tolist() == [32000, IMAGE_TOKEN_INDEX, 32001]
    assert set(encoded.labels[image - 1 : image + 2]) == {IGNORE_INDEX}


def test_a_bare_sentencepiece_model_keeps_bos(bare_llama_dir, tmp_path):
    assert load_tokenizer(bare_llama_dir)("hi there").input_ids == [1, 12014, 736]
    shutil.copy(bare_llama_dir / "tokenizer.model", tmp_path)
    for config, ids in (({}, [1, 12014]), ({"add_bos_token": False}, [12014])):
        config = {"tokenizer_class": "LlamaTokenizer", **config}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path)("hi").input_ids == ids


def test_a_tokenizer_saved_again_is_the_same(llama_dir, smollm2_dir, tmp_path):
    text = "hi</s>USER:\n <s>x\n\n  日本"
    for directory in (llama_dir, smollm2_dir):
        tokenizer = load_tokenizer(directory)
        tokenizer.save_pretrained(tmp_path / directory.name)
        for again in (load_tokenizer, AutoTokenizer.from_pretrained):
            assert again(tmp_path / directory.name)(text).input_ids == tokenizer(text).input_ids


def test_a_tokenizer_that_ends_every_text_is_an_error(bare_llama_dir, tmp_path):
    shutil.copy(bare_llama_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_eos_token": true}')
    with pytest.raises(UserError, match="adds </s> to every text, .* set add_eos_token to false"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer directory"):
        load_tokenizer(tmp_path / "lmsys")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for name, fault in {"tokenizer.model": "holds no tokenizer", "tokenizer.json": "json: is no JSON"}.items():
        (tmp_path / name).write_bytes(b"broken")
        with pytest.raises(UserError, match=fault):
            load_tokenizer(tmp_path)


@given(
    ids=st.lists(st.sampled_from([5, 6, IMAGE_TOKEN_INDEX]), max_size=12),
    image_tokens=st.integers(1, 5),
    max_length=st.integers(0, 30),
)
def test_expand(ids, image_tokens, max_length):
    ids = np.array(ids, np.int32)
    encoded = Encoded(ids, np.where(ids == 6, ids, IGNORE_INDEX).astype(np.int32))
    expected = []  # (token, label, feature) of every position
    images = 0
    for token in ids.tolist():
        item = [(token, 6 if token == 6 else IGNORE_INDEX, -1)]
        if token == IMAGE_TOKEN_INDEX:
            item = [(0, IGNORE_INDEX, images * image_tokens + patch) for patch in range(image_tokens)]
        if len(expected) + len(item) > max_length:
            break
        expected += item
        images += token == IMAGE_TOKEN_INDEX
    row = expand(encoded, image_tokens, max_length)
    assert list(zip(row.tokens, row.labels, row.image_feature_index, strict=True)) == expected
    assert row.num_images == images
    assert {array.dtype for array in row[:3]} == {np.dtype(np.int32)}
