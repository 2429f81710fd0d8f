"""Adapters of PEFT as parameters beside the weights of a model."""

import dataclasses

import numpy as np
import pytest
import torch
import torch_reference as reference
from conversion import CONFIG, edit_json
from forward import logits, make_batch, random_images, torch_logits
from peft_adapters import NAMES, adapted, save
from safetensors.torch import load_file, save_file

from llava_jax.cli import UserError
from llava_jax.convert.adapter import read_adapter
from llava_jax.models.config import LoraConfig

TOWER = r".*\.(q_proj|fc1|linear_1)"
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "tower and projector": {"target_modules": TOWER},
    "projector whole": {"modules_to_save": ["multi_modal_projector"]},
    "some layers": {"target_modules": ["gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}


def check_equal(model, directory) -> LoraConfig:
    """The adapter beside the weights of the base computes what PEFT does."""
    lora, params = read_adapter(directory, CONFIG)
    base = reference.llava_params(reference.llava(CONFIG), CONFIG)
    batch = make_batch([[5, "image", 60, "image", 3], [9]], random_images(2, 2), config=CONFIG)
    ours = np.asarray(logits(dataclasses.replace(CONFIG, lora=lora), base | params, batch))
    real = batch["segment_ids"] > 0
    theirs = torch_logits(model, batch, CONFIG)
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=1e-5)
    unadapted = np.asarray(logits(CONFIG, base, batch))
    assert np.abs(unadapted - ours)[real].max() > 0.01
    return lora


@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_peft_does(kind, tmp_path):
    model = adapted(CONFIG, lora_dropout=0.25, **KINDS[kind])
    lora = check_equal(model, save(model, tmp_path / "a"))
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 6, 0.25)
    assert (lora.rslora, lora.dora) == (kind == "rslora", kind == "dora")


@pytest.mark.parametrize("names", NAMES)
def test_names_of_every_version(names, tmp_path):
    model = adapted(CONFIG, target_modules=TOWER, modules_to_save=["lm_head"])
    lora = check_equal(model, save(model, tmp_path / "a", names))
    assert lora.targets == (
        *("vision.layers.attention.q_proj", "vision.layers.mlp.fc1", "projector.linear_1"),
        "llm.layers.attention.q_proj",
    )


def test_the_originals_projector_lies_in_a_file_besides(tmp_path):
    model = adapted(CONFIG, modules_to_save=["multi_modal_projector"])
    save(model, tmp_path / "a", "the original")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    projector = {name: tensors.pop(name) for name in list(tensors) if "mm_projector" in name}
    assert len(projector) == 4
    save_file(tensors, file)
    torch.save(projector, tmp_path / "a" / "non_lora_trainables.bin")
    edit_json(tmp_path / "a" / "adapter_config.json", modules_to_save=None)
    assert check_equal(model, tmp_path / "a").targets == ("q_proj", "v_proj", "down_proj")


PREFIX, HEAD = "base_model.model.", torch.ones(CONFIG.text.vocab_size, CONFIG.text.hidden_size)
WIDER = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, intermediate_size=96))
SHORTER = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=2))
MORE_WORDS = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=400))


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        (
            {"rank_pattern": {"q_proj": 2}},
            CONFIG,
            r"r and lora_alpha differ \(.* of .*\); import it merged: python -m ",
        ),
        ({"alpha_pattern": {r"layers\.1\..*": 2}}, CONFIG, "r and lora_alpha differ"),
        ({"target_modules": ["lm_head"]}, CONFIG, "adapts lm_head, which works in the weights only; import it merged"),
        ({"target_modules": ["embed_tokens"]}, CONFIG, "lora_embedding_A is neither a LoRA matrix of a linear layer"),
        (
            {"use_dora": True, "target_modules": ["up_proj"], "layers_to_transform": [1]},
            CONFIG,
            "use_dora, but only some layers are adapted",
        ),
        ({}, WIDER, r"down_proj.weight is \(48, 96\) in the base, r is 4, lora_A is \(4, 80\)"),
        ({}, SHORTER, r"adapts .*layers\.2\..*, which the model does not have: it is for another model"),
        ({"modules_to_save": ["lm_head"]}, MORE_WORDS, r"lm_head.weight is \(400, 48\) in the base, here"),
        ({"trainable_token_indices": [3, 4]}, CONFIG, r"trainable_token_indices is \[3, 4\], which is not supported"),
        ({"init_lora_weights": "pissa"}, CONFIG, "init_lora_weights is 'pissa', which changes the base"),
    ],
)
def test_what_is_refused(settings, model, message, tmp_path):
    save(adapted(CONFIG, **settings), tmp_path / "a")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(next(iter(tensors))), "it has lora_B, not lora_A and lora_B; copy the adapter"),
        (
            lambda tensors: tensors.update({f"{PREFIX}x.weight": torch.ones(2)}),
            "x.weight is neither a",
        ),
        (
            lambda tensors: tensors.update(
                {f"{PREFIX}lm_head.weight": HEAD, f"{PREFIX}language_model.lm_head.weight": HEAD + 1}
            ),
            "has .*lm_head.weight twice",
        ),
        (lambda tensors: tensors.clear(), "adapts no layer"),
        (lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()}), "is I8, not F32"),
    ],
)
def test_damaged_files(change, message, tmp_path):
    save(adapted(CONFIG), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a", CONFIG)


def test_layers_that_are_several_here_are_merged_only(tmp_path):
    """Phi-3 of transformers has queries, keys and values in one layer."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, family="phi3"))
    directory = save(adapted(config, target_modules=["qkv_proj"]), tmp_path / "a")
    with pytest.raises(UserError, match=r"adapts .*qkv_proj, which is several layers here; import it merged"):
        read_adapter(directory, config)
