"""Tokenizers of others: no code of theirs is run, nothing asks, and nothing grows without end."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import llava_jax
from llava_jax.cli import UserError
from llava_jax.data import chat_template
from llava_jax.data.chat_template import render_chats
from llava_jax.data.template_fit import template_of
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.data.tokenizer_files import MAX_BYTES, read_tokenizer_files

EVIL = "open({!r}, 'w').write('ran')\nclass Evil: pass\n"


@pytest.fixture
def directory(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_code(directory, **fields):
    (directory / "evil.py").write_text(EVIL.format(str(directory.parent / "ran")))
    change(directory / "tokenizer_config.json", **fields)


MAPS = [{"AutoTokenizer": ["evil.Evil"] * 2}, ["evil.Evil"] * 2, {"AutoTokenizer": ["org/a--evil.Evil"] * 2}]


@pytest.mark.parametrize("auto_map", MAPS)
def test_code_of_a_tokenizer_is_neither_run_nor_asked_for(auto_map, directory, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n1\nyes\n"))
    with_code(directory, auto_map=auto_map, tokenizer_class="EvilTokenizer")
    with pytest.raises(UserError, match="tokenizer: tokenizer_config.json has auto_map, .* never run: save it"):
        load_tokenizer(directory)
    assert sys.stdin.read() == "y\n1\nyes\n" and not (directory.parent / "ran").exists()


@pytest.mark.parametrize("auto_map", MAPS)
def test_code_beside_a_class_of_transformers_is_ignored(auto_map, directory, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    plain = load_tokenizer(directory).encode("a cat")
    with_code(directory, auto_map=auto_map, tokenizer_class="PreTrainedTokenizerFast")
    (directory / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    assert load_tokenizer(directory).encode("a cat") == plain
    assert sys.stdin.read() == "y\n" and not (directory.parent / "ran").exists()


def test_every_from_pretrained_of_the_package_distrusts():
    calls = []
    for file in Path(llava_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                trust = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
                calls.append((file.name, [isinstance(value, ast.Constant) and value.value is False for value in trust]))
    assert len(calls) >= 6
    assert all(trust == [True] for _, trust in calls), calls


def test_nothing_of_the_package_runs_what_a_file_says():
    """No `eval`, `exec`, pickle or YAML of a file, and no NumPy file with objects."""
    banned = {"eval", "exec", "compile", "__import__"}
    for file in Path(llava_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id in banned), (file, node.lineno)
                assert not any(word.arg == "allow_pickle" for word in node.keywords), (file, node.lineno)
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "pickle.load", "pickle.loads", "yaml.load", "marshal.loads")


BOMBS = {
    "memory": "{% set a = namespace(x='aa') %}{% for i in range(40) %}{% set a.x = a.x + a.x %}{% endfor %}{{ a.x }}",
    "a large product": "{{ 'a' * 10**10 }}",
    "a large power": "{{ 9 ** (9 ** 7) }}",
    "output": "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "nested templates": "{% if a %}" * 20_000 + "{% endif %}" * 20_000,
}


@pytest.fixture
def a_second(monkeypatch):
    """The processor time of a template: all of it passes."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)


@pytest.mark.parametrize("bomb", BOMBS)
def test_chat_templates_are_rendered_in_bounds(bomb, directory, a_second):
    tokenizer = load_tokenizer(directory)
    chats = [[{"role": "user", "content": "q"}], [{"role": "user", "content": "b"}]]
    try:
        assert render_chats(chats, BOMBS[bomb], tokenizer) == [None, None]
    except UserError as error:
        assert "takes more than 1 s or 512 MiB to render" in str(error) and "--template v1" in str(error)


def test_chat_templates_reach_nothing(directory):
    tokenizer = load_tokenizer(directory)
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{% for x in messages %}{{ x.clear() }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
    ):
        (text,) = render_chats([[{"role": "user", "content": "q"}]], attack, tokenizer)
        assert not text
    for nothing in (5, None, ["a"], {"a": "b"}):
        assert render_chats([[{"role": "user", "content": "q"}]], nothing, tokenizer) == [None]


def test_chat_templates_are_rendered_as_transformers_does(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}\n  {%- if m.role == 'user' %}\nU: {{ m['content'] | trim }}{% else %}"
        "A: {{ m.content | tojson }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    chats = [[{"role": "user", "content": " é <b> "}, {"role": "assistant", "content": "é <b>"}],
             [{"role": "user", "content": "q"}]]  # fmt: skip
    render = tokenizer.apply_chat_template
    expected = [render(chat, tokenize=False, add_generation_prompt=len(chat) == 1) for chat in chats]
    assert render_chats(chats, tokenizer.chat_template, tokenizer) == expected
    assert render_chats(chats, {"default": tokenizer.chat_template, "other": "x"}, tokenizer) == expected


def test_the_template_of_a_hostile_tokenizer_is_asked_for(directory, a_second):
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="choose a template of conversations by its name"):
        template_of(tokenizer)


def growing(steps):
    return {"type": "Sequence", "normalizers": steps}


GROWTH = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
HOSTILE = {
    "growth": ("tokenizer.json", {"normalizer": growing([GROWTH] * 40)}, "more than 1000 times as long"),
    "nested growth": ("tokenizer.json", {"decoder": growing([growing([GROWTH] * 6)] * 6)}, "more than 1000 times"),
    "regex growth": ("tokenizer.json", {"normalizer": GROWTH | {"pattern": {"Regex": "b"}, "content": "b" * 1001}},
                     "more than 1000 times"),
    "elsewhere": ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.9.json"]}, "no names of files"),
    "elsewhere too": ("tokenizer_config.json", {"fast_tokenizer_files": "/etc"}, "no names of files"),
    "layers": ("config.json", {"model_type": "qwen2", "num_hidden_layers": 10**9}, "more than 10000 layers"),
    "digits": ("tokenizer_config.json", {"model_max_length": 10**400}, "number of 401 digits"),
    "special": ("special_tokens_map.json", {"bos_token": {"a": 1}}, None),
    "types": ("tokenizer_config.json", {"bos_token": 5, "chat_template": 3}, "holds no tokenizer"),
    "padding": ("tokenizer.json", {"padding": {"strategy": {"Fixed": 10**11}, "direction": "Right", "pad_id": 0,
                "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "a"}}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_of_a_tokenizer_are_refused_or_harmless(kind, directory):
    name, fields, message = HOSTILE[kind]
    if not (directory / name).exists():
        (directory / name).write_text("{}")
    change(directory / name, **fields)
    if message:
        with pytest.raises(UserError, match=message):
            load_tokenizer(directory)
    else:
        assert len(load_tokenizer(directory).encode("a")) < 10


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "additional_chat_templates/a.jinja"])
def test_files_of_a_tokenizer_are_regular_and_small(name, directory):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(UserError, match=f"{name}: is a device, pipe or socket"):
        load_tokenizer(directory)
    (directory / name).unlink()
    with (directory / name).open("wb") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match=f"{name}: is larger than 64 MiB"):
        read_tokenizer_files(directory, directory)


def test_a_command_runs_no_code_when_its_input_begins_with_yes(directory):
    """As `chat` is fed with questions: transformers would ask on standard input, and take the first line."""
    with_code(directory, auto_map=MAPS[0], tokenizer_class="EvilTokenizer")
    command = [sys.executable, "-m", "llava_jax.data.inspect", "--json", "none.json", "--tokenizer", str(directory)]
    ended = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and "auto_map" in ended.stderr
    assert not (directory.parent / "ran").exists()
    assert "Do you wish to run" not in ended.stdout + ended.stderr
