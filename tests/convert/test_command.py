"""Import and export, against transformers' own files and models."""

import dataclasses
import json
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_reference as reference
from conversion import (
    CONFIG,
    LAYOUTS,
    TEXT,
    TIED,
    TOKENIZER,
    byte_level,
    check_logits,
    convert,
    edit,
    edit_json,
    load,
    rename,
    save_llava,
    save_sharded,
    tensors_of,
)
from forward import logits as our_logits
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoProcessor, CLIPConfig, CLIPModel

from configs import common
from llava_jax import cli
from llava_jax.checkpoint.format import absolute
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.cli import UserError
from llava_jax.convert.chat_template import chat_template
from llava_jax.convert.outgoing import write_shards
from llava_jax.data.conversation import place_images, render
from llava_jax.data.images import preprocess
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import IMAGE_TOKEN_INDEX, encode_turns, load_tokenizer
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request
from llava_jax.models.llava import abstract_params
from llava_jax.training.loop import train

pytestmark = pytest.mark.usefixtures("optimized")  # logits are compared to 1e-5: as users' programs compute them


@pytest.fixture(scope="module")
def llava_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava")
    save_llava(CONFIG, directory)
    return directory


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Directories of a LLaMA (without a row for images) and a CLIP."""
    llm, vision = tmp_path_factory.mktemp("llm"), tmp_path_factory.mktemp("vision")
    tokenizer = byte_level()
    reference.llama(dataclasses.replace(TEXT, vocab_size=len(tokenizer))).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    reference.clip(CONFIG.vision, seed=1).save_pretrained(vision)
    return llm, vision


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a directory to spoil."""
    return lambda directory: Path(shutil.copytree(directory, tmp_path / f"copy-of-{directory.name}"))


# Import


