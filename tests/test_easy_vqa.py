"""The example behind the quickstart: its data, its lessons and its backbones as Hugging Face reads them."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from examples.easy_vqa import data, hugging_face, language_model, tower
from examples.easy_vqa.data import AskedImage, Question, asked_images, caption, facts
from llava_jax.data.sources import LlavaJson
from llava_jax.data.tokenization import IGNORE_INDEX
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks.easy_vqa import kind
from llava_jax.models.config import TextConfig
from llava_jax.models.llama import Llama
from llava_jax.models.llava import module_params


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("easy_vqa")
    data.write(directory, seed=0)
    return directory


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([("what shape is in the image?", "circle"), ("what is the color of the circle?", "red")], "a red circle"),
        ([("what color is the triangle?", "blue")], "a blue triangle"),  # it takes the shape for granted
        ([("is there a teal shape?", "yes"), ("is there not a circle?", "no")], "a teal circle"),
        (
            [("is there a circle?", "no"), ("is there not a triangle?", "yes"), ("what color?", "red")],
            "a red rectangle",
        ),
        ([("is there a circle?", "no"), ("what color is the shape?", "red")], None),
    ],
)
def test_captions_say_what_questions_and_answers_tell(questions, expected):
    assert caption(AskedImage("", tuple(Question(*pair) for pair in questions))) == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_facts_agree_with_every_open_answer(split):
    asked = [(image, question) for image in asked_images(split) for question in image.questions]
    opened = [(image, question) for image, question in asked if kind(*question) in ("shape", "colour")]
    assert len(opened) > len(asked) / 5
    for image, question in opened:
        assert facts(image)[kind(*question) == "colour"] == question.answer


def test_written_data_is_llava_json(written):
    captions, conversations, questions = (
        LlavaJson(written / f"{name}.json") for name in ("captions", "conversations", "questions")
    )
    assert (len(conversations), len(questions)) == (4000, 9673)
    assert 3000 < len(captions) <= 4000
    for samples, split in ((captions, "train"), (conversations, "train"), (questions, "test")):
        assert len({sample.id for sample in samples}) == len(samples)
        assert all(name.startswith(f"{split}/") and (data.IMAGES / name).exists() for s in samples for name in s.images)
    assert sum(len(sample.turns) for sample in conversations) == 2 * sum(
        len(p.questions) for p in asked_images("train")
    )


def test_right_answers_and_those_of_yes_are_scored_so(written, tmp_path, capsys):
    labels = written / "questions.json"
    right = {sample["id"]: sample["conversations"][1]["value"] for sample in json.loads(labels.read_text())}
    (tmp_path / "right.json").write_text(json.dumps(right))
    (tmp_path / "yes.json").write_text(json.dumps(dict.fromkeys(right, "yes")))
    scores = []
    for name in ("right", "yes"):
        answers = f"--answers={tmp_path}/{name}.json"
        evaluate.main(["score", "easy-vqa", answers, f"--labels={labels}", "--json"])
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == {"accuracy": 100.0, "by_kind": dict.fromkeys(scores[0]["by_kind"], 100.0), "total": 9673}
    assert set(scores[0]["by_kind"]) == {"shape", "colour", "is it that shape", "is it that colour"}
    yes = sum(answer == "yes" for answer in right.values())
    assert scores[1]["accuracy"] == round(100 * yes / 9673, 2) and scores[1]["by_kind"]["shape"] == 0


def test_written_data_is_a_function_of_the_seed(written, tmp_path):
    for seed, same in ((0, True), (1, False)):
        data.write(tmp_path, seed)
        again, first = (json.loads((d / "conversations.json").read_text()) for d in (tmp_path, written))
        assert (again == first) is same


def test_lessons_have_words_in_the_place_of_pictures_and_teach_answers_alone():
    known = [image for image in asked_images("train")[:40] if caption(image)]
    order = random.Random(0)
    lessons = [lesson for grade in language_model.GRADES for lesson in language_model.lessons(known, grade, order)]
    lessons = lessons[: len(lessons) // language_model.BATCH * language_model.BATCH]
    tokenizer = language_model.train_tokenizer(
        [language_model.render(lesson.turns, lesson.template).text for lesson in lessons]
    )
    length = max(grade.length for grade in language_model.GRADES)
    tokens, targets = (part.reshape(-1, length) for part in language_model.tokenize(lessons, length, tokenizer))
    for lesson, row, target in zip(lessons, tokens, targets, strict=True):
        assert "<image>" not in tokenizer.decode(row)
        assert " ".join(lesson.image) in tokenizer.decode(row)
        learned = tokenizer.decode(target[target != IGNORE_INDEX])
        assert learned.strip().removesuffix("</s>") == lesson.turns[-1][1]


def test_a_grade_holds_its_longest_lesson():
    for grade in language_model.GRADES:
        assert grade.steps % language_model.STEPS_A_CALL == 0
        order = random.Random(1)
        known = [image for image in asked_images("train") if caption(image)][:200]
        lessons = list(language_model.lessons(known, grade, order))[: 8 * language_model.BATCH]
        tokenizer = language_model.train_tokenizer(
            [language_model.render(lesson.turns, lesson.template).text for lesson in lessons]
        )
        language_model.tokenize(lessons, grade.length, tokenizer)  # raises if one is longer


def test_windows_hold_the_whole_shape():
    examples = asked_images("train")[:64]
    images, _ = tower.read(examples)
    boxes = np.array([tower.bounding_box(image) for image in images], np.int32)
    size = tower.WINDOW * tower.CONFIG.patch_size
    windows = np.asarray(tower.crop(jnp.asarray(images), jnp.asarray(boxes), jax.random.key(0), size))
    assert windows.shape == (64, size, size, 3)
    fits = np.maximum(boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]) <= size
    assert fits.sum() > 32

    def coloured_pixels(image, background):
        return (np.abs(image - background.astype(int)).sum(-1) > 30).sum()

    for window, image in zip(windows[fits], images[fits], strict=True):
        background = np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
        assert coloured_pixels(window, background) == coloured_pixels(image, background)


def test_saved_tower_is_what_transformers_loads(tmp_path):
    params = tower.init(jax.random.key(0))
    hugging_face.save_clip(tmp_path, tower.CONFIG, {f"vision.{name}": value for name, value in params.items()})
    reference, info = transformers.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    images, _ = tower.read(asked_images("test")[:2])
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states[tower.LAYERS].numpy()
    model = tower.with_params(lambda: tower.ClipVision(tower.CONFIG, rngs=nnx.Rngs(0)), params)
    ours = model(jnp.asarray(pixels.numpy().transpose(0, 2, 3, 1)), tower.LAYERS)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_saved_language_model_is_what_transformers_loads(tmp_path):
    tokenizer = language_model.train_tokenizer(["is there a red circle? yes", "what shape? triangle"])
    config = TextConfig(
        len(tokenizer), 32, 64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, tie_word_embeddings=True
    )
    llm = Llama(config, rngs=nnx.Rngs(0))
    params = {f"llm.{name}": value for name, value in module_params(llm).items()}
    hugging_face.save_llama(tmp_path, config, params, tokenizer)
    reference, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = np.array([transformers.AutoTokenizer.from_pretrained(tmp_path)("is there a red triangle?")["input_ids"]])
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).logits.numpy()
    positions = jnp.arange(ids.shape[1])[None]
    ours = llm.logits(llm(llm.embed_tokens(jnp.asarray(ids)), positions, jnp.ones_like(positions)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
