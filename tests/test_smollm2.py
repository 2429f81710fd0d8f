"""A real pretrained model: SmolLM2-135M-Instruct comes in as GGUF, computes what transformers computes, and talks."""

import resource
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import torch
import torch_reference as reference
from conversion import convert
from forward import logits, make_batch, random_images
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

from configs import smollm2
from examples.commands import Commands
from examples.easy_vqa.data import AskedImage
from examples.smollm2 import recipe
from examples.smollm2.measure import Asked, score
from llava_jax.chat import __main__ as chat
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.models.llava import abstract_params
from llava_jax.training import config_check

ENGLISH = Path(__file__).parent.parent / "LICENSE"
LENGTH = 500  # tokens


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf, tmp_path_factory):
    """The language model as it is, with a random tower and projector."""
    directory = tmp_path_factory.mktemp("smollm2")
    reference.clip(reference.VISION).save_pretrained(directory / "clip")
    size = reference.VISION.image_size
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(directory / "clip")
    flags = ["--llm", smollm2_gguf, "--vision", directory / "clip", "--template", "chatml"]
    convert("import", *flags, "--output", directory / "out")
    return open_checkpoint(directory / "out")


def test_english_is_continued_as_by_transformers(checkpoint, smollm2_gguf):
    directory, file = smollm2_gguf.parent, smollm2_gguf.name
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(directory, gguf_file=file)(ENGLISH.read_text())["input_ids"][:LENGTH]
    assert len(ids) == LENGTH
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    images = random_images(1, 0, size=checkpoint.config.vision.image_size)
    batch = make_batch([[LENGTH]], images, config=checkpoint.config) | {"tokens": np.array([ids], np.int32)}
    found = logits(checkpoint.config, checkpoint.load(), batch)[0]
    ours = np.asarray(jax.nn.log_softmax(found[:, : theirs.shape[1]]))
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    assert (np.exp(theirs) * (theirs - ours)).sum(-1).max() < 1e-4


def test_it_talks(checkpoint, capsys):
    question = "What is the capital of France?"
    chat.main(["--checkpoint", str(checkpoint.root), "--prompt", question, "--max-new-tokens", "24"])
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_recipe_is_one(stage):
    config_check.check(smollm2.get_config(stage))
    with pytest.raises(ValueError, match="neither pretrain nor finetune"):
        smollm2.get_config("")


def test_only_what_is_exactly_right_counts():
    image = AskedImage("train/images/0.png", ())
    asked = [
        Asked(kind, image, "?", right)
        for kind, right in [("shape", "circle"), ("shape", "triangle"), ("colour", "red")]
    ]
    found = score(asked, ["circle", "a triangle", "red"])
    assert found["right"] == pytest.approx(2 / 3) and found["by_kind"] == {"shape": 0.5, "colour": 1.0}
    assert found["for_example"][1] == {"question": "?", "said": "a triangle", "right": "triangle"}


def test_a_variant_of_stage_2_is_trained_once_and_is_a_row_of_the_table(tmp_path, capsys):
    samples, images = tiny.data(tmp_path)
    arguments = recipe.training("finetune", tmp_path / "nf4", tiny.checkpoint(tmp_path, template="chatml"), samples)
    changes = {"data.images": images, "data.holdout": 2, "steps": 2, "batch_rows": 1, "max_length": 200}
    line = (*arguments, *recipe.VARIANTS["lora-nf4"], *(f"--config.{name}={value}" for name, value in changes.items()))
    ran = Commands(tmp_path).run(*line)
    largest = max(2**33, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    assert 2**26 < ran.memory <= largest and ran.seconds > 0
    written = (tmp_path / "nf4/metrics.jsonl").stat()
    assert Commands(tmp_path).run(*line) == ran  # another start
    assert (tmp_path / "nf4/metrics.jsonl").stat() == written and "done before: python -m llava_jax.main" in (
        capsys.readouterr().out
    )

    row = {"variant": "lora-nf4", "right": 0.5} | recipe.costs(tmp_path / "nf4", ran)
    model = tiny.config()
    text, whole = model.text, abstract_params(model)
    D, F, N, K = text.hidden_size, text.intermediate_size, text.num_heads * text.head_dim, text.num_kv_heads
    ends = [(D, N), (D, K * text.head_dim), (D, K * text.head_dim), (N, D), (D, F), (D, F), (F, D)]
    adapters = text.num_layers * 16 * sum(map(sum, ends))
    projector = sum(leaf.size for name, leaf in whole.items() if name.startswith("projector."))
    assert row["trained"] == adapters + projector and row["steps"] == 2
    everything = adapters + sum(leaf.size for leaf in whole.values())
    assert row["share"] == row["trained"] / everything
    quantized = text.num_layers * sum(inputs * outputs for inputs, outputs in ends)
    floats = 4 * (everything - quantized + 2 * row["trained"])
    codes = text.num_layers * sum(32 * -(-inputs // 64) * outputs for inputs, outputs in ends)  # bytes
    assert codes < row["state"] - floats < 1.05 * codes  # and scales
    shown = recipe.table([row])
    assert "| lora-nf4 | 50.0% |" in shown and f"{row['trained']:,}" in shown
