"""LLaVA-1.6 on its whole way: saved by transformers or the original, imported, asked, exported, and loaded again."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch_reference as reference
from conversion import LAYOUTS, convert, edit_json, rename
from families import FAMILIES, tokenizer_of
from llava_next import processor_of, torch_model
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

import llava_jax
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert import verify
from llava_jax.convert.hf_config import pinpoints
from llava_jax.data.anyres import AnyRes, Grid
from llava_jax.data.features import TEXT, Size
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import LlavaConfig
from llava_jax.models.towers.siglip import SIGLIP_MEAN, SIGLIP_STD

QUESTION = "What is it?" + " What is it?" * 89
SIZES = [(30, 20), (20, 70), (200, 30), (101, 90)]
NEWLINES = {"L1": "image_newline", "L2": "model.image_newline", "L3": "model.image_newline", "L4": "image_newline"}


def save(name, directory):
    """A LLaVA-1.6 as `save_pretrained` writes it -> the model, and what we should make of it."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    text = dataclasses.replace(family.text, vocab_size=len(tokenizer))
    config = LlavaConfig(family.vision, text, image_aspect="anyres", anyres=AnyRes())
    if family.vision.kind == "siglip":
        config = dataclasses.replace(config, select_layer=-1, image_mean=SIGLIP_MEAN, image_std=SIGLIP_STD)
    model = torch_model(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    processor_of(config).save_pretrained(directory)
    return model, config


def load(directory):
    """Through transformers, which must find every tensor and know each."""
    model, info = LlavaNextForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vicuna")
    return directory, *save("vicuna", directory)


def ask(sizes):
    """A request with images of these sizes."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]
    return Request([("user", "<image>\n" * len(sizes) + QUESTION)], images)


def theirs(model, generator, request):
    """Our ids and their pixels as the arguments of transformers' model."""
    prompt = generator.prompts.encode(request)
    ids = np.where(prompt.image_feature_index == TEXT, prompt.tokens, model.config.image_token_id)
    inputs = processor_of(generator.config)(request.images, return_tensors="pt")
    return {"input_ids": torch.tensor(ids)[None], **inputs}


@pytest.mark.parametrize("name", ["vicuna", "mistral", "llama 3.1", "qwen2 and siglip"])
def test_there_and_back(name, tmp_path):
    model, config = save(name, tmp_path / "source")
    flags = ["--template", FAMILIES[name].template]
    convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out", *flags)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config == config
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    exported = load(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    generator = Generator.from_checkpoint(checkpoint)
    alone = SIZES if name in ("vicuna", "qwen2 and siglip") else ()  # places of tiles do not depend on the decoder
    for sizes in (*([size] for size in alone), SIZES[:3]):
        request = ask(sizes)
        inputs = theirs(model, generator, request)
        with torch.no_grad():
            expected = model(**inputs).logits[0].numpy()
            np.testing.assert_array_equal(exported(**inputs).logits[0].numpy()[:, : expected.shape[1]], expected)
            output = model.generate(
                **inputs, max_new_tokens=12, do_sample=False, eos_token_id=generator.prompts.stop_ids
            )
        assert len(expected) > 500
        np.testing.assert_allclose(generator.logits(request), expected, atol=1e-4)
        answer = processor.tokenizer.decode(output[0, len(expected) :], skip_special_tokens=True)
        assert generator.answer([request], Sampling(max_new_tokens=12)) == [answer.rstrip("\ufffd").strip()]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    request = ask(SIZES[:1])
    found, ours = processor(images=request.images, text=text, return_tensors="pt"), theirs(exported, generator, request)
    for key in ("input_ids", "pixel_values", "image_sizes"):
        np.testing.assert_allclose(found[key].numpy(), ours[key].numpy(), atol=1e-6, err_msg=key)


def test_encoded_images_are_those_of_transformers(vicuna):
    """In any number, each as if it were alone, with the newlines."""
    directory, model, config = vicuna
    images = ask(SIZES).images
    loaded = llava_jax.load(directory)
    found = loaded.encode_images(images, batch_size=3)
    with torch.no_grad():
        expected = model.get_image_features(**processor_of(config)(images, return_tensors="pt")).pooler_output
    assert len(found) == len(expected) == len(SIZES)
    for ours, theirs, size in zip(found, expected, SIZES, strict=True):
        assert ours.dtype == np.float32 and len(ours) == len(config.tiling.features(Size(*size), False).index)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
    assert loaded.encode_images([]) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, vicuna, tmp_path):
    source, model, config = vicuna
    directory = tmp_path / "source"
    model.save_pretrained(directory)
    for file in source.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(
        rename(tensors, LAYOUTS[layout] | {"image_newline": NEWLINES[layout]}),
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    convert("import", "--llava", directory, "--output", tmp_path / "out")
    params = open_checkpoint(tmp_path / "out").load()
    np.testing.assert_array_equal(params["image_newline"], model.model.image_newline.detach().numpy())


def test_verify(vicuna, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "PROMPT", 16)  # tokens, fewer than the image has
    convert("import", "--llava", vicuna[0], "--output", tmp_path / "out")
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    found = {finding.what: finding for finding in verify.verify(str(tmp_path / "out"), str(tmp_path / "hf"))}
    assert all(finding.equal for finding in found.values()), found
    edit_json(tmp_path / "hf" / "config.json", image_grid_pinpoints=[[48, 24], [24, 48]])
    edit_json(tmp_path / "hf" / "preprocessor_config.json", image_grid_pinpoints=[[48, 24], [24, 48]])
    found = next(iter(verify.verify(str(tmp_path / "out"), str(tmp_path / "hf"))))
    assert not found.equal and "anyres.grids" in found.detail


def test_first_uploads_are_called_llava(vicuna, tmp_path):
    directory, _, config = vicuna
    (tmp_path / "source").mkdir()
    for file in directory.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "source" / "config.json", model_type="llava")
    convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config == config


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image_grid_pinpoints": [[24, 40]]}, r"image_grid_pinpoints has \[24, 40\], not two multiples of 24 pixels"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints has '"),
        ({"image_grid_pinpoints": [[24, 48]]}, "image_grid_pinpoints are not those of the image processor"),
        ({"image_grid_pinpoints": []}, "grids: there are 0"),
    ],
)
def test_pinpoints_that_are_none(changes, message, vicuna, tmp_path):
    (tmp_path / "source").mkdir()
    for file in vicuna[0].iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "source" / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_newline_is_named(vicuna, tmp_path):
    (tmp_path / "source").mkdir()
    for file in vicuna[0].iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    tensors = load_file(vicuna[0] / "model.safetensors")
    tensors.pop("image_newline")
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing .*image_newline"):
        convert("import", "--llava", tmp_path / "source", "--output", tmp_path / "out")


