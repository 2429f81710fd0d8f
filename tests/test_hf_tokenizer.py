"""The exported tokenizer: ids as ours, and one for images that needs no new row."""

import pytest
import tokenizers
import transformers

from llava_jax.cli import UserError
from llava_jax.convert.hf_tokenizer import ImageToken, choose_image_token, write_tokenizer
from llava_jax.data.tokenization import load_tokenizer

TEXTS = [
    "A chat. USER: What is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "<|im_start|>user\nHi there<|im_end|>\n",
    "  two spaces\n\n\ttab  ",
    "ünïcödé 🎉 中文 ÿ <0xFF>",
    "",
]


def byte_level(specials=("<s>", "</s>", "<pad>"), vocab_size=300):
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
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def words():
    """A tokenizer without bytes."""
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>", eos_token="</s>"
    )


def written(tokenizer, image, directory):
    write_tokenizer(tokenizer, image, directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_a_tokenizer_with_an_image_token_stays_as_it_is(tmp_path):
    tokenizer = byte_level(specials=("<s>", "</s>", "<pad>", "<image>"))
    image = choose_image_token(tokenizer, len(tokenizer))
    assert image == ImageToken(3, "<image>")
    assert written(tokenizer, image, tmp_path).get_vocab() == tokenizer.get_vocab()


def test_the_id_of_the_source_is_kept():
    assert choose_image_token(byte_level(), 320, 310) == ImageToken(310, "<image>")
    assert choose_image_token(byte_level(specials=("<s>", "[IMG]")), 320, 1) == ImageToken(1, "[IMG]")
    assert choose_image_token(byte_level(), 320, 32000) == ImageToken(
        len(byte_level()), "<image>"
    )  # there is no such row
    with pytest.raises(UserError, match="image_token_index is 5, but its tokenizer gives <image> id 1"):
        choose_image_token(byte_level(specials=("<s>", "<image>")), 320, 5)


def test_a_row_that_no_token_uses_comes_first(tmp_path):
    tokenizer = byte_level()
    image = choose_image_token(tokenizer, len(tokenizer) + 20)
    assert image == ImageToken(len(tokenizer), "<image>")
    assert written(tokenizer, image, tmp_path).get_vocab() == tokenizer.get_vocab() | {"<image>": image.id}


def test_added_tokens_keep_their_ids_beside_a_new_one(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "<y>"]})
    image = ImageToken(len(tokenizer) + 7, "<image>")
    assert written(tokenizer, image, tmp_path).get_vocab() == tokenizer.get_vocab() | {"<image>": image.id}


@pytest.mark.parametrize("free_rows", [0, 5])
def test_real_tokenizers(tokenizer, free_rows, tmp_path):
    """Full vocabularies give the row of a byte that no text contains (LLaMA) or of an idle special token (SmolLM2)."""
    rows = len(tokenizer) + free_rows
    image = choose_image_token(tokenizer, rows)
    assert image.id < rows
    again = written(tokenizer, image, tmp_path)
    assert len(again) == len(tokenizer) + (free_rows > 0)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert image.id not in tokenizer(text)["input_ids"]
    assert again("<image>", add_special_tokens=False)["input_ids"] == [image.id]
    assert again.decode([image.id], skip_special_tokens=True) == ""
    for kind in ("bos", "eos", "unk", "pad"):
        assert getattr(again, f"{kind}_token_id") == getattr(tokenizer, f"{kind}_token_id")


def test_special_tokens_in_use_stay(smollm2_tokenizer):
    """Those of the tokenizer's chat template and of ours."""
    rows = len(smollm2_tokenizer)
    assert choose_image_token(smollm2_tokenizer, rows).replaces == "<empty_output>"
    assert choose_image_token(smollm2_tokenizer, rows, in_use="a<empty_output>b").replaces == "<jupyter_script>"
    everything = "".join(set(smollm2_tokenizer.get_added_vocab()) - {"<|im_start|>", "<|im_end|>", "<|endoftext|>"})
    with pytest.raises(UserError, match="none of the model's 49152 is free"):
        choose_image_token(smollm2_tokenizer, rows, in_use=everything)


def test_llama_with_and_without_legacy(llama_dir, tmp_path):
    tokenizer = load_tokenizer(llama_dir)
    again = written(tokenizer, choose_image_token(tokenizer, 32000), tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    reloaded = load_tokenizer(tmp_path)
    assert reloaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("question", ["What is it?", " spaces ", "", "\n\nnew lines"])
def test_byte_level_ids_around_an_image_are_those_of_the_chunks(question, smollm2_tokenizer, tmp_path):
    image = choose_image_token(smollm2_tokenizer, len(smollm2_tokenizer))
    again = written(smollm2_tokenizer, image, tmp_path)
    before, after = f"<|im_start|>user\n{question}", f"\n{question}<|im_end|>\n"
    chunks = smollm2_tokenizer([before, after])["input_ids"]
    assert again(f"{before}<image><image>{after}")["input_ids"] == chunks[0] + [image.id] * 2 + chunks[1]


def test_no_row_to_be_had_is_an_error():
    with pytest.raises(UserError, match="none of the model's 3 is free"):
        choose_image_token(words(), 3)
    assert choose_image_token(words(), 4) == ImageToken(3, "<image>")
    with pytest.raises(UserError, match="none of the model's 100 is free"):  # its own <image> is beyond the rows
        choose_image_token(byte_level(specials=[*map(str, range(200)), "<image>"], vocab_size=500), 100)
