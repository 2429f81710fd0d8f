"""The exported tokenizer: ids as ours, and tokens of its own for images and padding."""

import copy

import pytest
import tokenizers
import transformers
from conversion import byte_level

from llava_jax.cli import UserError
from llava_jax.convert.hf_tokenizer import ImageToken, SpecialTokens, choose_special_tokens, write_tokenizer
from llava_jax.data.tokenization import load_tokenizer

TEXTS = [
    "A chat. USER: What is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "<|im_start|>user\nHi there<|im_end|>\n",
    "  two spaces\n\n\ttab  ",
    "ünïcödé 🎉 中文 ÿ <0xFF>",
    "",
]


def written(tokenizer, special, directory):
    write_tokenizer(tokenizer, special, directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_a_tokenizer_with_both_tokens_stays_as_it_is(tmp_path):
    tokenizer = byte_level(specials=("<s>", "</s>", "<pad>", "<image>"))
    special = choose_special_tokens(tokenizer, len(tokenizer))
    assert special == SpecialTokens(ImageToken(3, "<image>"), "<pad>", {}, len(tokenizer))
    assert written(tokenizer, special, tmp_path).get_vocab() == tokenizer.get_vocab()


def test_the_id_of_the_source_is_kept():
    assert choose_special_tokens(byte_level(), 320, 310).image == ImageToken(310, "<image>")
    assert choose_special_tokens(byte_level(specials=("<s>", "[IMG]")), 320, 1).image == ImageToken(1, "[IMG]")
    without_such_a_row = choose_special_tokens(byte_level(), 320, 32000).image
    assert without_such_a_row == ImageToken(len(byte_level()), "<image>")
    with pytest.raises(UserError, match="image_token_index is 5, but its tokenizer gives <image> id 1"):
        choose_special_tokens(byte_level(specials=("<s>", "<image>")), 320, 5)


def test_rows_that_no_token_uses_come_first(tmp_path):
    tokenizer = byte_level()
    size = len(tokenizer)
    special = choose_special_tokens(tokenizer, size + 20)
    assert special == SpecialTokens(ImageToken(size, "<image>"), "<pad>", {"<image>": size}, size + 20)
    assert written(tokenizer, special, tmp_path).get_vocab() == tokenizer.get_vocab() | {"<image>": size}


def test_added_tokens_keep_their_ids_beside_a_new_one(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>"]})
    new = len(tokenizer) + 7
    special = choose_special_tokens(tokenizer, len(tokenizer) + 20, new)
    assert written(tokenizer, special, tmp_path).get_vocab() == tokenizer.get_vocab() | {"<image>": new}


def test_where_hugging_face_puts_them(llama_tokenizer, tmp_path):
    """In llava-hf/llava-1.5-7b-hf: after the 32,000 pieces, of 32,064 rows."""
    special = choose_special_tokens(llama_tokenizer, 32000)
    assert special == SpecialTokens(ImageToken(32000, "<image>"), "<pad>", {"<image>": 32000, "<pad>": 32001}, 32064)
    again = written(llama_tokenizer, special, tmp_path)
    assert (again.pad_token, again.pad_token_id) == ("<pad>", 32001)
    assert again.convert_tokens_to_ids("<image>") == 32000


def test_padding_by_the_unknown_token_is_none(llama_tokenizer):
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.pad_token = tokenizer.unk_token
    assert choose_special_tokens(tokenizer, 32000).added["<pad>"] == 32001
    tokenizer.pad_token = tokenizer.eos_token
    assert choose_special_tokens(tokenizer, 32000).pad == tokenizer.eos_token


@pytest.mark.parametrize("free_rows", [0, 5])
def test_real_tokenizers(tokenizer, free_rows, tmp_path):
    special = choose_special_tokens(tokenizer, len(tokenizer) + free_rows)
    assert special.rows == len(tokenizer) + (free_rows or 64)
    again = written(tokenizer, special, tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() | special.added
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again("<image>", add_special_tokens=False)["input_ids"] == [special.image.id]
    assert again.decode([special.image.id], skip_special_tokens=True) == ""
    for kind in ("bos", "eos", "unk"):
        assert getattr(again, f"{kind}_token_id") == getattr(tokenizer, f"{kind}_token_id")
    assert again.pad_token == special.pad


def test_llama_with_and_without_legacy(llama_dir, tmp_path):
    tokenizer = load_tokenizer(llama_dir)
    again = written(tokenizer, choose_special_tokens(tokenizer, 32000), tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    reloaded = load_tokenizer(tmp_path)
    assert reloaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("question", ["What is it?", " spaces ", "", "\n\nnew lines"])
def test_byte_level_ids_around_an_image_are_those_of_the_chunks(question, smollm2_tokenizer, tmp_path):
    special = choose_special_tokens(smollm2_tokenizer, len(smollm2_tokenizer))
    again = written(smollm2_tokenizer, special, tmp_path)
    before, after = f"<|im_start|>user\n{question}", f"\n{question}<|im_end|>\n"
    chunks = smollm2_tokenizer([before, after])["input_ids"]
    assert again(f"{before}<image><image>{after}")["input_ids"] == chunks[0] + [special.image.id] * 2 + chunks[1]


def test_a_token_beyond_the_rows_of_the_model_gets_one():
    tokenizer = byte_level(specials=[*map(str, range(200)), "<pad>", "<image>"], vocab_size=500)
    special = choose_special_tokens(tokenizer, 100)
    assert special == SpecialTokens(ImageToken(201, "<image>"), "<pad>", {}, 256)


def test_a_tokenizer_that_takes_no_tokens_is_refused(tmp_path):
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("cat", -1.0)], unk_id=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")
    with pytest.raises(UserError, match="cannot be added to a Unigram tokenizer"):
        write_tokenizer(tokenizer, choose_special_tokens(tokenizer, 2), tmp_path)
