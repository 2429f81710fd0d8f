"""Models from a Hub that runs here: what is downloaded, what is pinned, and what is said when it cannot be had."""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import qwen3
import tiny
import torch_reference as reference
from conversion import CONFIG, byte_level, convert, load, save_llava
from fake_hub import FakeHub
from huggingface_hub import constants
from PIL import Image
from transformers import SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import llava_jax
from llava_jax import cli
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.hub import locate
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from llava_jax.recipes import common
from llava_jax.training.loop import train

SIGLIP2 = "google/siglip2-base-patch16-256"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.fixture
def llava(hub, tmp_path):
    """A repository with more than is needed."""
    directory = tmp_path / "repository"
    directory.mkdir()
    sizes = {"model-1.safetensors": 3000, "model-2.safetensors": 2000, "pytorch_model.bin": 5000, "tf_model.h5": 9}
    for name, size in sizes.items():
        (directory / name).write_bytes(os.urandom(size))
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "README.md",
        "mm_projector.bin",
        "llava_jax.json",
    ):
        (directory / name).write_text(json.dumps(name))
    hub.repositories["org/llava"] = directory
    return directory


def test_what_is_needed_comes_and_is_pinned_to_a_commit(hub, llava):
    found = locate("org/llava", "--llava")
    assert found.origin == f"org/llava@{hub.commit}"
    names = {file.name for file in found.path.iterdir()}
    assert names == {file.name for file in llava.iterdir()} - {"pytorch_model.bin", "tf_model.h5", "README.md"}
    for name in names:
        assert (found.path / name).read_bytes() == (llava / name).read_bytes()


def test_without_safetensors_the_files_of_torch_come(hub, llava):
    for file in llava.glob("model*"):
        file.unlink()
    names = {file.name for file in locate("org/llava", "--llava").path.iterdir()}
    assert names == {"config.json", "tokenizer.json", "llava_jax.json", "mm_projector.bin", "pytorch_model.bin"}


