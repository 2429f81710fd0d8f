"""Fast tokenizers against SentencePiece itself, on the 32,000 pieces of Mistral 7B."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from llava_jax.cli import UserError
from llava_jax.convert.hf_tokenizer import choose_special_tokens, write_tokenizer
from llava_jax.data.tokenization import load_tokenizer

SPACES = [
    " ",
    "  ",
    "   ",
    "    ",
    "     ",
    "        ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u2581",
    "\u200b",
]
WORDS = ["Hello", "World", "def f():", "if x", "return", "1", "23", "é", "e\u0301", "日本", "🧑‍🚀", ".", "://", "\x00"]
wild = st.lists(st.sampled_from(SPACES + WORDS), max_size=12).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)


@pytest.fixture(scope="module")
def processor(bare_llama_dir) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(bare_llama_dir / "tokenizer.model"))


@pytest.fixture(scope="module")
def exported(llama_tokenizer, tmp_path_factory):
    """The tokenizer of an export, as transformers alone loads it."""
    directory = tmp_path_factory.mktemp("exported")
    write_tokenizer(llama_tokenizer, choose_special_tokens(llama_tokenizer, 32000), directory)
    return AutoTokenizer.from_pretrained(directory)


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=500)
@given(text=wild.filter(lambda text: "<" not in text))  # marks of special tokens are no text to a fast tokenizer
def test_ids_are_sentencepieces_own(llama_tokenizer, exported, processor, text):
    ids = processor.encode(text)
    assert ids_of(llama_tokenizer, text) == ids
    assert ids_of(exported, text) == ids


def test_two_spaces_are_two_tokens(llama_dir):
    """Where transformers 5 alone makes one of them."""
    tokens = load_tokenizer(llama_dir).tokenize("Hello  World")
    assert tokens == ["▁Hello", "▁", "▁World"]
    assert LlamaTokenizer.from_pretrained(llama_dir).tokenize("Hello  World") != tokens


def test_a_model_decides_over_the_tokenizer_json_made_of_it(llama_dir, processor, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "saved")
    LlamaTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path / "saved")  # the wrong merges
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    assert ids_of(load_tokenizer(tmp_path / "saved"), "  Hello  World") == processor.encode("  Hello  World")


def test_a_text_that_begins_with_a_space_gets_another(llama_dir, processor, tmp_path):
    """As the text after an image does, `<image> ASSISTANT:`; transformers 5 adds none, also by a tokenizer.json."""
    tokenizer = load_tokenizer(llama_dir)
    tokenizer.save_pretrained(tmp_path)
    assert ids_of(LlamaTokenizer.from_pretrained(tmp_path), " ASSISTANT:") != processor.encode(" ASSISTANT:")
    for each in (tokenizer, load_tokenizer(tmp_path)):
        assert ids_of(each, " ASSISTANT:") == processor.encode(" ASSISTANT:")


def test_wrong_merges_without_the_model_are_told(llama_dir, tmp_path, capsys):
    LlamaTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    load_tokenizer(tmp_path)
    assert f"warning: {tmp_path / 'tokenizer.json'}: " in (told := capsys.readouterr().err)
    assert "tokenizer.model" in told and len(told.splitlines()) == 1
    load_tokenizer(llama_dir)
    assert not capsys.readouterr().err


def test_special_tokens_and_legacy_stay(llama_dir):
    tokenizer = load_tokenizer(llama_dir)
    tokens = tokenizer.tokenize("a</s>USER")
    assert tokens[:2] == ["▁a", "</s>"] and tokens[2].startswith("▁") == tokenizer.legacy
    assert tokenizer.decode(ids_of(tokenizer, "  a  b")) == "  a  b"


def test_a_tokenizer_json_says_whether_it_is_legacy_where_its_configuration_does_not(llama_dir, tmp_path):
    """As transformers 4 saved it, which reads it as it is; 5 builds it anew."""
    legacy = load_tokenizer(llama_dir).legacy
    values = json.loads(load_tokenizer(llama_dir).backend_tokenizer.to_str())
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    values |= {"normalizer": prepend if legacy else None, "pre_tokenizer": None if legacy else first}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    text = "a</s>USER:  2"
    assert tokenizer.legacy is legacy and ids_of(tokenizer, text) == ids_of(load_tokenizer(llama_dir), text)


@pytest.mark.parametrize(
    ("kind", "rule", "told"), [("unigram", "identity", "of type unigram"), ("bpe", "nmt_nfkc", "normalizes")]
)
def test_models_of_another_kind_are_refused(tmp_path, kind, rule, told):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name=rule,
        hard_vocab_limit=False,
    )
    with pytest.raises(UserError, match=f"tokenizer.model: .*{told}"):
        load_tokenizer(tmp_path)


def test_an_unrelated_model_beside_a_tokenizer_json_is_left_alone(smollm2_dir, bare_llama_dir, tmp_path):
    directory = shutil.copytree(smollm2_dir, tmp_path / "mixed")
    shutil.copy(bare_llama_dir / "tokenizer.model", directory)
    assert ids_of(load_tokenizer(directory), "Hello  World") == ids_of(load_tokenizer(smollm2_dir), "Hello  World")


def test_an_exports_tokenizer_json_is_read_alike_by_the_tokenizers_library(exported, processor):
    values = json.loads(exported.backend_tokenizer.to_str())
    again = PreTrainedTokenizerFast(tokenizer_object=type(exported.backend_tokenizer).from_str(json.dumps(values)))
    assert ids_of(again, "  x\n    y  z") == processor.encode("  x\n    y  z")
