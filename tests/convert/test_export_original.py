"""Exports in the original LLaVA's layout: names, settings, and what comes in again."""

import dataclasses
import json
import resource

import numpy as np
import pytest
import tiny
import torch
import torch_reference as reference
from conversion import CONFIG, WIDE, convert, original_tensors, save_llava, tensors_of

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.models.config import CLIP_L_14_336, RopeScaling

TOWER = ["--tower", "openai/clip-vit-large-patch14-336"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LLaVA of transformers whose tower's heads are as wide as OpenAI's, imported."""
    directory = tmp_path_factory.mktemp("made")
    model = save_llava(WIDE, directory / "llava")
    convert("import", "--llava", directory / "llava", "--output", directory / "checkpoint")
    model.model.vision_tower.save_pretrained(directory / "tower")
    return model, directory


def check_equal(before, after):
    before, after = open_checkpoint(before), open_checkpoint(after)
    assert after.config == before.config
    params, again = before.load(), after.load()
    for name, value in params.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


@pytest.mark.parametrize("inside", [True, False])
def test_a_whole_model_there_and_back(inside, made, tmp_path):
    model, directory = made
    flags = [] if inside else ["--without-tower"]
    convert("export", "--checkpoint", directory / "checkpoint", "--layout", "original", "--output", tmp_path / "o",
            *TOWER, *flags)  # fmt: skip
    exported = tensors_of(tmp_path / "o")
    expected = {n: t for n, t in original_tensors(model).items() if inside or "vision_tower" not in n}
    assert set(exported) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)
    flags = [] if inside else ["--vision", directory / "tower"]
    convert("import", "--llava", tmp_path / "o", "--output", tmp_path / "again", *flags)
    check_equal(directory / "checkpoint", tmp_path / "again")


def test_settings_are_those_of_the_original(made, tmp_path):
    """What loading and training of llava 1.2.2 read, and no field that transformers 4.37 refuses."""
    convert(
        "export", "--checkpoint", made[1] / "checkpoint", "--layout", "original", "--output", tmp_path / "o", *TOWER
    )
    config = json.loads((tmp_path / "o/config.json").read_text())
    expected = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": TOWER[1],
        "mm_hidden_size": WIDE.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": True,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "hidden_size": WIDE.text.hidden_size,
        "num_key_value_heads": WIDE.text.num_kv_heads,
        "rope_theta": WIDE.text.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": WIDE.text.vocab_size,
        "torch_dtype": "float32",
    }
    assert {field: config.get(field) for field in expected} == expected
    assert not {"rope_parameters", "dtype", "head_dim", "vision_config", "text_config"} & set(config)
    files = {file.name for file in (tmp_path / "o").iterdir()}
    assert files >= {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_a_projector_alone(projector_type, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path, tiny.config(projector_type=projector_type))
    flags = ["--layout", "projector", "--dtype", "bfloat16", "--output", tmp_path / "p", *TOWER]
    convert("export", "--checkpoint", checkpoint, *flags)
    loaded = torch.load(tmp_path / "p/mm_projector.bin", weights_only=True)
    modules = {"linear": [""], "mlp2x_gelu": ["0.", "2."], "mlp3x_gelu": ["0.", "2.", "4."]}[projector_type]
    assert list(loaded) == [f"model.mm_projector.{m}{kind}" for m in modules for kind in ("weight", "bias")]
    params = open_checkpoint(checkpoint).load()
    for i, module in enumerate(modules, 1):
        weight = loaded[f"model.mm_projector.{module}weight"]
        assert weight.dtype == torch.bfloat16
        expected = np.asarray(params[f"projector.linear_{i}.kernel"]).T
        np.testing.assert_array_equal(weight.float(), torch.from_numpy(expected.copy()).bfloat16().float())
    config = json.loads((tmp_path / "p/config.json").read_text())
    assert (config["mm_projector_type"], config["tune_mm_mlp_adapter"]) == (projector_type, True)


def test_a_projector_comes_in_again(made, tmp_path):
    model, directory = made
    convert(
        "export", "--checkpoint", directory / "checkpoint", "--layout", "projector", "--output", tmp_path / "p", *TOWER
    )
    llm = reference.llama(WIDE.text)
    llm.model, llm.lm_head = model.model.language_model, model.lm_head
    llm.save_pretrained(tmp_path / "llm")
    for file in (directory / "llava").glob("tokenizer*"):
        (tmp_path / "llm" / file.name).write_bytes(file.read_bytes())
    convert("import", "--llava", tmp_path / "p", "--base", tmp_path / "llm", "--vision", directory / "tower",
            "--output", tmp_path / "again")  # fmt: skip
    check_equal(directory / "checkpoint", tmp_path / "again")


def text(**changes):
    return {"text": dataclasses.replace(CONFIG.text, vocab_size=tiny.VOCAB, **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (text(qkv_bias=True), "no language model qwen2, only llama and mistral"),
        ({"vision": reference.SIGLIP}, "no vision tower siglip, only clip"),
        ({"image_aspect": "resize"}, "no image aspect resize"),
        (text(rope_scaling=RopeScaling("llama3", 8.0)), "no rope_type llama3, only linear"),
        (text(head_dim=16), "no head_dim 16"),
        ({}, "give --tower NAME"),
    ],
)
def test_what_the_original_cannot_compute_is_refused(changes, message, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path, tiny.config(**changes))
    with pytest.raises(UserError, match=message):
        convert("export", "--checkpoint", checkpoint, "--layout", "original", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_scaled_positions_and_mistral_are_said_in_its_words(tmp_path):
    scaled = tiny.config(**text(rope_scaling=RopeScaling("linear", 4.0), sliding_window=64))
    convert("export", "--checkpoint", tiny.checkpoint(tmp_path, scaled), "--layout", "original", "--output",
            tmp_path / "o", *TOWER)  # fmt: skip
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert (config["model_type"], config["architectures"]) == ("llava_mistral", ["LlavaMistralForCausalLM"])
    assert config["sliding_window"] == 64


def test_openais_towers_are_named_by_their_shapes():
    from llava_jax.convert.export_original import _tower

    assert _tower(tiny.config(vision=CLIP_L_14_336), "here") == "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize("layout", ["original", "projector"])
def test_a_full_disk_leaves_nothing(layout, made, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # files can grow no further, as on a full disk
    try:
        with pytest.raises(UserError, match="o: cannot be written .File too large.; nothing is left of it") as raised:
            convert(
                "export", "--checkpoint", made[1] / "checkpoint", "--layout", layout, "--output", tmp_path / "o", *TOWER
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--tower", "clip"], ["--without-tower"], ["--layout", "projector", "--without-tower"]]
)
def test_flags_that_make_no_sense(flags, made, tmp_path):
    with pytest.raises(SystemExit):
        convert("export", "--checkpoint", made[1] / "checkpoint", "--output", tmp_path / "o", *flags)