def test_the_originals_files(vicuna, tmp_path):
    """Its pinpoints are widths and heights, so that small images get the other grid."""
    source, model, config = vicuna
    convert("import", "--llava", source, "--output", tmp_path / "first")
    convert(
        "export",
        "--checkpoint",
        tmp_path / "first",
        "--output",
        tmp_path / "original",
        "--layout",
        "original",
        "--tower",
        "openai/clip-vit-large-patch14-336",
    )
    settings = json.loads((tmp_path / "original" / "config.json").read_text())
    assert settings["image_aspect_ratio"] == "anyres" and settings["mm_patch_merge_type"] == "spatial_unpad"
    assert settings["image_grid_pinpoints"][0] == [48, 24]  # 1 x 2 tiles
    reference.clip(config.vision, seed=1).save_pretrained(tmp_path / "clip")
    flags = ["--vision", tmp_path / "clip", "--output", tmp_path / "again"]
    convert("import", "--llava", tmp_path / "original", *flags)
    again = open_checkpoint(tmp_path / "again")
    assert again.config.anyres == config.anyres
    np.testing.assert_array_equal(again.load()["image_newline"], model.model.image_newline.detach().numpy())
    edit_json(tmp_path / "original" / "config.json", image_grid_pinpoints=[[24, 48], [48, 24]])
    convert("import", "--llava", tmp_path / "original", *flags[:-1], tmp_path / "tall")
    assert open_checkpoint(tmp_path / "tall").config.anyres.grids == (Grid(2, 1), Grid(1, 2))


