"""Adapters as PEFT loads them on the exported base, and as the loaders of servers look for them."""

import dataclasses
import json
import re

import numpy as np
import peft
import pytest
import tiny
from adapters import adapter, lora, workdir
from forward import logits, make_batch, random_images, torch_logits
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.__main__ import main
from llava_jax.convert.adapter import read_adapter
from llava_jax.convert.served_adapter import read_for
from llava_jax.data.anyres import AnyRes, Grid
from llava_jax.models.config import TextConfig

TOWER = (r"llm\.layers\..*_proj", r"vision\.layers\..*fc1")
KINDS = {
    "lora": lora(),
    "rslora": lora(rslora=True),
    "dora": lora(dora=True),
    "queries": lora(targets=("q_proj",)),
    "tower": lora(targets=TOWER),
}


def run(directory, chosen, model=None, projector=True):
    """A workdir of a run with adapters, whose projector was trained, too."""
    model = model or tiny.config()
    base = tiny.checkpoint(directory, model)
    return base, workdir(directory / "run", base, chosen, adapter(model, chosen, projector=projector))


def check_equal(checkpoint, base, exported):
    """PEFT computes what the checkpoint does."""
    source = open_checkpoint(checkpoint)
    config = source.config
    few = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=250))  # not the id of <image>
    rows = [[5, "image", 200, "image", 3], [9]]
    batch = make_batch(rows, random_images(2, 2, size=config.vision.image_size), config=few)
    ours = np.asarray(logits(config, source.load(), batch))
    model = peft.PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), exported).eval()
    theirs = torch_logits(model, batch, config)[..., : ours.shape[-1]]
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert np.abs(torch_logits(model, batch, config)[..., : ours.shape[-1]] - ours)[real].max() > 0.02


def export(*arguments):
    main(["export", *map(str, arguments)])