def test_a_new_llava_of_siglip2_and_qwen3(hub, tmp_path):
    """Imported by their names alone, trained for a step as QLoRA, and asked with 8-bit weights."""
    specials = ("<pad>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = byte_level(specials, eos="<|im_end|>")
    tokenizer.bos_token, tokenizer.chat_template = None, qwen3.CHAT_TEMPLATE
    text = dataclasses.replace(reference.TEXTS["qwen3"], vocab_size=len(tokenizer) + 8, tie_word_embeddings=True)
    vision = dataclasses.replace(reference.SIGLIP, image_size=32, patch_size=16)
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower = reference.torch_vision_config(vision).to_dict() | {"vision_use_head": True}
    siglip = reference.randomize(SiglipModel(SiglipConfig(text_config=words, vision_config=tower)))
    for name, saved in {"Qwen/Qwen3-0.6B": [reference.llama(text), tokenizer], SIGLIP2: [siglip]}.items():
        hub.repositories[name] = tmp_path / name.replace("/", "-")
        for part in saved:
            part.save_pretrained(hub.repositories[name])
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    processor.save_pretrained(hub.repositories[SIGLIP2])

    convert("import", "--llm", "Qwen/Qwen3-0.6B", "--vision", SIGLIP2, "--aspect", "resize", "--output", "start")
    start = open_checkpoint("start")
    assert (start.template, start.config.text, start.config.vision) == ("qwen3", text, vision)
    assert (start.config.image_resample, start.config.image_aspect) == ("bilinear", "resize")
    assert start.config.image_mean == (0.5, 0.5, 0.5) and start.config.image_tokens == 4

    data, images = tiny.data(tmp_path, samples=4)
    config = common.get_config()
    config.update(stage="finetune", init="start", steps=1, batch_rows=4, max_length=160, template="qwen3")
    config.base_dtype = "nf4"
    config.data.update(json=str(data), images=str(images))
    config.lora.update(rank=2, dora=True)
    config.mesh.fsdp = jax.device_count()
    train(config, "run")
    trained = open_checkpoint("run")
    adapters = {name for name in trained.abstract() if ".lora." in name}
    assert "llm.layers.attention.q_proj.lora.a" in adapters and len(adapters) == 7 * 3
    assert not np.array_equal(trained.read("llm.layers.mlp.up_proj.lora.b", None), 0)

    request = Request([("user", "<image>\nWhat?")], [Image.new("RGB", (9, 5), "red")])
    generator = Generator.from_checkpoint(trained, quantize="int8")
    prompt = generator.prompts.encode(request)
    block = tokenizer.encode("assistant\n<think>\n\n</think>\n\n", add_special_tokens=False)
    assert prompt.tokens[-len(block) :].tolist() == block
    assert len(generator.answer([request], Sampling(max_new_tokens=4))) == 1
    convert("export", "--checkpoint", "run", "--output", "hf")
    exported = load(Path("hf"))
    assert exported.config.text_config.model_type == "qwen3"
    assert json.loads(Path("hf/preprocessor_config.json").read_text())["resample"] == 2


def test_a_directory_of_that_name_wins(hub, tmp_path):
    (tmp_path / "org/llava").mkdir(parents=True)
    assert locate("org/llava", "--llava") == (Path("org/llava"), None)
    assert not hub.sent


def test_a_broken_connection_is_taken_up_at_the_byte(hub, llava):
    hub.cut["model-1.safetensors"] = 1000
    found = locate("org/llava", "--llava")
    assert (found.path / "model-1.safetensors").read_bytes() == (llava / "model-1.safetensors").read_bytes()
    assert [start for name, start in hub.sent if name == "model-1.safetensors"] == [0, 1000]


def test_the_command_again_goes_on_with_what_is_missing(hub, llava):
    hub.files = 3
    with pytest.raises(
        UserError, match="--llava org/llava: http.* broke off .*403.*: the same command again downloads"
    ):
        locate("org/llava", "--llava")
    assert len(hub.sent) >= 3
    hub.files = math.inf
    found = locate("org/llava", "--llava")
    for file in found.path.iterdir():
        assert file.read_bytes() == (llava / file.name).read_bytes()
    assert len({name for name, _ in hub.sent}) == len(hub.sent) == len(list(found.path.iterdir()))  # none came twice


def test_what_is_there_needs_no_network(hub, llava, monkeypatch):
    found = locate(f"org/llava@{hub.commit}", "--llava")
    branch = locate("org/llava@main", "--llava")
    sent = list(hub.sent)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    assert locate("org/llava", "--llava") == found == branch
    assert hub.sent == sent


def test_gated_models_want_a_token(hub, llava, monkeypatch):
    hub.gated.add("org/llava")
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=f"grants access: ask at {hub.url}/org/llava, and set HF_TOKEN"):
            locate("org/llava", "--llava")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert locate("org/llava", "--llava").origin


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/lava",
            "--llm org/lava: no such directory, and http://.* has no such model, or a private one",
        ),
        ("org/llava@v2", "there is no branch, tag or commit v2 of it"),
        ("or--g/llava", "no such directory, and no name that the Hub has .Cannot have"),
        ("lava", "^lava: no such file or directory"),
        ("./org/llava", "^./org/llava: no such file or directory"),
        ("a/b/c", "^a/b/c: no such file or directory"),
        ("gs://org/llava", "from a local disk only"),
    ],
)
def test_what_is_not_there_is_said(name, message, hub, llava):
    with pytest.raises(UserError, match=message) as error:
        locate(name, "--llm")
    assert "\n" not in str(error.value)


def test_a_machine_without_a_network_is_told_the_other_form(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    with pytest.raises(UserError, match="localhost:9 cannot be reached .* copy .* give its directory, --llava DIR"):
        locate("org/llava", "--llava")


def test_a_model_comes_in_from_the_hub(hub, tmp_path):
    save_llava(CONFIG, tmp_path / "source")
    hub.repositories["org/llava"] = tmp_path / "source"
    convert("import", "--llava", "org/llava@main", "--output", tmp_path / "out")
    description = open_checkpoint(tmp_path / "out").description
    assert description.origins == {"llava": f"org/llava@{hub.commit}"}
    assert description.model == CONFIG


def test_a_name_can_be_loaded_without_a_checkpoint(hub, tmp_path):
    save_llava(CONFIG, tmp_path / "source")
    hub.repositories["org/llava"] = tmp_path / "source"
    model = llava_jax.load("org/llava@main")
    assert model.config == CONFIG and isinstance(model.chat("Hello", max_new_tokens=2), str)
    with pytest.raises(UserError, match="^load org/lava: no such directory, and http"):
        llava_jax.load("org/lava")


def test_the_command_ends_with_one_line(hub, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: convert("import", "--llava", "org/lava", "--output", tmp_path / "out"))
    assert left.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --llava org/lava: no such directory, and http")
    assert not (tmp_path / "out").exists()
