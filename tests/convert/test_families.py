"""Every family of models on its whole way: saved by transformers, imported, asked, exported, and loaded there again."""

import dataclasses

import numpy as np
import pytest
import torch
import torch_reference as reference
from conversion import convert, load
from families import FAMILIES, save, tokenizer_of
from forward import logits, make_batch, random_images, torch_logits
from PIL import Image
from transformers import AutoProcessor, SiglipConfig, SiglipModel

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.towers.siglip import SIGLIP_MEAN


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, tmp_path):
    family = FAMILIES[name]
    model, config = save(family, tmp_path / "source")
    convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out", "--template", family.template)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config == config

    images = random_images(1, 1, size=family.vision.image_size)
    batch = make_batch([[200, "image", 300 - config.image_tokens]], images, config=config)
    expected = torch_logits(model, batch, config)
    assert expected.shape[1] == 500 and expected.std() > 0.5
    np.testing.assert_allclose(logits(config, checkpoint.load(), batch), expected, rtol=0, atol=1e-4)

    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    exported = load(tmp_path / "hf")
    assert exported.config.text_config.model_type == model.config.text_config.model_type
    np.testing.assert_array_equal(torch_logits(exported, batch, config), expected)

    check_answer(Generator.from_checkpoint(checkpoint), exported, AutoProcessor.from_pretrained(tmp_path / "hf"))


def test_backbones_of_other_families(tmp_path):
    """A Qwen2, and a whole SigLIP, of which the tower without its pooling head is taken."""
    family = FAMILIES["qwen2 and siglip"]
    tokenizer = tokenizer_of(family)
    text = dataclasses.replace(family.text, vocab_size=len(tokenizer))
    llm = reference.llama(text)
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    tower = reference.torch_vision_config(family.vision).to_dict() | {"vision_use_head": True}
    words = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    siglip = reference.randomize(SiglipModel(SiglipConfig(text_config=words, vision_config=tower)))
    siglip.save_pretrained(tmp_path / "siglip")

    flags = ["--llm", tmp_path / "llm", "--vision", tmp_path / "siglip", "--template", "chatml"]
    convert("import", *flags, "--output", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert (checkpoint.config.text, checkpoint.config.vision) == (text, family.vision)
    assert (checkpoint.config.image_mean, checkpoint.config.select_layer) == (SIGLIP_MEAN, -2)
    params = checkpoint.load()
    expected = reference.clip_params(siglip, family.vision, "vision_model.") | reference.llama_params(llm, text)
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    load(tmp_path / "hf")


def check_answer(generator: Generator, model, processor) -> None:
    """Text, ids, pixels and greedy answer of transformers are ours."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 30, 3), np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is the colour of the shape?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    request = Request([("user", "<image>\nWhat is the colour of the shape?")], [picture])
    prompt = generator.prompts.encode(request)
    image = prompt.image_feature_index >= 0
    assert inputs["input_ids"][0].tolist() == np.where(image, processor.image_token_id, prompt.tokens).tolist()

    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=generator.prompts.stop_ids)
    ids = output[0, inputs["input_ids"].shape[1] :]
    assert len(ids) > 3
    answer = processor.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd").strip()
    assert generator.answer([request], Sampling(max_new_tokens=16)) == [answer]
