"""Checkpoints as the original LLaVA writes them: whole, in parts, and as what is to be added to a base."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_reference as reference
from conversion import CONFIG, TEXT, TOKENIZER, WIDE, check_logits, convert, edit_json, original_tensors

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.data.tokenization import load_tokenizer

# The reference's heads are narrower than OpenAI's, whose width an import without --vision takes for granted.
pytestmark = pytest.mark.usefixtures("optimized")  # logits are compared to 1e-5: as users' programs compute them


def part(tensors, *prefixes):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def original_config(config, **fields) -> dict:
    text = reference.torch_text_config(config.text).to_dict()
    own = {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
    }
    return text | own | fields


def write(directory: Path, files: dict[str, dict], config: dict | None = None, tokenizer=TOKENIZER) -> Path:
    directory.mkdir()
    for name, held in files.items():
        (directory / name).write_text(json.dumps(held)) if name.endswith(".json") else torch.save(
            held, directory / name
        )
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A LLaVA of transformers, and the directories of its decoder and its tower."""
    directory, model = tmp_path_factory.mktemp("made"), reference.llava(CONFIG)
    tensors = original_tensors(model)
    text = reference.torch_text_config(CONFIG.text).to_dict()
    decoder = {n: t for n, t in tensors.items() if "mm_projector" not in n and "vision_tower" not in n}
    write(directory / "llm", {"pytorch_model.bin": decoder}, text)
    model.model.vision_tower.save_pretrained(directory / "vision")
    return model, tensors, directory / "llm", directory / "vision"


