"""Adapters trained on a quantized base: a run, its resume, what reads its workdir, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from training_runs import (
    assert_same_run,
    final,
    metrics,
    random_batches,
    run_config,
    settings_for,
    stop_at,
)

from llava_jax.chat import __main__ as chat
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.copy import copy, merge
from llava_jax.models.config import LoraConfig, TextConfig
from llava_jax.models.llava import abstract_params
from llava_jax.training import loop
from llava_jax.training.step import loss_and_gradients

LORA = {"rank": 4, "dropout": 0.1}


def qlora(world, base_dtype: str, **changes):
    config = run_config(world).copy_and_resolve_references().unlock()
    config.base_dtype = base_dtype
    config.lora.update(LORA)
    config.update(changes)
    return config.lock()


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_a_run_learns_and_resumes_bit_exactly(base_dtype, world, tmp_path):
    config = qlora(world, base_dtype, remat="full", learning_rate=2e-2)
    loop.train(config, str(tmp_path / "whole"))
    losses = [line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert losses[-1] < 0.99 * losses[0]
    stop_at(3, config, tmp_path / "stopped")
    loop.train(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    checkpoint = open_checkpoint(tmp_path / "whole")
    assert checkpoint.config.base_dtype == base_dtype
    trained = set(checkpoint.stored)
    assert trained and all(".lora." in name or name.startswith("projector.") for name in trained)
    copy(tmp_path / "whole", tmp_path / "copy")
    copied = open_checkpoint(tmp_path / "copy")
    for name, value in final(tmp_path / "whole").items():
        np.testing.assert_array_equal(copied.load((name,))[name], value, err_msg=name)
    # Dequantized, as a whole or layer by layer, the base is the one that the adapters were trained on.
    params, plain = final(tmp_path / "whole"), checkpoint.dequantized()
    source = open_checkpoint(world["init"])
    kernels = {name: leaf for name, leaf in plain.abstract().items() if name not in params}
    assert kernels and kernels.keys() <= source.abstract().keys()
    loaded = plain.load()
    for name, leaf in kernels.items():
        by_layer = np.stack([plain.read(name, layer) for layer in range(leaf.shape[0])])
        np.testing.assert_allclose(loaded[name], by_layer, rtol=2.0**-22, atol=2.0**-24 * np.abs(by_layer).max())
        ((_, first),) = plain.read_chunks(name, 0)
        np.testing.assert_array_equal(first, by_layer[0])
        size = np.abs(by_layer - source.read(name)).max() / np.abs(by_layer).max()
        assert 0 < size < {"int8": 0.01, "nf4": 0.2}[base_dtype]


def test_evaluation_in_training_and_chat_use_the_dequantized_weights_with_adapters(world, tmp_path, capsys):
    """The validation loss is that of the merged model, and the answers of the last step are those of `chat`."""
    config = qlora(world, "nf4", steps=3, eval_every=3, learning_rate=2e-2).copy_and_resolve_references().unlock()
    config.data.holdout = 4
    lines = [line for line in json.loads(Path(world["json"]).read_text()) if "image" in line]
    for line in lines:
        line["conversations"][1]["value"] = line["conversations"][1]["value"].removeprefix("It is ").rstrip(".")
    (tmp_path / "questions.json").write_text(json.dumps(lines))
    questions = str(tmp_path / "questions.json")
    config.evaluate.update(benchmark="easy-vqa", questions=questions, labels=questions, images=world["images"], limit=1)
    loop.train(config.lock(), str(tmp_path / "run"))
    answers = (tmp_path / "run/evaluations/3/easy-vqa.jsonl").read_text().splitlines()
    assert len(answers) == 1 and set(json.loads(answers[0])) >= {"prompt", "text"}
    for answer in map(json.loads, answers):
        image = next(line["image"] for line in lines if line["id"] == answer["question_id"])
        capsys.readouterr()
        chat.main(["--checkpoint", str(tmp_path / "run"), "--image", f"{world['images']}/{image}", "--prompt",
                   "What colour is it?", "--max-new-tokens", "16"])  # fmt: skip
        assert capsys.readouterr().out.startswith(answer["text"][:8]), answer

    merge(tmp_path / "run", tmp_path / "merged")
    again = config.copy_and_resolve_references().unlock()
    again.update(init=str(tmp_path / "merged"), base_dtype="", learning_rate=0.0, steps=1, eval_every=1)
    again.lora.rank, again.lora.dropout, again.evaluate.benchmark = 0, 0.0, ""
    loop.train(again.lock(), str(tmp_path / "again"))
    (expected,) = [line["validation_loss"] for line in metrics(tmp_path / "again") if "validation_loss" in line]
    (found,) = [line["validation_loss"] for line in metrics(tmp_path / "run") if "validation_loss" in line]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert abs(found - metrics(tmp_path / "run")[0].get("loss", 0)) > 1e-3


def test_quantized_weights_are_not_trained(world, tmp_path):
    config = qlora(world, "nf4")
    with config.unlocked():
        config.lora.update({"rank": 0, "dropout": 0.0})
    with pytest.raises(UserError, match=r"config.base_dtype: llm\.layers\..*\.absmax would be trained"):
        loop.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    config = qlora(world, "int8", trainable=({"parameters": r"llm\.layers\.mlp\.up_proj"},))
    with pytest.raises(UserError, match=r"config.base_dtype: llm\.layers\.mlp\.up_proj\.(codes|scales) would be"):
        loop.train(config, str(tmp_path / "run"))


def test_a_bfloat16_base(world, tmp_path):
    config = qlora(world, "bfloat16", steps=2)
    loop.train(config, str(tmp_path / "run"))
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.config.base_dtype == ""


# --------------------------------------------------------------------------------------------------------- a larger one

LARGER = tiny.config(
    text=TextConfig(tiny.VOCAB, 256, 512, 6, 4, 2, 64), lora=LoraConfig(4, 8, (r"llm\.layers\..*_proj",))
)


@pytest.mark.parametrize("remat", ["none", "full", "save_qkv"])
def test_no_policy_keeps_dequantized_weights(remat):
    """Kept for the backward pass, they would be the model in the type of the computation."""
    temporary = {}
    for base_dtype in ("", "nf4"):
        model = dataclasses.replace(LARGER, base_dtype=base_dtype)
        (batch,) = random_batches(model, 1, rows=1, length=24)
        shapes = abstract_params(model)
        trainable = {name: leaf for name, leaf in shapes.items() if ".lora." in name}
        frozen = {name: leaf for name, leaf in shapes.items() if name not in trainable}
        settings = settings_for(model, batch, remat=remat)
        step = jax.jit(loss_and_gradients, static_argnums=0).lower(settings, trainable, frozen, batch).compile()
        temporary[base_dtype] = step.memory_analysis().temp_size_in_bytes
    layer = sum(4 * leaf.size // 6 for name, leaf in abstract_params(LARGER).items() if "llm.layers" in name)
    assert temporary["nf4"] - temporary[""] < 1.5 * layer, (temporary, layer)
