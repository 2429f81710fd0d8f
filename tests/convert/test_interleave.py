"""LLaVA-Interleave: a plain `llava` with SigLIP and Qwen2 that has several images between words, one square each."""

import numpy as np
import pytest
import torch
from conversion import convert, load
from families import FAMILIES, save
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.data.features import TEXT
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling

WORDS = "what is the colour of the shape? " * 12
QWEN_1_5 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SIZES = [(30, 20), (20, 70), (90, 31)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Imported from transformers' files, and exported: the models, ours and theirs, and the directories."""
    root = tmp_path_factory.mktemp("interleave")
    model, config = save(FAMILIES["qwen2 and siglip"], root / "source")
    tokenizer = AutoTokenizer.from_pretrained(root / "source")
    tokenizer.chat_template = QWEN_1_5
    tokenizer.save_pretrained(root / "source")
    convert("import", "--llava", root / "source", "--output", root / "out", "--image-position", "as_is")
    convert("export", "--checkpoint", root / "out", "--output", root / "hf")
    checkpoint = open_checkpoint(root / "out")
    assert checkpoint.template == "chatml" and checkpoint.config.image_position == "as_is"
    return Generator.from_checkpoint(checkpoint), model, root


def content():
    """Text and images in turn, as transformers' processors take them."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in SIZES]
    parts = [{"type": "text", "text": WORDS}]
    for number, image in enumerate(images):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": f" {number}: {WORDS}"}]
    return parts, images


def test_images_between_words_are_those_of_transformers(converted):
    generator, model, root = converted
    parts, images = content()
    text = "".join(part.get("text", IMAGE_TOKEN) for part in parts)
    request = Request([("user", text)], images)
    prompt = generator.prompts.encode(request)
    features, P = prompt.image_feature_index, generator.config.image_tokens
    np.testing.assert_array_equal(features[features != TEXT], np.arange(3 * P))
    assert np.count_nonzero(np.diff(np.flatnonzero(features != TEXT)) > 1) == 2  # words between all of them

    processor = AutoProcessor.from_pretrained(root / "hf", backend="pil")
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(images=images, text=rendered, return_tensors="pt")
    ids = np.where(features == TEXT, prompt.tokens, processor.image_token_id)
    assert inputs["input_ids"][0].tolist() == ids.tolist() and len(ids) > 500
    with torch.no_grad():
        expected = model(**inputs).logits[0].numpy()
        np.testing.assert_array_equal(load(root / "hf")(**inputs).logits[0].numpy()[:, : expected.shape[1]], expected)
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=generator.prompts.stop_ids)
    assert expected.std() > 0.5
    np.testing.assert_allclose(generator.logits(request), expected, rtol=0, atol=1e-4)
    answer = processor.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).rstrip("\ufffd").strip()
    assert generator.answer([request], Sampling(max_new_tokens=12)) == [answer]