@pytest.mark.parametrize("tower", ["inside", "inside and given", "given"])
def test_a_whole_model(tower, made, tmp_path):
    model, tensors, _, vision = made
    config = CONFIG
    if tower == "inside":
        config, model = WIDE, reference.llava(WIDE)
        tensors = original_tensors(model)
    held = {n: t for n, t in tensors.items() if tower != "given" or "vision_tower" not in n}
    names = sorted(held)
    shards = {f"pytorch_model-{i}-of-2.bin": {n: held[n] for n in names[i::2]} for i in range(2)}
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    files = shards | {"pytorch_model.bin.index.json": index}
    source = write(tmp_path / "vicuna-mpt-lora", files, original_config(config))
    flags = [] if tower == "inside" else ["--vision", vision]
    convert("import", "--llava", source, *flags, "--output", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config == dataclasses.replace(config, image_aspect="pad")
    assert checkpoint.description.stage == "finetune"
    check_logits(model, tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert not [field for field in written | written["text_config"] if field.startswith("mm_v")]


def test_a_linear_projector_of_the_first_version(made, tmp_path):
    _, tensors, _, vision = made
    held = {n: t for n, t in tensors.items() if "vision_tower" not in n and ".2." not in n.replace("layers.2", "")}
    held = {name.replace("mm_projector.0.", "mm_projector."): tensor for name, tensor in held.items()}
    config = original_config(CONFIG, model_type="llava", image_aspect_ratio=None)
    del config["mm_projector_type"], config["mm_patch_merge_type"]
    source = write(tmp_path / "llava", {"pytorch_model.bin": held}, config)
    convert("import", "--llava", source, "--vision", vision, "--output", tmp_path / "out", "--template", "llava_v0")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.config.projector_type, checkpoint.config.image_aspect) == ("linear", "square")
    kernel = checkpoint.load(["projector.linear_1.kernel"])["projector.linear_1.kernel"]
    np.testing.assert_array_equal(kernel.T, tensors["model.mm_projector.0.weight"])


@pytest.mark.parametrize("form", ["directory", "file", "file of PEFT"])
def test_the_projector_of_stage_1(form, made, tmp_path):
    model, tensors, llm, vision = made
    projector = part(tensors, "model.mm_projector.")
    if form == "directory":
        source = write(tmp_path / "checkpoint-500", {"mm_projector.bin": projector}, original_config(CONFIG), None)
        flags = ["--llava", source, "--base", llm, "--vision", vision]
    else:
        prefix = "base_model.model." if form == "file of PEFT" else ""
        write(tmp_path / "p", {"checkpoint-500.bin": {prefix + n: t for n, t in projector.items()}}, tokenizer=None)
        flags = ["--llm", llm, "--vision", vision, "--projector", tmp_path / "p/checkpoint-500.bin"]
    convert("import", *flags, "--output", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").description.stage is None
    check_logits(model, tmp_path / "out")


def lora(model, rank, modules=("q_proj", "down_proj"), seed=0):
    """An adapter of the decoder, and the scale by which it counts for alpha 16."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, module in model.model.language_model.named_modules():
        if name.endswith(modules):
            prefix = f"base_model.model.model.{name}.lora_"
            adapter[f"{prefix}A.weight"] = torch.randn(rank, module.in_features, generator=generator)
            adapter[f"{prefix}B.weight"] = 0.05 * torch.randn(module.out_features, rank, generator=generator)
    return adapter


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_on_its_base(rslora, made, tmp_path, capsys):
    _, tensors, llm, vision = made
    trained = reference.llava(CONFIG)
    adapter = lora(trained, rank=4)
    scale = 16 / 4**0.5 if rslora else 16 / 4
    with torch.no_grad():
        for name, module in trained.model.language_model.named_modules():
            if name.endswith(("q_proj", "down_proj")):
                sides = [adapter[f"base_model.model.model.{name}.lora_{side}.weight"] for side in "AB"]
                module.weight += scale * sides[1] @ sides[0]
        for parameter in trained.model.multi_modal_projector.parameters():
            parameter += 0.1
    besides = {f"base_model.model.{n}": t for n, t in part(original_tensors(trained), "model.mm_projector.").items()}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "use_rslora": rslora, "rank_pattern": {}}
    files = {"adapter_model.bin": adapter, "non_lora_trainables.bin": besides, "adapter_config.json": settings}
    source = write(tmp_path / "plain", files, original_config(CONFIG), tokenizer=None)
    convert("import", "--llava", source, "--base", llm, "--vision", vision, "--output", tmp_path / "out")
    check_logits(trained, tmp_path / "out")
    # As in the original, the model computes what the adapter's own file says.
    other = json.loads((llm / "config.json").read_text()) | {"rms_norm_eps": 1e-3, "quantization_config": None}
    shutil.copytree(llm, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    capsys.readouterr()
    convert("import", "--llava", source, "--base", tmp_path / "other", "--vision", vision, "--output", tmp_path / "eps")
    assert (
        f"warning: {source}/config.json: its rms_norm_eps is 1e-05, that of the base 0.001" in capsys.readouterr().err
    )
    check_logits(trained, tmp_path / "eps")
    # The base may be a LLaVA itself.
    whole = write(tmp_path / "whole", {"pytorch_model.bin": tensors}, original_config(CONFIG))
    convert("import", "--llava", source, "--base", whole, "--vision", vision, "--output", tmp_path / "again")
    check_logits(trained, tmp_path / "again")


def test_a_difference_and_its_base(made, tmp_path):
    """In float16 as apply_delta adds them, with rows that the base does not have."""
    _, tensors, _, vision = made
    generator = torch.Generator().manual_seed(1)
    base, target = {}, {}
    for name, tensor in tensors.items():
        if "vision_tower" in name:
            continue
        target[name] = (tensor + 0.01 * torch.randn(tensor.shape, generator=generator)).half()
        if "mm_projector" not in name:
            rows = len(tensor) - 3 if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
            base[name] = tensor[:rows].half()
    difference = {name: tensor.clone() for name, tensor in target.items()}
    for name, tensor in base.items():
        difference[name][: len(tensor)] -= tensor
    text = reference.torch_text_config(dataclasses.replace(TEXT, vocab_size=TEXT.vocab_size - 3)).to_dict()
    llm = write(tmp_path / "llama", {"pytorch_model.bin": base}, text)
    source = write(tmp_path / "delta", {"pytorch_model.bin": difference}, original_config(CONFIG))
    convert("import", "--llava", source, "--base", llm, "--vision", vision, "--output", tmp_path / "out")
    params = open_checkpoint(tmp_path / "out").load()
    for ours, name in {
        "llm.embed_tokens.embedding": "model.embed_tokens.weight",
        "llm.norm.scale": "model.norm.weight",
        "projector.linear_1.bias": "model.mm_projector.0.bias",
    }.items():
        expected = difference[name].clone()
        if name in base:
            expected[: len(base[name])] += base[name]
        np.testing.assert_array_equal(np.asarray(params[ours]), expected)
    headless = {name: tensor for name, tensor in base.items() if name != "lm_head.weight"}
    tied = write(tmp_path / "tied", {"pytorch_model.bin": headless}, text)
    with pytest.raises(UserError, match="delta: lm_head.weight is a difference, but the base has no lm_head.weight"):
        convert("import", "--llava", source, "--base", tied, "--vision", vision, "--output", tmp_path / "other")
    with pytest.raises(UserError, match="is the difference from a base: give --base DIR"):
        convert("import", "--llava", source, "--vision", vision, "--output", tmp_path / "other")
    with pytest.raises(UserError, match="is a difference itself"):
        convert("import", "--llava", source, "--base", source, "--vision", vision, "--output", tmp_path / "other")


@pytest.mark.parametrize("rows", ["new", "all"])
def test_a_projector_trained_with_tokens_around_the_image(rows, made, tmp_path):
    _, tensors, llm, vision = made
    old = tensors["model.embed_tokens.weight"]
    new = torch.randn(2, old.shape[1], generator=torch.Generator().manual_seed(2))
    embeddings = new if rows == "new" else torch.cat([old, new])
    held = part(tensors, "model.mm_projector.") | {"model.embed_tokens.weight": embeddings}
    config = original_config(CONFIG, mm_use_im_start_end=True, vocab_size=TEXT.vocab_size + 2)
    source = write(tmp_path / "stage-1", {"mm_projector.bin": held}, config, tokenizer=None)
    convert("import", "--llava", source, "--base", llm, "--vision", vision, "--output", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.im_start_end
    assert checkpoint.config.text.vocab_size == TEXT.vocab_size + 2
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir)
    ids = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert ids == [TEXT.vocab_size, TEXT.vocab_size + 1]
    assert tokenizer.encode("<im_start>a", add_special_tokens=False)[0] == ids[0]
    params = checkpoint.load(["llm.embed_tokens.embedding", "llm.lm_head.kernel"])
    np.testing.assert_array_equal(params["llm.embed_tokens.embedding"], torch.cat([old, new]))
    head = np.asarray(params["llm.lm_head.kernel"]).T
    np.testing.assert_array_equal(head[:-2], tensors["lm_head.weight"])
    np.testing.assert_allclose(head[-2:], tensors["lm_head.weight"].mean(0).expand(2, -1), rtol=0, atol=1e-6)
    # The same file by itself, without the configuration that it was trained with.
    flags = ["--llm", llm, "--vision", vision, "--projector", source / "mm_projector.bin"]
    convert("import", *flags, "--output", tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").config == checkpoint.config


def spoilt_adapter(**fields):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": "lmsys/vicuna"} | fields


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({}, None, None),
        ({"use_dora": True}, None, "has lora_A and lora_B, not lora_A and lora_B and lora_magn"),
        ({"of_tomorrow": {"rank": 2}}, None, "of_tomorrow is {'rank': 2}, which is not supported"),
        ({"init_lora_weights": "pissa_niter_16"}, None, "is 'pissa_niter_16', which changes the base"),
        ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save has lm_head, of which it has no"),
        ({"r": 8}, None, r"q_proj.weight is \(48, 48\) in the base, r is 8, lora_A is \(4, 48\)"),
        ({"r": None}, None, "r is None"),
        ({}, lambda held: held.popitem(), "has lora_A, not lora_A and lora_B"),
        ({}, lambda held: held.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": 0}), "layers.9"),
        (
            {},
            lambda held: held.update({"base_model.model.model.embed_tokens.lora_embedding_A": 0}),
            "neither a LoRA matrix",
        ),
    ],
)
def test_adapters_that_are_refused(settings, change, message, made, tmp_path):
    model, tensors, llm, vision = made
    held = lora(model, rank=4)
    if change:
        change(held)
        held = {name: torch.zeros(4, 48) if isinstance(value, int) else value for name, value in held.items()}
    projector = {f"base_model.model.{n}": t for n, t in part(tensors, "model.mm_projector.").items()}
    files = {"adapter_model.bin": held, "adapter_config.json": spoilt_adapter(**settings)}
    source = write(tmp_path / "a", files | {"non_lora_trainables.bin": projector}, original_config(CONFIG))
    command = ["import", "--llava", source, "--vision", vision, "--output", tmp_path / "out"]
    if message is None:
        with pytest.raises(UserError, match=r"is an adapter: give --base DIR, .* \(lmsys/vicuna\)"):
            convert(*command)
    else:
        with pytest.raises(UserError, match=message):
            convert(*command, "--base", llm)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava_mpt"}, "model_type is 'llava_mpt'"),
        ({"image_aspect_ratio": "anyres"}, "grids: there are 0"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"mm_projector_type": "linear"}, "has mlp2x_gelu, not linear"),
        ({"mm_use_im_start_end": True}, "lacks: <im_start>, <im_end>"),
        ({"hidden_size": 96}, r"is \(.*48\), not"),
    ],
)
def test_configurations_that_are_refused(fields, message, made, tmp_path):
    _, tensors, _, vision = made
    source = write(tmp_path / "source", {"pytorch_model.bin": tensors}, original_config(CONFIG, **fields))
    with pytest.raises(UserError, match=message):
        convert("import", "--llava", source, "--vision", vision, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_too_much_is_named(made, tmp_path):
    _, tensors, llm, vision = made
    held = {n: t for n, t in tensors.items() if "vision_tower" not in n}
    source = write(tmp_path / "source", {"pytorch_model.bin": held}, original_config(CONFIG))
    command = ["import", "--llava", source, "--output", tmp_path / "out"]
    with pytest.raises(
        UserError, match="no vision tower: give --vision DIR, that of openai/clip-vit-large-patch14-336"
    ):
        convert(*command)
    with pytest.raises(UserError, match="a complete model, .*: leave --base out"):
        convert(*command, "--vision", vision, "--base", llm)
    without = {n: t for n, t in held.items() if "layers.1.mlp" not in n and "mm_projector.2.bias" not in n}
    torch.save(without, source / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"missing model\.layers\.1\.mlp\.gate_proj\.weight.*missing projector linear_2\.bias"
    ):
        convert(*command, "--vision", vision)
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="neither a model's weights .* nor an adapter"):
        convert(*command, "--vision", vision)
    shutil.copytree(llm, tmp_path / "llama")
    edit_json(tmp_path / "llama/config.json", mm_vision_tower="clip")
    with pytest.raises(UserError, match="model_type is 'llama'; supported are llava, llava_llama"):
        convert("import", "--llava", tmp_path / "llama", "--output", tmp_path / "out")
