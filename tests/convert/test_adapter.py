"""Adapters of PEFT on a LLaVA of transformers, whatever names the two have."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch_reference as reference
from conversion import CONFIG, LAYOUTS, TOKENIZER, check_logits, convert, rename, save_llava
from peft_adapters import NAMES, adapted, save
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError

SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "llava-hf/x"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "base"
    save_llava(CONFIG, directory)
    return directory


def adapt(directory, names, settings=SETTINGS, saved=(), modules=("q_proj", "down_proj", "fc1"), rank=lambda name: 4,
          scale=lambda name, rank: 8 / rank):  # fmt: skip
    """Writes an adapter of random matrices; -> the model with W + scale B A, as `merge_and_unload` has it."""
    model: LlavaForConditionalGeneration = reference.llava(CONFIG)
    generator = torch.Generator().manual_seed(0)
    held = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(modules):
                r = rank(name)
                down = torch.randn(r, module.in_features, generator=generator)
                up = 0.02 * torch.randn(module.out_features, r, generator=generator)
                module.weight += scale(name, r) * up @ down
                held |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        for name, parameter in model.named_parameters():
            if any(module in name for module in saved):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                held[name] = parameter.detach().clone()
    directory.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in rename(held, names).items()},
              directory / "adapter_model.safetensors")  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("names", ["before 4.52", "4.52", "5.6"])
def test_names_of_every_version(names, with_config, base, tmp_path):
    model = adapt(tmp_path / "a", NAMES[names])
    if with_config:
        (tmp_path / "a" / "config.json").write_bytes((base / "config.json").read_bytes())
    convert("import", "--llava", tmp_path / "a", "--base", base, "--output", tmp_path / "out")
    check_logits(model, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").description.stage == "finetune"


def test_ranks_and_scales_by_pattern_and_what_was_trained_whole(base, tmp_path):
    """As PEFT reads them: a pattern is the end of a module's name, and the first one that fits counts."""
    patterns = {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 6, "q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    saved = ["multi_modal_projector", "lm_head"]
    model = adapt(
        tmp_path / "a",
        NAMES["5.6"],
        SETTINGS | patterns | {"modules_to_save": saved},
        saved,
        rank=lambda name: 6 if name.endswith("layers.0.self_attn.q_proj") else 2 if "q_proj" in name else 4,
        scale=lambda name, rank: (3 if "down_proj" in name else 8) / rank,
    )
    convert("import", "--llava", tmp_path / "a", "--base", base, "--output", tmp_path / "out")
    check_logits(model, tmp_path / "out")
    projector = open_checkpoint(tmp_path / "out").load(["projector.linear_1.bias"])["projector.linear_1.bias"]
    np.testing.assert_array_equal(projector, model.model.multi_modal_projector.linear_1.bias.detach().numpy())


def test_rank_stabilized_scales_and_the_adapters_own_tokenizer(base, tmp_path):
    model = adapt(tmp_path / "a", NAMES["5.6"], SETTINGS | {"use_rslora": True}, scale=lambda name, rank: 8 / rank**0.5)
    TOKENIZER.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("its own")
    convert("import", "--llava", tmp_path / "a", "--base", base, "--output", tmp_path / "out")
    check_logits(model, tmp_path / "out")
    assert (open_checkpoint(tmp_path / "out").tokenizer_dir / "chat_template.jinja").read_text() == "its own"


def test_dora_and_a_head_that_peft_saves_with_its_adapter(base, tmp_path):
    model = adapted(CONFIG, use_dora=True, target_modules=["up_proj", "fc2", "lm_head"])
    save(model, tmp_path / "a")
    convert("import", "--llava", tmp_path / "a", "--base", base, "--output", tmp_path / "out")
    check_logits(model.merge_and_unload(), tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bases_of_every_layout(layout, tmp_path):
    save_llava(CONFIG, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(rename(load_file(file), LAYOUTS[layout]), file)
    model = adapt(tmp_path / "a", NAMES["before 4.52"])
    convert("import", "--llava", tmp_path / "a", "--base", tmp_path / "base", "--output", tmp_path / "out")
    check_logits(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({}, [], r"is an adapter of a LLaVA of transformers: give --base DIR, .* \(llava-hf/x\)"),
        ({}, ["--base", "llm"], "not a LLaVA of transformers"),
        ({}, ["--base", "base", "--vision", "llm"], "leave --vision out"),
        ({"use_dora": True}, ["--base", "base"], "has lora_A and lora_B, not lora_A and lora_B and lora_magnitude_vec"),
        ({"lora_bias": True}, ["--base", "base"], "lora_bias is True, which is not supported"),
        ({"r": 0}, ["--base", "base"], "r is 0, not an integer from 1 to"),
        (
            {"modules_to_save": ["lm_head"]},
            ["--base", "base"],
            "modules_to_save has lm_head, of which it has no tensor",
        ),
        (
            {"rank_pattern": {"q_proj": 2}},
            ["--base", "base"],
            r"q_proj.weight is .* in the base, r is 2, lora_A is \(4, ",
        ),
    ],
)
def test_what_is_refused(settings, flags, message, base, tmp_path):
    adapt(tmp_path / "a", NAMES["5.6"], SETTINGS | settings)
    (tmp_path / "llm").mkdir()
    text = reference.torch_text_config(dataclasses.replace(CONFIG.text)).to_dict()
    (tmp_path / "llm" / "config.json").write_text(json.dumps(text))
    places = {"base": base, "llm": tmp_path / "llm"}
    flags = [places.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=message):
        convert("import", "--llava", tmp_path / "a", *flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_language_model_is_told(tmp_path):
    adapt(tmp_path / "a", NAMES["5.6"])
    with pytest.raises(UserError, match=r"is an adapter of PEFT \(llava-hf/x\): merge it first"):
        convert("import", "--llm", tmp_path / "a", "--vision", tmp_path / "a", "--output", tmp_path / "out")
