"""Two images within the text of a question, of a model that has tiles of single images: every way of asking sees what
training shows."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image
from serving import data_url
from starlette.testclient import TestClient

import llava_jax
from llava_jax.chat import __main__ as chat
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.data.anyres import AnyRes
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.features import TEXT, Size
from llava_jax.data.sources import LlavaJson
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.in_training import request as evaluation_request
from llava_jax.evaluate.questions import read_questions
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from llava_jax.serve.app import create_app

ASKED = "Is <image> like <image> ?"
SIZES = {"a.png": (40, 12), "b.png": (15, 33)}
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The checkpoint, its generator, and the folder of images."""
    root, rng = tmp_path_factory.mktemp("interleaved"), np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / name)
    anyres = AnyRes(several="base")
    directory = tiny.checkpoint(root, tiny.config(image_aspect="anyres", anyres=anyres, image_position="as_is"))
    return directory, Generator.from_checkpoint(open_checkpoint(directory)), root


@pytest.fixture(scope="module")
def expected(world):
    _, generator, root = world
    return generator.answer([Request([("user", ASKED)], [root / name for name in SIZES])], GREEDY)[0]


def test_training_and_evaluation_see_the_same(world, expected):
    _, generator, root = world
    line = {"question_id": "1", "image": list(SIZES), "text": ASKED}
    (root / "questions.jsonl").write_text(json.dumps(line) + "\n")
    (question,) = read_questions([str(root / "questions.jsonl")], "")
    asked = evaluation_request(question, root, "as_is")
    assert generator.answer([asked], GREEDY) == [expected]

    turns = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "It is red."}]
    (root / "data.json").write_text(json.dumps([{"id": "1", "image": list(SIZES), "conversations": turns}]))
    config, prompts = generator.config, generator.prompts
    fields = config.image_tokens, 10_000, "as_is", 0, config.tiling
    source = LlavaJson(root / "data.json", root)
    encoded = EncodedSource(source, TextEncoder(prompts.template, prompts.tokenizer, *fields))
    trained, prompt = encoded.segment(0, source[0]), prompts.encode(asked)
    for ours, seen in ((trained.tokens, prompt.tokens), (trained.image_feature_index, prompt.image_feature_index)):
        np.testing.assert_array_equal(ours[: len(seen)], seen)
    features = [config.tiling.features(Size(*size), several=True) for size in SIZES.values()]
    assert (trained.num_images, trained.num_tiles) == (2, sum(each.tiles for each in features))
    (last,) = np.flatnonzero(np.diff(np.flatnonzero(trained.image_feature_index != TEXT)) > 1)  # words come after it
    assert last == len(features[0].index) - 1


def test_python(world, expected):
    directory, _, root = world
    model = llava_jax.load(directory)
    images = [Image.open(root / name) for name in SIZES]
    assert model.chat(ASKED, images, max_new_tokens=6) == expected
    assert model.generate([ASKED], [[root / name for name in SIZES]], max_new_tokens=6) == [expected]


def test_terminal_and_http(world, expected, monkeypatch, capsys):
    directory, _, root = world
    engine = Engine.from_checkpoint(open_checkpoint(directory), slots=1)
    engine.warm_up()
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *args, **options: engine)  # which the chat closes
    client = TestClient(create_app(engine, "tiny"))
    first, between, last = ({"type": "text", "text": text} for text in ASKED.split("<image>"))
    a, b = ({"type": "image_url", "image_url": {"url": data_url(Image.open(root / name))}} for name in SIZES)
    body = {"model": "tiny", "messages": [{"role": "user", "content": [first, a, between, b, last]}]}
    response = client.post("/v1/chat/completions", json=body | {"temperature": 0, "max_tokens": 6})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"].strip() == expected

    flags = [f"--image={root / name}" for name in SIZES]
    chat.main([f"--checkpoint={directory}", *flags, "--max-new-tokens=6", f"--prompt={ASKED}"])
    assert capsys.readouterr().out.strip() == expected


def test_predict(world, expected, tmp_path):
    directory, _, root = world
    line = {"question_id": "1", "image": list(SIZES), "text": ASKED}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line) + "\n")
    flags = [
        f"--questions={tmp_path / 'questions.jsonl'}",
        f"--images={root}",
        f"--output={tmp_path / 'answers.jsonl'}",
    ]
    evaluate.main(["predict", "llava-bench", f"--checkpoint={directory}", *flags, "--max-new-tokens=6"])
    (answer,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["text"] == expected
