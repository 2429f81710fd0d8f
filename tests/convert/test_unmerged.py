"""Adapters that are imported beside the weights, and trained on."""

import shutil

import jax
import numpy as np
import peft_reference
import pytest
import tiny
import torch_reference as reference
from conversion import CONFIG, check_logits, convert, load, save_llava
from peft import PeftModel
from peft_adapters import adapted, save
from training_runs import final, make_config, metrics, random_batches, settings_for

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.adapter import read_adapter
from llava_jax.parallel.sharding import make_mesh
from llava_jax.training import builder, loop, optim
from llava_jax.training import step as training_step
from llava_jax.training.adapters import adapted as model_of


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A checkpoint, and what PEFT has."""
    directory = tmp_path_factory.mktemp("unmerged")
    save_llava(CONFIG, directory / "base")
    model = adapted(CONFIG, use_rslora=True, lora_dropout=0.1, modules_to_save=["multi_modal_projector"])
    save(model, directory / "adapter")
    flags = ["--base", directory / "base", "--unmerged", "--output", directory / "out"]
    convert("import", "--llava", directory / "adapter", *flags)
    return directory, model


def test_it_computes_what_peft_does_and_has_its_parameters(imported):
    directory, model = imported
    check_logits(model, directory / "out")
    checkpoint = open_checkpoint(directory / "out")
    lora, params = read_adapter(directory / "adapter", CONFIG)
    assert checkpoint.config.lora == lora and lora.rslora and len(params) == 4 + 2 * 3
    for name, value in params.items():
        np.testing.assert_array_equal(checkpoint.read(name), value, err_msg=name)
    convert("merge", "--checkpoint", directory / "out", "--output", directory / "merged")
    check_logits(model, directory / "merged")


def test_two_steps_from_it_are_those_of_peft(imported):
    """From the directories on disk: the losses, the adapters afterwards, and the projector (`modules_to_save`)."""
    directory, _ = imported
    config = make_config(learning_rate=1e-2, projector_learning_rate=1e-3, weight_decay=0.1, warmup_ratio=0.0)
    config.lora.update({"rank": 4, "alpha": 6.0, "rslora": True, "targets": ("down_proj", r"[qv]_proj")})
    checkpoint = open_checkpoint(directory / "out")
    model, params = model_of(checkpoint.config, config), checkpoint.load()
    names = optim.trained(params, config)
    start = {name: np.asarray(params[name]) for name in names}
    trainable = {name: params.pop(name) for name in names}
    optimizer = optim.make_optimizer(config, names, 2)
    state = builder.init_state(optimizer, trainable, make_mesh({"fsdp": -1}))
    batches = random_batches(model, 2, length=120)
    for batch in batches:
        for name in ("tokens", "labels"):
            batch[name] = np.where(batch[name] == 3, 4, batch[name])  # 3 is `<image>`
    settings = settings_for(model, batches[0])
    step = jax.jit(lambda state, batch: training_step.train_step(settings, optimizer, state, params, batch))
    ours = []
    for batch in batches:
        state, scalars = step(state, batch)
        ours.append(float(scalars["loss"]))

    module = PeftModel.from_pretrained(load(directory / "base"), directory / "adapter", is_trainable=True).eval()
    groups = [
        {"params": [parameter], "lr": config.projector_learning_rate if "projector" in name else config.learning_rate,
         "weight_decay": 0.1 if parameter.ndim > 1 else 0.0}
        for name, parameter in module.named_parameters() if parameter.requires_grad
    ]  # fmt: skip
    theirs = reference.train(module, groups, batches, model, config)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    trained = peft_reference.params(module, model)
    assert len(names) == len(groups) - 2 * 3 * (model.text.num_layers - 1)
    for name in names:
        np.testing.assert_allclose(state.trainable[name], trained[name], rtol=0, atol=1e-4, err_msg=name)
        assert np.abs(start[name] - trained[name]).max() > 5e-4, name


def test_a_run_trains_it_on(imported, tmp_path):
    """The flags are those that the error names, and nothing starts afresh."""
    directory, _ = imported
    file, images = tiny.data(tmp_path)
    config = make_config("finetune", init=str(directory / "out"), max_length=128, batch_rows=4, steps=1)
    config.data.json, config.data.images = str(file), str(images)
    config.learning_rate, config.template = 1e-3, "plain"
    numbers, targets = "--config.lora.rank=4 --config.lora.alpha=6", r"\('q_proj', 'v_proj', 'down_proj'\)"
    flags = f'give {numbers} --config.lora.targets="{targets}" --config.lora.rslora=True; or merge them first'
    with pytest.raises(UserError, match=flags):
        model_of(open_checkpoint(directory / "out").config, config)
    config.lora.rank, config.lora.alpha, config.lora.rslora = 4, 6.0, True
    config.lora.targets = ("down_proj", r"[qv]_proj")
    loop.train(config.lock(), str(tmp_path / "run"))
    before, after = open_checkpoint(directory / "out"), final(tmp_path / "run")
    for name, value in after.items():
        start = np.asarray(before.read(name), np.float32)
        moved = np.abs(np.asarray(value, np.float32) - start).max()
        assert moved == 0 or (".lora." in name or name.startswith("projector.")) and moved < 2e-3, name
    assert np.isfinite(metrics(tmp_path / "run")[-1]["loss"])
    convert("export", "--checkpoint", tmp_path / "run", "--layout", "peft", "--output", tmp_path / "again")
    _, trained = read_adapter(tmp_path / "again", CONFIG)
    name = "llm.layers.mlp.down_proj.lora.b"
    np.testing.assert_array_equal(trained[name], after[name])


def test_unmerged_goes_with_an_adapter(imported, tmp_path):
    directory, _ = imported
    with pytest.raises(UserError, match="base: no adapter of PEFT: leave --unmerged out"):
        convert("import", "--llava", directory / "base", "--unmerged", "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        convert("import", "--llm", directory, "--vision", directory, "--unmerged", "--output", tmp_path / "out")
    shutil.copytree(directory / "adapter", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="cut: has adapter_model.safetensors, but no adapter_config.json: copy the"):
        convert("import", "--llava", tmp_path / "cut", "--base", directory / "base", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
