"""Which templates fit which tokenizers, on SentencePiece and byte-level BPE."""

import json

import pytest
from qwen3 import CHAT_TEMPLATE_2507, qwen3_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from llava_jax.cli import UserError
from llava_jax.convert.chat_template import chat_template
from llava_jax.data import chat_template as rendering
from llava_jax.data.template_fit import missing_marks, require_fit, template_of
from llava_jax.data.templates import TEMPLATES, get_template
from llava_jax.data.tokenization import load_tokenizer

SENTENCEPIECE = ("v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct", "zephyr")
CHATML = ("mpt", "chatml_direct", "chatml")
PLAIN = ("v0", "llava_v0", "v0_mmtag", "plain")


@pytest.fixture(autouse=True)
def rendered_here(monkeypatch):
    """Chat templates are rendered without a process for each, whose bounds test_tokenizer_files.py tests."""

    def rendered(request: str) -> tuple[str | None, ...]:
        values = json.loads(request)
        return tuple(rendering._text(chat, values, render_jinja_template) for chat in values["chats"])

    monkeypatch.setattr(rendering, "_rendered", rendered)


def test_templates_whose_marks_are_tokens(llama_tokenizer, smollm2_tokenizer):
    def without_problem(tokenizer):
        return {name for name, template in TEMPLATES.items() if missing_marks(template, tokenizer) is None}

    assert without_problem(llama_tokenizer) == {*SENTENCEPIECE, *PLAIN}
    assert without_problem(smollm2_tokenizer) == {*CHATML, *PLAIN}


def test_missing_marks_are_named_with_a_template_that_fits(llama_tokenizer, smollm2_tokenizer):
    told = missing_marks(get_template("v1"), smollm2_tokenizer)
    assert told == (
        "template v1 does not fit the tokenizer: </s> is 3 tokens ['</', 's', '>'], so an exported model does not stop "
        "after an answer; choose template chatml, which its own chat template is"
    )
    told = missing_marks(get_template("chatml"), llama_tokenizer)
    assert "<|im_start|> is 7 tokens" in told and "<|im_end|> is 7 tokens" in told
    assert "choose a template whose marks it has (v1, " in told


def test_prompts_that_training_texts_do_not_begin_with(llama_tokenizer, smollm2_tokenizer):
    """GPT-2's pattern takes two line breaks apart where a word follows."""
    for name, template in TEMPLATES.items():
        require_fit(template, llama_tokenizer)
        if name not in ("llama_3", "qwen3"):
            require_fit(template, smollm2_tokenizer)
    with pytest.raises(
        UserError, match=r"template llama_3 .* ends with \['ĊĊ'\], where .* 'A cat.' has \['Ċ', 'Ċ', 'A'\]"
    ):
        require_fit(get_template("llama_3"), smollm2_tokenizer)


def test_a_tokenizer_that_joins_prompt_and_answer(llama_dir):
    """SentencePiece models whose pieces cross words: `:▁` is one here, and no prompt that ends with `:` goes on."""
    tokenizer = load_tokenizer(llama_dir)
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"][":▁"] = 32000
    values["model"]["merges"].insert(0, [":", "▁"])
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(values))
    with pytest.raises(UserError, match="template v1: the tokenizer joins the end of the prompt"):
        require_fit(get_template("v1"), tokenizer)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("llava_v0", "plain")])
def test_the_template_of_a_chat_template(smollm2_dir, name):
    tokenizer = load_tokenizer(smollm2_dir)
    template = get_template(name)
    tokenizer.chat_template = chat_template(template, template.system or "")
    assert template_of(tokenizer).name == name
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert template_of(tokenizer).name == name


def test_qwen3s_chat_templates(smollm2_dir):
    tokenizer = qwen3_tokenizer(smollm2_dir)
    assert template_of(tokenizer).name == "qwen3" and missing_marks(get_template("qwen3"), tokenizer) is None
    require_fit(get_template("qwen3"), tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE_2507
    assert template_of(tokenizer).name == "chatml"
    always_thinks = "{{ '<think>\n' if add_generation_prompt else '' }}"
    tokenizer.chat_template = CHAT_TEMPLATE_2507 + always_thinks
    assert template_of(tokenizer) is None


def test_smollm2s_chat_template_is_chatml(smollm2_tokenizer, llama_tokenizer):
    assert template_of(smollm2_tokenizer).name == "chatml"
    assert template_of(llama_tokenizer) is None


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% for",
        "{% for m in messages %}USER: {{ m.content }} {% endfor %}ASSISTANT:",
    ],
)
def test_other_chat_templates_are_none_of_ours(smollm2_dir, jinja):
    tokenizer = load_tokenizer(smollm2_dir)
    tokenizer.chat_template = jinja
    assert template_of(tokenizer) is None