@pytest.mark.parametrize("form", ["one file", "shards", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_llava(layout, form, llava_dir, copy_of, tmp_path):
    source = copy_of(llava_dir)
    tensors = rename(load_file(source / "model.safetensors"), LAYOUTS[layout])
    tensors["language_model.model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    if form == "one file":
        save_file(tensors, source / "model.safetensors")
    elif form == "shards":
        save_sharded(tensors, source)
    else:
        (source / "model.safetensors").unlink()
        torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, source / "pytorch_model.bin")
    convert("import", "--llava", source, "--output", tmp_path / "out")
    check_logits(load(llava_dir), tmp_path / "out")


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_an_import_quantizes_as_a_run_does(base_dtype, llava_dir, tmp_path):
    convert("import", "--llava", llava_dir, "--output", tmp_path / "plain")
    convert("import", "--llava", llava_dir, "--output", tmp_path / "small", "--base-dtype", base_dtype)
    expected = open_checkpoint(tmp_path / "plain").quantized(base_dtype).load()
    found = open_checkpoint(tmp_path / "small")
    assert found.config.base_dtype == base_dtype
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.stored.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    for name, value in found.load().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    with pytest.raises(UserError, match=f"its language model is {base_dtype}, and config.base_dtype is bfloat16"):
        found.quantized("bfloat16")

    convert("export", "--checkpoint", tmp_path / "small", "--output", tmp_path / "hf")
    convert("import", "--llava", tmp_path / "hf", "--output", tmp_path / "again")
    dequantized = found.dequantized().load()
    for name, value in open_checkpoint(tmp_path / "again").load().items():
        np.testing.assert_allclose(value, dequantized[name], rtol=2.0**-22, atol=1e-8, err_msg=name)


def test_a_malicious_file_ends_the_command_with_one_line(llava_dir, copy_of, tmp_path, capsys):
    source = copy_of(llava_dir)
    (source / "model.safetensors").unlink()
    torch.save({"weight": Attack(tmp_path / "owned")}, source / "pytorch_model.bin")
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: convert("import", "--llava", source, "--output", tmp_path / "out"))
    assert left.value.code == 1
    told = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error: .*pytorch_model\.bin: asks to run posix\.mkdir, which no weights need.*", told)
    assert {entry.name for entry in tmp_path.iterdir()} == {source.name}


@pytest.mark.parametrize(
    "config",
    [
        TIED,
        dataclasses.replace(CONFIG, select_layer=3, select_feature="cls_patch"),
        dataclasses.replace(CONFIG, select_layer=-1),
        dataclasses.replace(CONFIG, select_layer=(-1, 2), select_feature="cls_patch"),
    ],
    ids=["tied", "cls", "last layer", "several layers"],
)
def test_kinds_of_llava_there_and_back(config, tmp_path):
    model = save_llava(config, tmp_path / "source")
    convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config == config
    check_logits(model, tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    check_logits(load(tmp_path / "hf"), tmp_path / "out")


def test_backbones(backbones, tmp_path):
    llm, vision = backbones
    flags = ["--projector-type", "linear", "--template", "llava_v0", "--aspect", "square", "--select-layer", "-1"]
    convert("import", "--llm", llm, "--vision", vision, "--output", tmp_path / "out", *flags)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.template == "llava_v0"
    config = checkpoint.config
    assert (config.projector_type, config.image_aspect, config.select_layer) == ("linear", "square", -1)
    assert config.vision == CONFIG.vision
    params = checkpoint.load()
    expected = reference.clip_params(reference.clip(CONFIG.vision, seed=1), CONFIG.vision)
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value)


def test_a_fresh_projector_is_a_function_of_the_seed(backbones, tmp_path):
    kernels = {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        convert("import", "--llm", backbones[0], "--vision", backbones[1], "--output", tmp_path / name, "--seed", seed)
        kernels[name] = open_checkpoint(tmp_path / name).load(["projector.linear_2.kernel"])[
            "projector.linear_2.kernel"
        ]
    np.testing.assert_array_equal(kernels["a"], kernels["b"])
    assert not np.array_equal(kernels["a"], kernels["c"])
    bound = TEXT.hidden_size**-0.5
    assert kernels["a"].dtype == jnp.float32
    assert 0.9 * bound < abs(kernels["a"]).max() <= bound


def test_a_whole_clip_brings_its_tower(backbones, tmp_path):
    vision_config = reference.torch_vision_config(CONFIG.vision).to_dict()
    text_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = reference.randomize(CLIPModel(CLIPConfig(vision_config=vision_config, text_config=text_config)))
    whole.save_pretrained(tmp_path / "clip")
    edit(tmp_path / "clip", lambda held: held.update({"vision_model.embeddings.position_ids": np.arange(10)}))
    convert("import", "--llm", backbones[0], "--vision", tmp_path / "clip", "--output", tmp_path / "out")
    stored = open_checkpoint(tmp_path / "out").load(["vision.class_embedding"])["vision.class_embedding"]
    np.testing.assert_array_equal(stored, whole.vision_model.embeddings.class_embedding.detach())


@pytest.mark.parametrize(
    ("prefix", "names", "expected"),
    [
        ("multi_modal_projector.", ["linear_1", "linear_2"], "mlp2x_gelu"),
        ("model.multi_modal_projector.", ["linear_1", "linear_2", "linear_3"], "mlp3x_gelu"),
        ("model.mm_projector.", ["0", "2"], "mlp2x_gelu"),
        ("model.mm_projector", [""], "linear"),
    ],
)
def test_projector_files(prefix, names, expected, backbones, tmp_path):
    rng, width = np.random.default_rng(0), CONFIG.vision.hidden_size
    tensors = {}
    for name in names:
        tensors[f"{prefix}{name}.weight"] = rng.normal(size=(TEXT.hidden_size, width)).astype(np.float16)
        tensors[f"{prefix}{name}.bias"] = rng.normal(size=TEXT.hidden_size).astype(np.float16)
        width = TEXT.hidden_size
    save_file(tensors, tmp_path / "projector.safetensors")
    flags = ["--llm", backbones[0], "--vision", backbones[1], "--projector", tmp_path / "projector.safetensors"]
    convert("import", *flags, "--output", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.projector_type == expected
    last = len(names)
    params = checkpoint.load([f"projector.linear_{last}.kernel", f"projector.linear_{last}.bias"])
    np.testing.assert_array_equal(params[f"projector.linear_{last}.kernel"].T, tensors[f"{prefix}{names[-1]}.weight"])
    np.testing.assert_array_equal(params[f"projector.linear_{last}.bias"], tensors[f"{prefix}{names[-1]}.bias"])
    with pytest.raises(UserError, match=f"has {expected}, not mlp7x_gelu"):
        convert("import", *flags, "--output", tmp_path / "other", "--projector-type", "mlp7x_gelu")


def test_an_error_lists_all_keys(llava_dir, copy_of, tmp_path):
    source = copy_of(llava_dir)

    def spoil(tensors):
        del tensors["vision_tower.post_layernorm.bias"], tensors["language_model.model.layers.1.mlp.up_proj.weight"]
        tensors["language_model.model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
        tensors["image_newline"] = np.zeros(3, np.float32)
        tensors["multi_modal_projector.linear_1.bias"] = np.zeros(3, np.float32)
        tensors["language_model.model.norm.weight"] = np.ones(TEXT.hidden_size, np.float64)

    edit(source, spoil)
    with pytest.raises(UserError) as error:
        convert("import", "--llava", source, "--output", tmp_path / "out")
    for problem in (
        "missing vision_tower.post_layernorm.bias",
        "missing language_model.model.layers.1.mlp.up_proj.weight",
        "unexpected language_model.model.layers.0.self_attn.q_proj.bias",
        "unexpected image_newline",
        "multi_modal_projector.linear_1.bias is (3,), not (48,)",
        "language_model.model.norm.weight is F64",
    ):
        assert problem in str(error.value)
    assert not (tmp_path / "out").exists()


def test_problems_of_both_backbones_are_listed_together(backbones, copy_of, tmp_path):
    llm, vision = map(copy_of, backbones)
    edit(llm, lambda held: held.pop("lm_head.weight"))
    edit(vision, lambda held: held.update({"head.weight": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"missing lm_head\.weight.*unexpected head\.weight"):
        convert("import", "--llm", llm, "--vision", vision, "--output", tmp_path / "out")


def test_a_head_stored_beside_tied_embeddings_must_be_equal(tmp_path):
    save_llava(TIED, tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    assert "language_model.lm_head.weight" not in tensors
    head = tensors["language_model.model.embed_tokens.weight"].copy()
    edit(tmp_path / "source", lambda held: held.update({"language_model.lm_head.weight": head}))
    convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out")
    head[0, 0] += 1
    edit(tmp_path / "source", lambda held: held.update({"language_model.lm_head.weight": head}))
    with pytest.raises(UserError, match="lm_head.weight is not embed_tokens.weight"):
        convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out2")


def test_nothing_is_decided_by_names_of_paths(llava_dir, copy_of, tmp_path):
    source = copy_of(llava_dir).rename(tmp_path / "mpt-lora-v0")
    convert("import", "--llava", source, "--output", tmp_path / "plain-bert")
    (tmp_path / "plain-bert").rename(tmp_path / "moved")
    check_logits(load(llava_dir), tmp_path / "moved")


def without(name):
    return lambda directory: (directory / name).unlink()


def spoil_json(name, **fields):
    return lambda directory: edit_json(directory / name, **fields)


def mixed_layers(directory):
    def change(tensors):
        tensors["language_model.model.layers.1.mlp.up_proj.weight"] = np.zeros((80, 48), np.float16)

    edit(directory, change)


def no_torch_file(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def lost_shard(directory):
    save_sharded(load_file(directory / "model.safetensors"), directory)
    sorted(directory.glob("*.safetensors"))[1].unlink()


def truncated_shard(directory):
    save_sharded(load_file(directory / "model.safetensors"), directory)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def twice_in_shards(directory):
    tensors = load_file(directory / "model.safetensors")
    save_sharded(tensors, directory)
    shard = sorted(directory.glob("*.safetensors"))[-1]
    save_file(
        load_file(shard) | {"language_model.model.norm.weight": tensors["language_model.model.norm.weight"]}, shard
    )


def twice_in_layouts(directory):
    edit(directory, lambda held: held.update({"lm_head.weight": held["language_model.lm_head.weight"]}))


def incomplete_index(directory):
    tensors = load_file(directory / "model.safetensors")
    save_sharded(tensors, directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["lost.weight"] = next(iter(index["weight_map"].values()))
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def preprocessor(**fields):
    return lambda directory: (directory / "preprocessor_config.json").write_text(json.dumps(fields))


def no_tokenizer(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()


def overwritten(name, text="version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"):
    return lambda directory: (directory / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (overwritten("config.json"), "copy-of-[^/]+/config.json: is a Git LFS pointer"),
        (overwritten("model.safetensors"), "copy-of-[^/]+/model.safetensors: is a Git LFS pointer.*git lfs pull"),
        (overwritten("tokenizer.json"), "copy-of-[^/]+/tokenizer.json: is a Git LFS pointer"),
        (overwritten("tokenizer.json", "{"), "copy-of-[^/]+/tokenizer.json: is no JSON"),
        (overwritten("tokenizer.json", "{}"), "copy-of-[^/]+: holds no tokenizer that transformers reads"),
        (no_torch_file, r"pytorch_model.bin: not a whole file of torch.save \(it is no zip\)"),
        (mixed_layers, "layers of different types: .* is F32, layers.1.mlp.up_proj.weight is F16"),
        (truncate, "not a whole safetensors file"),
        (without("model.safetensors"), "no weights"),
        (without("config.json"), "config.json: no such file"),
        (spoil_json("config.json", model_type="llava_onevision"), "model_type is 'llava_onevision'"),
        (spoil_json("config.json", projector_hidden_act="linear"), "linear_2 is not the identity"),
        (incomplete_index, "the shards lack lost.weight"),
        (lost_shard, r"index.json: names model-00002-of-\d+.safetensors, which does not exist; download it again"),
        (truncated_shard, r"model-00002-of-\d+.safetensors: not a whole safetensors file"),
        (twice_in_shards, "holds language_model.model.norm.weight, as another file beside it does"),
        (twice_in_layouts, "lm_head.weight and (language_model.)?lm_head.weight are the same tensor"),
        (no_tokenizer, "no tokenizer"),
        (preprocessor(size={"shortest_edge": 336}), "the vision tower takes 24 pixels"),
        (preprocessor(crop_size=336), "the vision tower takes 24 pixels"),
        (preprocessor(resample=0), "resample is 0; only 2 .bilinear. and 3"),
        (preprocessor(do_normalize=False), "do_normalize is False"),
        (preprocessor(do_center_crop=False), "do_center_crop is false"),
        (preprocessor(rescale_factor=1 / 127.5), "rescale_factor"),
    ],
)
def test_bad_sources_are_refused(spoil, message, llava_dir, copy_of, tmp_path):
    source = copy_of(llava_dir)
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert("import", "--llava", source, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--select-layer", "-1"], "has -2, not -1: leave --select-layer out"),
        (["--select-feature", "cls_patch"], "has patch, not cls_patch"),
        (["--projector-type", "linear"], "has mlp2x_gelu, not linear"),
        (["--template", "vicuna_v11"], "did you mean vicuna_v1"),
        (["--grid-order", "original"], "is no model with AnyRes: leave --grid-order out"),
    ],
)
def test_flags_that_contradict_the_source_are_refused(flags, message, llava_dir, tmp_path):
    with pytest.raises(UserError, match=message):
        convert("import", "--llava", llava_dir, "--output", tmp_path / "out", *flags)


def test_flags_that_make_no_sense(backbones, llava_dir, tmp_path):
    for flags in (["--llm", backbones[0]], ["--llava", llava_dir, "--llm", backbones[0]], []):
        with pytest.raises(SystemExit):
            convert("import", *flags, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="select_layer 9 is not among 4 layers"):
        flags = ["--llm", backbones[0], "--vision", backbones[1], "--select-layer", 9]
        convert("import", *flags, "--output", tmp_path / "out")


def test_rows_are_all_kept_or_as_many_as_the_tokenizer_has_ids(backbones, copy_of, tmp_path):
    llm, vision = map(copy_of, backbones)
    rows = len(byte_level())
    embeddings = tensors_of(llm)["model.embed_tokens.weight"]

    def resize(count):
        def change(held):
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                held[name] = np.resize(held[name], (count, TEXT.hidden_size))

        edit(llm, change)
        edit_json(llm / "config.json", vocab_size=count)

    def imported(name, *flags):
        convert("import", "--llm", llm, "--vision", vision, "--output", tmp_path / name, *flags)
        checkpoint = open_checkpoint(tmp_path / name)
        params = checkpoint.load(["llm.embed_tokens.embedding", "llm.lm_head.kernel"])
        assert params["llm.lm_head.kernel"].shape[1] == checkpoint.config.text.vocab_size
        return np.asarray(params["llm.embed_tokens.embedding"])

    resize(rows + 5)
    assert len(imported("kept")) == rows + 5
    np.testing.assert_array_equal(imported("trimmed", "--rows", "tokenizer"), embeddings)
    resize(rows - 2)
    with pytest.raises(UserError, match=f"ids up to {rows - 1}, the model {rows - 2} rows: .* --rows tokenizer"):
        imported("refused")
    grown = imported("grown", "--rows", "tokenizer")
    np.testing.assert_array_equal(grown[:-2], embeddings[:-2])
    np.testing.assert_allclose(grown[-2:], embeddings[:-2].mean(0)[None].repeat(2, 0), rtol=0, atol=1e-6)


def write_gguf(model, tokenizer, path: Path, values: dict | None = None, tensors: dict | None = None) -> None:
    """As llama.cpp's converter does, which stores the two halves of rotated heads interleaved; and more."""
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (values or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 4 + [1] * (config.vocab_size - 4))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for projection, heads in {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.items():
            if projection in name:
                halves = values.reshape(heads, 2, -1, config.hidden_size)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_comes_in_through_transformers(backbones, tmp_path):
    tokenizer = byte_level(specials=("<s>", "</s>", "<pad>", "<|endoftext|>"))  # which transformers adds otherwise
    text = dataclasses.replace(TEXT, vocab_size=len(tokenizer))
    model = reference.llama(text)
    file = tmp_path / "model.gguf"
    write_gguf(model, tokenizer, file)
    convert("import", "--llm", file, "--vision", backbones[1], "--output", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    found = checkpoint.config.text
    assert dataclasses.replace(found, rms_norm_eps=round(found.rms_norm_eps, 9)) == text  # a float32 there
    assert load_tokenizer(checkpoint.tokenizer_dir).get_vocab() == tokenizer.get_vocab()
    params = checkpoint.load()
    for name, value in reference.llama_params(model, text).items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)

    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    for llm, message in {
        tmp_path / "no.gguf": "no.gguf: a damaged GGUF file",
        tmp_path: "holds model.gguf, no.gguf: give one of these files itself",
        checkpoint.tokenizer_dir / "tokenizer.json": "neither a directory with a config.json nor a GGUF file",
    }.items():
        with pytest.raises(UserError, match=message):
            convert("import", "--llm", llm, "--vision", backbones[1], "--output", tmp_path / "other")


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({}, {"rope_freqs.weight": 6}, "rope_freqs.weight scales its RoPE, which transformers does not read"),
        ({"llama.rope.scaling.type": "linear"}, {}, "rope.scaling.type is 'linear', which transformers does not"),
        ({"llama.attention.sliding_window": 8}, {}, "attention.sliding_window is 8, transformers reads None"),
        ({}, {"blk.0.attn_q.bias": 48}, r"holds \d+ numbers, of which transformers reads \d+; import the model from"),
    ],
)
def test_what_transformers_leaves_out_of_a_gguf_file_is_refused(values, tensors, message, backbones, tmp_path):
    tokenizer = byte_level(specials=("<s>", "</s>", "<pad>", "<|endoftext|>"))
    model = reference.llama(dataclasses.replace(TEXT, vocab_size=len(tokenizer)))
    tensors = {name: np.ones(size, np.float32) for name, size in tensors.items()}
    write_gguf(model, tokenizer, tmp_path / "model.gguf", values, tensors)
    flags = ["--vision", backbones[1], "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=f"model.gguf: {message}"):
        convert("import", "--llm", tmp_path / "model.gguf", *flags)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_any_work(llava_dir, tmp_path):
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        convert("import", "--llava", llava_dir, "--output", tmp_path)
    convert("import", "--llava", llava_dir, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"


LLAVA_PROCESSOR = {"image_processor_type": "LlavaImageProcessorFast"}


@pytest.mark.parametrize(
    ("settings", "flags", "aspect"),
    [
        (None, [], "pad"),
        ({"do_pad": True}, [], "pad"),
        ({"do_pad": False}, [], "square"),
        ({"do_pad": False}, ["--aspect", "pad"], "pad"),
        ({"size": {"height": 24, "width": 24}}, [], "resize"),
        ({"size": {"height": 24, "width": 24}, **LLAVA_PROCESSOR, "do_pad": True}, [], "pad"),
        ({"size": {"height": 24, "width": 24}, **LLAVA_PROCESSOR, "do_pad": False}, [], "resize"),
    ],
)
def test_image_settings_come_from_the_source(settings, flags, aspect, llava_dir, copy_of, tmp_path):
    source = copy_of(llava_dir)
    if settings is not None:
        preprocessor(**settings, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1])(source)
    convert("import", "--llava", source, "--output", tmp_path / "out", *flags)
    config = open_checkpoint(tmp_path / "out").config
    assert config.image_aspect == aspect
    if settings is not None:
        assert (config.image_mean, config.image_std) == ((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))


def test_a_bare_sentencepiece_model(backbones, llama_dir, tmp_path):
    """LLaMA's 32,000 pieces leave no rows for `<image>` and `<pad>`."""
    llm = tmp_path / "llm"
    reference.llama(dataclasses.replace(TEXT, vocab_size=32000)).save_pretrained(llm)
    for file in llama_dir.iterdir():
        shutil.copy(file, llm)
    convert("import", "--llm", llm, "--vision", backbones[1], "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    model = load(tmp_path / "hf")
    assert model.get_input_embeddings().num_embeddings == 32064
    processor, ours = AutoProcessor.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "out/tokenizer")
    assert (processor.image_token_id, model.config.image_token_id) == (32000, 32000)
    pads = (processor.tokenizer, model.config, model.config.text_config, model.generation_config)
    assert [each.pad_token_id for each in pads] == [32001] * 4
    turns = [("user", "What is it?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", None)]
    ids = encode_turns(turns, get_template("v1"), ours).input_ids
    text = render(turns, get_template("v1")).text
    assert processor(text=text)["input_ids"][0] == ids.tolist()
    assert ids[0] == ours.bos_token_id


# Export


def test_round_trip_is_bit_equal_in_mixed_types(llava_dir, copy_of, tmp_path):
    """As real checkpoints have them, down to NaNs; twice there and back."""
    source = copy_of(llava_dir)
    dtypes = {"vision_tower": np.float32, "multi_modal_projector": ml_dtypes.bfloat16, "language_model": np.float16}
    rng = np.random.default_rng(0)

    def random_bits(tensors):
        for name, tensor in tensors.items():
            dtype = np.dtype(dtypes[name.split(".")[0]])
            data = rng.integers(0, 256, tensor.size * dtype.itemsize, np.uint8)
            tensors[name] = data.view(dtype).reshape(tensor.shape)

    edit(source, random_bits)
    edit_json(source / "config.json", ignore_index=-100, pad_token_id=2)
    expected = rename(tensors_of(source), LAYOUTS["L1"])
    for name in ("first", "second"):
        convert("import", "--llava", source, "--output", tmp_path / name)
        source = tmp_path / f"{name}-hf"
        convert("export", "--checkpoint", tmp_path / name, "--output", source)
        exported = tensors_of(source)
        assert set(exported) == set(expected)
        for key, tensor in exported.items():
            assert tensor.dtype == expected[key].dtype
            assert tensor.shape == expected[key].shape
            assert tensor.tobytes() == expected[key].tobytes(), key
        config = json.loads((source / "config.json").read_text())
        assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (3, len(TOKENIZER))
        assert (config["ignore_index"], config["pad_token_id"], config["torch_dtype"]) == (-100, 2, "float32")
        assert load_tokenizer(source).get_vocab() == TOKENIZER.get_vocab()


def test_a_training_run_gives_what_it_trained_and_its_source_the_rest(llava_dir, tmp_path):
    source = tmp_path / "source"
    convert("import", "--llava", llava_dir, "--output", source)
    imported = open_checkpoint(source)
    trained = {name: value + 0.01 for name, value in imported.load().items() if name.startswith("projector.")}
    workdir = absolute(tmp_path / "run")
    frozen = set(imported.abstract()) - set(trained)
    description = dataclasses.replace(
        imported.description, sources=imported.sources_of(frozen, workdir), stage="pretrain"
    )
    checkpoints = TrainingCheckpoints(workdir, description, keep=1)
    checkpoints.save(7, trained, {"count": jnp.zeros(())}, wait=True)
    checkpoints.close()
    shutil.copytree(source / "tokenizer", workdir / "tokenizer")

    convert("export", "--checkpoint", workdir, "--output", tmp_path / "hf")
    exported, expected = tensors_of(tmp_path / "hf"), rename(tensors_of(llava_dir), LAYOUTS["L1"])
    for name, tensor in exported.items():
        added = 0.01 if name.startswith("multi_modal_projector") else 0
        np.testing.assert_array_equal(tensor, expected[name] + np.float32(added), err_msg=name)
    check_logits(load(tmp_path / "hf"), workdir)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_in_another_type(dtype, llava_dir, tmp_path):
    convert("import", "--llava", llava_dir, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf", "--dtype", dtype)
    exported, source = tensors_of(tmp_path / "hf"), rename(tensors_of(llava_dir), LAYOUTS["L1"])
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, source[name].astype(tensor.dtype))
    assert {tensor.dtype.name for tensor in exported.values()} == {dtype}
    assert str(load(tmp_path / "hf").dtype) == f"torch.{dtype}"


def test_a_linear_projector_is_one_of_two_layers_there(backbones, tmp_path):
    flags = ["--llm", backbones[0], "--vision", backbones[1], "--projector-type", "linear"]
    convert("import", *flags, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    check_logits(load(tmp_path / "hf"), tmp_path / "out")
    convert("import", "--llava", tmp_path / "hf", "--output", tmp_path / "again")
    before, after = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "again")
    rows = before.config.text.vocab_size
    assert after.config == dataclasses.replace(
        before.config, text=dataclasses.replace(before.config.text, vocab_size=after.config.text.vocab_size)
    )
    for name, value in before.load().items():
        loaded = after.load([name])[name]
        loaded = loaded[:rows] if "embed_tokens" in name else loaded[:, :rows] if "lm_head" in name else loaded
        np.testing.assert_array_equal(value, loaded)


def test_no_projector_of_three_layers_there(backbones, tmp_path):
    flags = ["--llm", backbones[0], "--vision", backbones[1], "--projector-type", "mlp3x_gelu"]
    convert("import", *flags, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="Hugging Face has no projector mlp3x_gelu"):
        convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("aspect", ["pad", "square", "resize"])
@pytest.mark.parametrize("template", ["v1", "llava_v0", "chatml_direct"])
def test_the_processor_sees_what_we_see(template, aspect, backbones, tmp_path):
    """The same text, ids and pixels as ours, and the logits of a picture in a conversation."""
    flags = ["--llm", backbones[0], "--vision", backbones[1], "--aspect", aspect, "--template", template]
    convert("import", *flags, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    checkpoint, processor = open_checkpoint(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "hf")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 30, 3), np.uint8))

    content = [{"type": "image"}, {"type": "text", "text": "What is the colour of the shape?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    turns = [*place_images([("user", "<image>" + content[1]["text"])], "first", 0, ""), ("assistant", None)]
    template = get_template(template)
    assert text == render(turns, template).text

    inputs = processor(images=picture, text=text, return_tensors="pt")
    ids = encode_turns(turns, template, load_tokenizer(checkpoint.tokenizer_dir)).input_ids
    image_id, P = processor.image_token_id, checkpoint.config.image_tokens
    expanded = [i for id in ids for i in ([image_id] * P if id == IMAGE_TOKEN_INDEX else [id])]
    assert inputs["input_ids"][0].tolist() == expanded

    image = preprocess(picture, CONFIG.vision.image_size, aspect, checkpoint.config.image_mean)
    pixels = (image / 255 - checkpoint.config.image_mean) / checkpoint.config.image_std
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy().transpose(1, 2, 0), pixels, atol=1e-5)

    batch = {
        "tokens": np.array([[0 if id == image_id else id for id in expanded]], np.int32),
        "image_feature_index": np.full((1, len(expanded)), -1, np.int32),
        "segment_ids": np.ones((1, len(expanded)), np.int32),
        "positions": np.arange(len(expanded), dtype=np.int32)[None],
        "images": image[None, None],
    }
    batch["image_feature_index"][0, np.array(expanded) == image_id] = np.arange(P)
    with torch.no_grad():
        # In float64: what differs is the rounding of one side alone, whatever the instructions of the CPU are.
        inputs["pixel_values"] = inputs["pixel_values"].double()
        theirs = load(tmp_path / "hf").double()(**inputs).logits.numpy()
    ours = our_logits(checkpoint.config, checkpoint.load(), batch)
    np.testing.assert_allclose(ours, theirs[..., : ours.shape[-1]], atol=1e-5)


def test_where_images_stand_goes_along(backbones, tmp_path):
    flags = ["--llm", backbones[0], "--vision", backbones[1], "--image-position", "as_is"]
    convert("import", *flags, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    convert("import", "--llava", tmp_path / "hf", "--output", tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").config.image_position == "as_is"
    content = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}]
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    assert "USER: What is <image>\n? ASSISTANT:" in processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    convert("import", "--llava", tmp_path / "hf", "--image-position", "first", "--output", tmp_path / "first")
    assert open_checkpoint(tmp_path / "first").config.image_position == "first"


def test_new_rows_are_the_mean_of_the_others_and_never_win(backbones, tmp_path):
    llm, vision = backbones
    convert("import", "--llm", llm, "--vision", vision, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    exported, source = tensors_of(tmp_path / "hf"), tensors_of(llm)
    rows = TEXT.vocab_size - 1  # the backbone has no <image>
    for name, tensor in source.items():
        there = exported[f"language_model.{name}"]
        np.testing.assert_array_equal(there[: len(tensor)], tensor)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(there) % 64 == 0 and len(tensor) == rows
            np.testing.assert_allclose(there[rows:], np.tile(tensor.mean(axis=0), (len(there) - rows, 1)), atol=1e-6)
    model = load(tmp_path / "hf")
    assert model.config.image_token_id == rows
    with torch.no_grad():
        logits = model(input_ids=torch.arange(rows)[None]).logits[0]
    assert (logits.argmax(dim=-1) < rows).all()


def test_generation_settings_can_be_saved_again(llava_dir, copy_of, tmp_path):
    """Vicuna's have a temperature beside greedy decoding, which save_pretrained refuses."""
    source = copy_of(llava_dir)
    (source / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "bos_token_id": 0, "max_length": 4096, "eos_token_id": 5})
    )
    convert("import", "--llava", source, "--output", tmp_path / "out", "--template", "chatml_direct")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    model = load(tmp_path / "hf")
    model.save_pretrained(tmp_path / "again")
    assert (model.generation_config.max_length, model.generation_config.eos_token_id) == (4096, 5)
    assert not model.generation_config.temperature


def test_large_models_are_sharded(llava_dir, tmp_path, monkeypatch):
    convert("import", "--llava", llava_dir, "--output", tmp_path / "out")
    monkeypatch.setattr(write_shards, "__defaults__", (100_000,))
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    shards = sorted(tmp_path.glob("hf/*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert not list(tmp_path.glob("hf/*.partial"))
    check_logits(load(tmp_path / "hf"), tmp_path / "out")


@pytest.mark.parametrize(
    ("free", "message"),
    [(10**5, "the weights take .* GB are free"), (10**12, "hf: cannot be written .File too large.")],
)
def test_a_full_disk_leaves_nothing(free, message, llava_dir, tmp_path, monkeypatch):
    convert("import", "--llava", llava_dir, "--output", tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # no file may grow beyond: an error of the system
    try:
        with pytest.raises(UserError, match=message) as raised:
            convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_type_that_cannot_hold_the_weights_is_refused(llava_dir, copy_of, tmp_path):
    source = copy_of(llava_dir)
    edit(source, lambda tensors: tensors["multi_modal_projector.linear_1.bias"].__setitem__(0, 1e6))
    convert("import", "--llava", source, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="projector.linear_1.bias has values beyond 65504.*--dtype bfloat16"):
        convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf", "--dtype", "float16")
    assert not (tmp_path / "hf").exists()


def test_models_with_im_start_end_keep_their_two_tokens(llava_dir, copy_of, tmp_path):
    spoilt = copy_of(llava_dir)
    edit_json(spoilt / "config.json", mm_use_im_start_end=True)
    with pytest.raises(UserError, match="lacks: <im_start>, <im_end>"):
        convert("import", "--llava", spoilt, "--output", tmp_path / "spoilt")

    tokenizer = byte_level(specials=("<s>", "</s>", "<pad>", "<image>", "<im_start>", "<im_end>"))
    source, imported, exported = tmp_path / "source", tmp_path / "imported", tmp_path / "exported"
    model = save_llava(
        dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, vocab_size=len(tokenizer))),
        source,
        mm_use_im_start_end=True,
    )
    tokenizer.save_pretrained(source)
    convert("import", "--llava", source, "--output", imported)
    check_logits(model, imported)

    generator = Generator.from_checkpoint(open_checkpoint(imported))
    ids = generator.prompts.encode(Request([("user", "<image>\nhi")], ["a.png"]))
    under = np.flatnonzero(ids.image_feature_index >= 0)
    around = ids.tokens[[under[0] - 1, under[-1] + 1]].tolist()
    assert around == tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])

    convert("export", "--checkpoint", imported, "--output", exported)
    processor = AutoProcessor.from_pretrained(exported)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert "USER: <im_start><image><im_end>\nhi ASSISTANT:" in text
    assert json.loads((exported / "config.json").read_text())["mm_use_im_start_end"] is True

    config = common.get_config()
    config.init = str(imported)
    with pytest.raises(UserError, match="mm_use_im_start_end"):
        train(config, str(tmp_path / "stage_1"))


def test_the_checkpoint_holds_the_whole_model(llava_dir, tmp_path):
    convert("import", "--llava", llava_dir, "--output", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {name: leaf.shape for name, leaf in checkpoint.abstract().items()} == {
        name: leaf.shape for name, leaf in abstract_params(CONFIG).items()
    }


# Template and tokenizer


FIT_ROWS = ("--rows", "tokenizer")
CHATML_MARKS = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")


def with_chat_template(backbones, copy_of, jinja: str | None, specials=CHATML_MARKS, eos="</s>") -> Path:
    """The language model with another tokenizer."""
    llm = copy_of(backbones[0])
    tokenizer = byte_level(specials, eos=eos)
    tokenizer.chat_template = jinja
    tokenizer.save_pretrained(llm)
    return llm


def test_the_template_is_that_of_the_tokenizers_chat_template(backbones, copy_of, tmp_path, capsys):
    llm = with_chat_template(backbones, copy_of, chat_template(get_template("chatml_direct"), "Answer the questions."))
    convert("import", "--llm", llm, "--vision", backbones[1], *FIT_ROWS, "--output", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").template == "chatml_direct"
    assert "template chatml_direct, which is the tokenizer's own chat template\n" in capsys.readouterr().err
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    convert("import", "--llava", tmp_path / "hf", "--output", tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").template == "chatml_direct"


def test_another_chat_template_is_told(backbones, copy_of, tmp_path, capsys):
    llm = with_chat_template(backbones, copy_of, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    convert("import", "--llm", llm, "--vision", backbones[1], *FIT_ROWS, "--output", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").template == "v1"
    assert (
        "template v1, since the tokenizer has a chat template that is none of the templates" in capsys.readouterr().err
    )


def test_a_template_whose_marks_are_no_tokens(backbones, copy_of, tmp_path, capsys):
    llm = with_chat_template(backbones, copy_of, None, specials=("<s>", "<|end|>", "<pad>"), eos="<|end|>")
    flags = ["--llm", llm, "--vision", backbones[1], *FIT_ROWS, "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=r"template v1 does not fit the tokenizer: </s> is \d tokens .*--template NAME"):
        convert("import", *flags)
    assert not (tmp_path / "out").exists()
    convert("import", *flags, "--template", "v1")  # asked for
    assert "warning: template v1 does not fit the tokenizer: </s> is" in capsys.readouterr().err
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    assert "so an exported model does not stop after an answer" in capsys.readouterr().err
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["stop_strings"] == ["</s>"]


@pytest.mark.parametrize(("template", "end"), [("v1", "</s>"), ("chatml_direct", "<|im_end|>"), ("plain", "\n")])
def test_an_export_stops_where_answers_end(template, end, backbones, copy_of, tmp_path):
    llm = with_chat_template(backbones, copy_of, None)
    flags = ["--llm", llm, "--vision", backbones[1], *FIT_ROWS, "--template", template]
    convert("import", *flags, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    ids = generation["eos_token_id"]
    decoded = [load_tokenizer(tmp_path / "hf").decode([id]) for id in (ids if isinstance(ids, list) else [ids])]
    assert end in decoded and "stop_strings" not in generation


def test_an_export_whose_answers_end_with_a_text_stops_there(backbones, tmp_path):
    """`###` is several tokens; `generate` of transformers stops at it once it is given the tokenizer."""
    flags = ["--llm", backbones[0], "--vision", backbones[1], "--template", "llava_v0"]
    convert("import", *flags, "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    assert load(tmp_path / "hf").generation_config.stop_strings == ["###"]