def original_tiles(image, pinpoints, side):
    """`select_best_resolution` and `resize_and_pad_image` of LLaVA-NeXT's llava/mm_utils.py, then tiles of a side."""
    width, height = image.size
    best, most, least = None, 0, float("inf")
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if kept > most or (kept == most and w * h - kept < least):
            best, most, least = (w, h), kept, w * h - kept
    w, h = best
    if w / width < h / height:
        new = w, min(math.ceil(height * (w / width)), h)
    else:
        new = min(math.ceil(width * (h / height)), w), h
    canvas = Image.new("RGB", best)
    canvas.paste(image.resize(new), ((w - new[0]) // 2, (h - new[1]) // 2))
    crops = [canvas.crop((x, y, x + side, y + side)) for y in range(0, h, side) for x in range(0, w, side)]
    return np.stack([np.asarray(tile) for tile in [image.resize((side, side)), *crops]])


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("order", ["original", "transformers", None])
def test_small_images_get_the_tiles_that_the_weights_were_trained_with(layout, order, tmp_path):
    """336 x 336 pixels fit 1 x 2 and 2 x 1 tiles equally well: the first of the list is taken, which is read twice."""
    family = FAMILIES["vicuna"]
    tokenizer = tokenizer_of(family)
    text = dataclasses.replace(family.text, vocab_size=len(tokenizer))
    vision = dataclasses.replace(family.vision, image_size=336, patch_size=56)
    config = LlavaConfig(vision, text, image_aspect="anyres", anyres=AnyRes())
    torch_model(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    processor_of(config).save_pretrained(tmp_path / "source")
    sizes, source, flags = pinpoints(config), tmp_path / "source", []
    if layout == "original":
        convert("import", "--llava", source, "--output", tmp_path / "first")
        source = tmp_path / "files"
        flags = ["--layout", "original", "--tower", "openai/clip-vit-large-patch14-336"]
        convert("export", "--checkpoint", tmp_path / "first", "--output", source, *flags)
        edit_json(source / "config.json", image_grid_pinpoints=sizes)  # as the published files have them
        reference.clip(vision, seed=1).save_pretrained(tmp_path / "clip")
        flags = ["--vision", tmp_path / "clip"]
    flags += ["--grid-order", order] if order else []
    convert("import", "--llava", source, "--output", tmp_path / "out", *flags)
    found = open_checkpoint(tmp_path / "out").config
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), np.uint8))
    tiles = found.tiling.tiles(image, False)
    first = {"transformers": Grid(1, 2), "original": Grid(2, 1)}[order or layout.replace("hf", "transformers")]
    if first == Grid(2, 1):
        np.testing.assert_array_equal(tiles, original_tiles(image, sizes, 336))
    else:
        expected = processor_of(config)([image], do_rescale=False, do_normalize=False)["pixel_values"][0]
        np.testing.assert_array_equal(tiles, np.moveaxis(np.array(expected), 1, -1))
    assert found.anyres.grids[0] == first
    convert("export", "--checkpoint", tmp_path / "out", "--output", tmp_path / "hf")
    again = AutoProcessor.from_pretrained(tmp_path / "hf").image_processor  # transformers follows the weights
    assert again.image_grid_pinpoints[0] == [336 * first.rows, 336 * first.columns]