def test_layers_that_transformers_has_as_one_are_refused(tmp_path):
    text = TextConfig(tiny.VOCAB, 48, 96, 2, 4, 2, 12, family="phi3")
    _, checkpoint = run(tmp_path, lora(), tiny.config(text=text))
    with pytest.raises(UserError, match="one qkv_proj and one gate_up_proj for several of our layers.*--layout hf"):
        export("--checkpoint", checkpoint, "--layout", "peft", "--output", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same(kind, tmp_path, capsys):
    base, checkpoint = run(tmp_path, KINDS[kind])
    export("--checkpoint", base, "--output", tmp_path / "hf")
    export("--checkpoint", checkpoint, "--layout", "peft", "--output", tmp_path / "a")
    printed = capsys.readouterr()
    assert "load it with PeftModel.from_pretrained of PEFT, on the model that it was trained from" in printed.out
    assert "vLLM refuses modules_to_save: for servers, give --base DIR" in printed.err
    assert ("have no DoRA" in printed.err) == (kind == "dora")
    assert ("SGLang ignores use_rslora" in printed.err) == (kind == "rslora")
    assert ("servers ignore adapters of the tower" in printed.err) == (kind == "tower")
    check_equal(checkpoint, tmp_path / "hf", tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert settings["modules_to_save"] == ["multi_modal_projector"]
    found, params = read_adapter(tmp_path / "a", tiny.config())
    stored = open_checkpoint(checkpoint)
    assert dataclasses.replace(found, targets=()) == dataclasses.replace(KINDS[kind], targets=())
    assert params.keys() == stored.stored.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, stored.read(name), err_msg=name)


def test_a_base_with_the_projector_and_an_adapter_for_servers(tmp_path, capsys):
    _, checkpoint = run(tmp_path, lora(rank=20))
    export("--checkpoint", checkpoint, "--layout", "peft", "--base", tmp_path / "hf", "--output", tmp_path / "a")
    assert capsys.readouterr().err == f"warning: {tmp_path}/a: rank 20: vLLM needs --max-lora-rank 32\n"
    with pytest.raises(UserError, match="b: --base and --output are one directory"):
        export("--checkpoint", checkpoint, "--layout", "peft", "--base", tmp_path / "b", "--output", tmp_path / "b")
    with pytest.raises(UserError, match="b: .*the base is in it"):
        export("--checkpoint", checkpoint, "--layout", "peft", "--base", tmp_path / "b/hf", "--output", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    check_equal(checkpoint, tmp_path / "hf", tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "hf")
    # What vLLM 0.32 (vllm/lora/utils.py, models/llava.py) and SGLang 0.5 (sglang/srt/lora) look for.
    assert settings["modules_to_save"] is None and isinstance(settings["target_modules"], list)
    packed = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(settings["target_modules"]) == packed
    assert settings["bias"] == "none" and not (settings["use_dora"] or settings["use_rslora"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float32
        module = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)[1]
        mapped = module.replace("model.language_model.", "language_model.model.")  # `hf_to_vllm_mapper`
        assert re.fullmatch(r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj", mapped)
    assert len(tensors) == 2 * 7 * tiny.config().text.num_layers


def test_an_adapter_says_how_its_prompts_were_made(tmp_path, capsys):
    """In a file that PEFT does not read: `chat`, `serve` and imports use it, and report it."""
    base, chosen = tiny.checkpoint(tmp_path), lora(targets=("q_proj",))
    trained = {"image_position": "as_is", "image_aspect": "square"}
    checkpoint = workdir(tmp_path / "run", base, chosen, adapter(tiny.config(), chosen), template="plain", **trained)
    export("--checkpoint", base, "--output", tmp_path / "hf")
    export("--checkpoint", checkpoint, "--layout", "peft", "--output", tmp_path / "a")
    file = tmp_path / "a" / "llava_jax.json"
    written, decoder = json.loads(file.read_text()), {"family": "llama", "hidden_size": tiny.config().text.hidden_size}
    assert written.pop("base").items() >= decoder.items()
    assert written == {"template": "plain"} | trained
    capsys.readouterr()
    prompts = read_for(str(tmp_path / "a"), open_checkpoint(base)).prompts
    said = f"{tmp_path}/a: template plain, which it was trained with"
    assert capsys.readouterr().err == f"{said}; that of the checkpoint is v1\n"
    assert prompts.template.name == "plain"
    assert {name: getattr(prompts.config, name) for name in trained} == trained
    assert read_for(str(tmp_path / "a"), open_checkpoint(base), "v1").prompts.template.name == "v1"
    assert "warning: the checkpoint was made with template plain, not v1" in capsys.readouterr().err
    for flags, template in (([], "plain"), (["--unmerged"], "plain"), (["--template", "v1"], "v1")):
        out = tmp_path / f"out-{template}-{len(flags)}"
        flags = [*flags, "--llava", tmp_path / "a", "--base", tmp_path / "hf", "--output", out]
        main(["import", *map(str, flags)])
        assert (f"{said}; --template NAME chooses another" in capsys.readouterr().err) == (template == "plain")
        imported = open_checkpoint(out)
        assert imported.template == template
        assert {name: getattr(imported.config, name) for name in trained} == trained

    for fields, message in (
        ({"template": "plane"}, "template is 'plane'; supported are "),
        ({"image_aspect": None}, "image_aspect is None; supported are square, pad, resize, anyres"),
        ({"image_aspect": "anyres"}, "is for another base: its image_aspect is anyres, that of the model pad"),
        ({"temperature": 1}, "'temperature' is no field that is known: template, image_position, image_aspect, base"),
        ({"base": {"family": "qwen2"}}, "is for another base: its family is qwen2, that of the model llama"),
        ({"base": {"rope_theta": 5e5}}, "is for another base: its rope_theta is 500000.0, that of the model 10000.0"),
        (
            {"base": {"vocab_size": 32000}},
            f"is for another base: its vocab_size is 32000, that of the model {tiny.VOCAB}",
        ),
        ({"base": []}, "base is"),
    ):
        file.write_text(json.dumps({"template": "plain"} | trained | fields))
        with pytest.raises(UserError, match=f"a/llava_jax.json: {message}"):
            read_for(str(tmp_path / "a"), open_checkpoint(base))
        flags = ["--llava", tmp_path / "a", "--base", tmp_path / "hf", "--output", tmp_path / "b"]
        with pytest.raises(UserError, match=message):
            main(["import", *map(str, flags)])
    assert not (tmp_path / "b").exists()


def test_an_adapter_of_a_model_with_anyres(tmp_path):
    grids = AnyRes((Grid(1, 2), Grid(2, 1)), "spatial_unpad")
    model = tiny.config(image_aspect="anyres", anyres=grids)
    base, checkpoint = run(tmp_path, lora(targets=("q_proj",)), model)
    export("--checkpoint", checkpoint, "--layout", "peft", "--base", tmp_path / "hf", "--output", tmp_path / "a")
    flags = ["--llava", tmp_path / "a", "--base", tmp_path / "hf", "--output", tmp_path / "in"]
    main(["import", *map(str, flags)])
    assert open_checkpoint(tmp_path / "in").config.image_aspect == "anyres"
    assert read_for(str(tmp_path / "a"), open_checkpoint(base)).prompts.config.anyres == grids
    with pytest.raises(UserError, match="its image_aspect is anyres, that of the model pad"):
        read_for(str(tmp_path / "a"), open_checkpoint(tiny.checkpoint(tmp_path / "plain")))


def test_a_linear_projector_and_names_of_older_transformers(tmp_path):
    base, checkpoint = run(tmp_path, lora(), tiny.config(projector_type="linear"))
    export("--checkpoint", base, "--output", tmp_path / "hf")
    export("--checkpoint", checkpoint, "--layout", "peft", "--output", tmp_path / "a")
    check_equal(checkpoint, tmp_path / "hf", tmp_path / "a")
    export("--checkpoint", checkpoint, "--layout", "peft", "--transformers", "4.51", "--output", tmp_path / "old")
    names = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in names} == {"language_model", "multi_modal_projector"}
    main(["merge", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "merged")])
    with pytest.raises(UserError, match="merged: has no adapters .*: export it with --layout hf"):
        export("--checkpoint", tmp_path / "merged", "--layout", "peft", "--output", tmp_path / "b")


def test_what_an_adapter_cannot_hold_goes_to_the_base(tmp_path):
    base = tiny.checkpoint(tmp_path)
    chosen = lora(targets=("q_proj",))
    norm = {"llm.norm.scale": 1.5 * np.ones(tiny.config().text.hidden_size, np.float32)}
    checkpoint = workdir(tmp_path / "run", base, chosen, adapter(tiny.config(), chosen) | norm)
    with pytest.raises(
        UserError, match="llm.norm.scale was trained whole, which an adapter does not hold: give --base"
    ):
        export("--checkpoint", checkpoint, "--layout", "peft", "--output", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    main(["copy", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "copy")])
    with pytest.raises(UserError, match="copy: llm.norm.scale was trained whole"):
        export("--checkpoint", tmp_path / "copy", "--layout", "peft", "--output", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    export("--checkpoint", checkpoint, "--layout", "peft", "--base", tmp_path / "hf", "--output", tmp_path / "a")
    check_equal(checkpoint, tmp_path / "hf", tmp_path / "a")


def test_a_copy_says_what_was_trained_beside_its_adapters(tmp_path):
    base, checkpoint = run(tmp_path, lora())
    export("--checkpoint", base, "--output", tmp_path / "hf")
    main(["copy", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "copy")])
    export("--checkpoint", tmp_path / "copy", "--layout", "peft", "--output", tmp_path / "a")
    check_equal(checkpoint, tmp_path / "hf", tmp_path / "a")
    description = tmp_path / "copy" / "llava.json"  # as if it were from before that
    stored = json.loads(description.read_text())
    assert set(stored.pop("trained_whole")) == {name for name in open_checkpoint(base).stored if "projector." in name}
    description.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="copy: does not say what was trained whole"):
        export("--checkpoint", tmp_path / "copy", "--layout", "peft", "--output", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    alone = workdir(tmp_path / "alone", base, lora(), adapter(tiny.config(), lora()))  # nothing was
    main(["copy", "--checkpoint", str(alone), "--output", str(tmp_path / "second")])
    export("--checkpoint", tmp_path / "second", "--layout", "peft", "--output", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["modules_to_save"] is None


def test_what_an_imported_adapter_replaces_goes_to_the_base_too(tmp_path):
    """Also after a run from it, which does not train that."""
    base, chosen = tiny.checkpoint(tmp_path), lora(targets=("q_proj",))
    export("--checkpoint", base, "--output", tmp_path / "hf")
    model = peft.get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf"),
        peft.LoraConfig(target_modules=".*language_model.*q_proj", modules_to_save=["embed_tokens"]),
    )
    model.save_pretrained(tmp_path / "theirs")
    flags = ["--llava", tmp_path / "theirs", "--base", tmp_path / "hf", "--unmerged", "--output", tmp_path / "in"]
    main(["import", *map(str, flags)])
    assert "llm.embed_tokens.embedding" in open_checkpoint(tmp_path / "in").description.trained_whole
    checkpoint = workdir(tmp_path / "run", tmp_path / "in", chosen, adapter(tiny.config(), chosen, projector=True))
    for source in (tmp_path / "in", checkpoint):
        with pytest.raises(UserError, match="llm.embed_tokens.embedding was trained whole"):
            export("--checkpoint", source, "--layout", "peft", "--output", tmp_path / "a")
