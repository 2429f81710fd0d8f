"""The public API: what `import llava_jax` does and does not do, and that it gives what the commands give."""

import dataclasses
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import adapters as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_gcs import FakeGcs
from ml_collections import ConfigDict
from PIL import Image

import llava_jax
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.convert.__main__ import main as convert
from llava_jax.convert.export import export
from llava_jax.convert.import_weights import open_llava
from llava_jax.data.images import preprocess
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import CLIP_MEAN
from llava_jax.models.llava import build

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """What a new process with this code prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_has_no_side_effects():
    code = """
    import json, logging, os, sys, warnings
    def state():
        loggers = {name: getattr(log, "filters", []) for name, log in logging.root.manager.loggerDict.items()}
        hooks = [sys.excepthook, sys.unraisablehook, sys.displayhook]
        return dict(os.environ), list(sys.meta_path), loggers, list(warnings.filters), hooks
    before = state()
    import llava_jax
    assert state() == before
    print(json.dumps([name for name in sys.modules if name.startswith("llava_jax") or "jax" in name.split(".")]))
    """
    assert json.loads(run(code)) == ["llava_jax"]


def test_what_is_public_is_there_and_nothing_else_is_invented():
    for name in llava_jax.__all__:
        assert getattr(llava_jax, name) is not None and name in dir(llava_jax)
    with pytest.raises(AttributeError, match="module 'llava_jax' has no attribute 'lode'"):
        llava_jax.lode  # noqa: B018


def test_the_reference_says_what_is_public_now():
    page = runpy.run_path(str(ROOT / "docs/make_api.py"))["text"]()
    assert (ROOT / "docs/api.md").read_text() == page, "run: python docs/make_api.py"
    for name in llava_jax.__all__:
        assert f"llava_jax.{name}" in page


@pytest.mark.parametrize(
    "order",
    [
        "function = llava_jax.preflight; import llava_jax.preflight; from llava_jax.preflight import report",
        "import llava_jax.preflight; from llava_jax.preflight import report; function = llava_jax.preflight",
        "from llava_jax import preflight as function; import llava_jax.preflight.targets",
    ],
)
def test_preflight_is_a_package_and_a_function(order):
    code = f"""
    from llava_jax import cli
    cli.prepare()
    import inspect, llava_jax
    {order}
    from llava_jax.preflight import report
    assert function is llava_jax.preflight and callable(report.report)
    assert list(inspect.signature(function).parameters) == ["config", "target", "memory_fraction"]
    try:
        llava_jax.preflight("finetune", "v5e:nowhere")
    except llava_jax.UserError as error:
        print(error)
    """
    assert run(code).startswith("--target 'v5e:nowhere': ")


def test_preflight_leaves_the_environment_as_it_was(checkpoint):
    config = llava_jax.get_config("common")
    config.update(
        init=str(checkpoint), max_length=64, batch_rows=4, remat="none", mesh={"data": 1, "fsdp": -1, "tensor": 1}
    )
    before = dict(os.environ)
    report = llava_jax.preflight(config, "cpu")
    assert dict(os.environ) == before
    assert report.fits and report.target == "cpu"


# ------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def model(checkpoint) -> llava_jax.Model:
    return llava_jax.load(checkpoint)


@pytest.fixture(scope="module")
def generator(checkpoint) -> Generator:
    return Generator.from_checkpoint(open_checkpoint(checkpoint))


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (30, 20, 3), np.uint8)


def closed(array: np.ndarray) -> Image.Image:
    image = Image.fromarray(array)
    image.close()
    return image


def truncated(array: np.ndarray) -> Image.Image:
    """An image that Pillow has opened, but cannot decode."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()[:300]))


def test_chat_gives_the_answer_of_the_commands(model, generator, tmp_path):
    array = noise()
    image = Image.fromarray(array)
    image.save(tmp_path / "image.png")
    request = Request([("user", "<image>\nWhat is it?")], [image])
    expected = generator.answer([request], Sampling(max_new_tokens=6))[0]
    for given in ([array], [image], [tmp_path / "image.png"], array, str(tmp_path / "image.png")):
        assert model.chat("What is it?", given, max_new_tokens=6) == expected
    parts = model.chat("What is it?", [image], stream=True, max_new_tokens=6)
    assert "".join(parts) == expected
    turns = [{"role": "user", "content": "What is it?"}]
    assert model.chat(turns, [image], max_new_tokens=6) == expected

    turns = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A cat."), ("user", "Sure?")]
    marked = [(role, text.replace("What", "<image>\nWhat")) for role, text in turns]
    expected = generator.answer([Request(marked, [image])], Sampling(max_new_tokens=6))[0]
    assert model.chat(turns, [image], max_new_tokens=6) == expected
    assert model.chat(turns[1:], [image], system="Be brief.", max_new_tokens=6) == expected


def test_many_prompts_are_answered_as_each_alone(model):
    prompts = ["What is it?", "And this?", [("user", "Hello")], "<image> or <image>?"]
    images = [noise(), [noise(1)], None, np.stack([noise(2), noise(3)])]
    alone = [model.chat(*pair, max_new_tokens=5) for pair in zip(prompts, images, strict=True)]
    assert model.generate(prompts, images, batch_size=3, max_new_tokens=5) == alone
    assert model.generate(prompts[2:3]) == [model.chat("Hello")]
    assert model.generate([]) == []


def test_a_prompt_that_leaves_less_room_gets_a_shorter_answer(checkpoint):
    model = llava_jax.load(checkpoint)
    model._generator.config = dataclasses.replace(
        model.config, text=dataclasses.replace(model.config.text, max_position_embeddings=60)
    )
    asked = "Hello " * 3
    assert model._generator.room(Request([("user", asked)])) < 60 < 512
    assert model.generate([asked, "Hi"]) == [model.chat(asked), model.chat("Hi")]


def test_logits_are_those_of_training_and_logprobs_are_of_the_answer(model, checkpoint):
    prompt, images, answer = "What is it?", [noise()], "It is red."
    encoded = model._generator.prompts.encode(
        Request([("user", f"<image>\n{prompt}")], [Image.fromarray(images[0])], answer)
    )
    loaded, L = open_checkpoint(checkpoint), len(encoded.tokens)
    module = build(loaded.config, loaded.load())
    batch = {
        "tokens": encoded.tokens[None],
        "images": preprocess(Image.fromarray(images[0]), 16, "pad", CLIP_MEAN)[None, None],
        "image_feature_index": encoded.image_feature_index[None],
        "positions": np.arange(L, dtype=np.int32)[None],
        "segment_ids": np.ones((1, L), np.int32),
    }
    scores = model.logits(prompt, answer, images)
    assert (scores.dtype, scores.shape) == (np.float32, (L, model.config.text.vocab_size))
    np.testing.assert_allclose(scores, module.llm.logits(module(batch))[0], atol=1e-4)

    start = len(model.logits(prompt, images=images))
    answered = encoded.tokens[start:]
    assert model.tokenizer.decode(answered).strip() == answer
    expected = np.asarray(jax.nn.log_softmax(scores[start - 1 : -1]))[np.arange(len(answered)), answered]
    np.testing.assert_array_equal(model.logprobs(prompt, answer, images), expected)


def test_encoded_images_are_what_the_decoder_sees(model, checkpoint):
    images = [noise(seed) for seed in range(3)]
    loaded = open_checkpoint(checkpoint)
    module = build(loaded.config, loaded.load())
    pixels = np.stack([preprocess(Image.fromarray(image), 16, "pad", CLIP_MEAN) for image in images])
    np.testing.assert_allclose(model.encode_images(images, batch_size=2), module.encode_images(pixels), atol=1e-5)
    assert model.encode_images([]).shape == (0, 4, 48)


def test_options_of_loading(checkpoint, model):
    expected = model.chat("What is it?", [noise()], max_new_tokens=4)
    (mesh, devices) = {"tensor": 1}, jax.devices()[:1]
    assert (
        llava_jax.load(checkpoint, mesh=mesh, devices=devices).chat("What is it?", [noise()], max_new_tokens=4)
        == expected
    )
    for option, message in (({"quantize": "int4"}, "^quantize is 'int4'"), ({"mesh": {"model": 2}}, "an axis 'model'")):
        with pytest.raises(llava_jax.UserError, match=message):
            llava_jax.load(checkpoint, **option)
    small = llava_jax.load(str(checkpoint), quantize="int8", dtype="bfloat16", template="plain")
    types = {leaf.dtype.name for leaf in small._generator.decoder._weights}
    assert {"int8", "bfloat16"} <= types and small.chat("Hi", max_new_tokens=2) != model.chat("Hi", max_new_tokens=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.chat("an <image>"), "^1 <image> in the message, but 0 images for it"),
        (lambda model: model.chat([("user", "<image>"), ("assistant", ""), ("user", "b")], [noise()] * 2), "1 <image>"),
        (lambda model: model.chat("a", ["/nope.png"]), "/nope.png: No such file"),
        (lambda model: model.chat([("assistant", "a")]), "^a prompt ends with the user's turn, not with .*assistant"),
        (lambda model: model.chat([("user", "a"), ("user", "b")]), "user and assistant take turns"),
        (lambda model: model.chat([("user",)]), "^a turn is "),
        (lambda model: model.chat("a", [noise().astype(float)]), r"^an image is float64\[30, 20, 3\]: arrays are"),
        (lambda model: model.chat("a", temperature=-1), "^temperature is -1"),
        (lambda model: model.chat("a" * 9000), "positions"),
        (lambda model: model.chat("a", [closed(noise())]), "^image from memory is damaged .Operation on closed image"),
        (lambda model: model.encode_images([truncated(noise())]), "^image from memory is damaged .* truncated"),
        (lambda model: model.generate(["a"], []), "^1 prompts, but images for 0"),
        (lambda model: model.generate("abc"), "^prompts is one text: give a list"),
        (lambda model: model.generate(["a"], Image.fromarray(noise())), "^images is one image: give a list"),
        (lambda model: model.generate(["a"], "image.png"), "^images is one image: give a list"),
        (lambda model: model.generate(["a"], batch_size=0), "^batch_size is 0: it has to be 1 or more"),
        (lambda model: model.encode_images([noise()], batch_size=-1), "^batch_size is -1"),
        (lambda model: llava_jax.load("https://example.org/a"), "^https://example.org/a: no checkpoint can be at such"),
        (lambda model: llava_jax.load("/nope"), "^/nope: no such checkpoint"),
        (lambda model: llava_jax.load(ROOT), "neither the output of `convert import`"),
        (lambda model: llava_jax.load("/nope", dtype="int4"), "^dtype is 'int4': choose float32 or bfloat16"),
        (lambda model: llava_jax.get_config("finetune:14b"), "^--config=finetune:14b: '14b' in '14b' is none of"),
        (lambda model: llava_jax.get_config("fine"), "no recipe 'fine'; the package has pretrain, finetune"),
        (lambda model: llava_jax.get_config("/nope.py"), "^/nope.py: no such recipe"),
        (lambda model: llava_jax.train({"stage": "finetune"}, "/nope"), "^config is a dict: give a recipe"),
        (lambda model: llava_jax.preflight(None, "cpu"), "^config is a NoneType: give a recipe"),
    ],
)  # fmt: skip
def test_mistakes_raise_one_line(model, call, message):
    with pytest.raises(llava_jax.UserError, match=message) as raised:
        call(model)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------- adapters

LORAS = {"red": support.lora(2), "blue": support.lora(4, dora=True)}


@pytest.fixture(scope="module")
def adapters(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Workdirs of LoRA runs; `blue` has its own projector and template."""
    directory, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, lora) in enumerate(LORAS.items(), 1):
        trained = support.adapter(tiny.config(), lora, seed, projector=name == "blue")
        template = "plain" if name == "blue" else "v1"
        found[name] = support.workdir(directory / name, checkpoint, lora, trained, template)
    return found


@pytest.fixture(scope="module")
def adapted(checkpoint, adapters) -> llava_jax.Model:
    return llava_jax.load(checkpoint, adapters=adapters)


def test_an_adapter_gives_what_its_merged_model_gives(adapted, adapters, model):
    """In all methods; the base, and an answer that is only begun, are not changed by others."""
    prompts, images = ["What is it?", "<image> or what?", "Hello"], [noise(), noise(), None]
    assert adapted.adapters == ["red", "blue"] and model.adapters == []
    begun = adapted.chat("What is it?", [noise()], stream=True, max_new_tokens=8)
    parts, answers = [next(begun)], []
    for name, expected in ((None, model), *((name, llava_jax.load(path)) for name, path in adapters.items())):
        answers.append(expected.generate(prompts, images, max_new_tokens=8))
        assert adapted.generate(prompts, images, adapter=name, max_new_tokens=8) == answers[-1]
        assert adapted.chat(prompts[0], images[0], adapter=name, max_new_tokens=8) == answers[-1][0]
        scores = adapted.logits("What is it?", "It is", noise(), adapter=name)
        np.testing.assert_allclose(scores, expected.logits("What is it?", "It is", noise()), atol=1e-4)
        scores = adapted.logprobs("What is it?", "It is", noise(), adapter=name)
        np.testing.assert_allclose(scores, expected.logprobs("What is it?", "It is", noise()), atol=1e-4)
        features = adapted.encode_images([noise()], adapter=name)
        np.testing.assert_allclose(features, expected.encode_images([noise()]), atol=1e-5)
    assert len(set(map(tuple, answers))) == 3
    assert "".join([*parts, *begun]) == answers[0][0]


@pytest.mark.parametrize("options", [{"mesh": {"tensor": 1}}, {"devices": jax.devices()[-1:]}, {"quantize": "int8"}])
def test_adapters_go_with_the_options_of_loading(checkpoint, adapters, adapted, options):
    loaded = llava_jax.load(checkpoint, adapters=adapters, **options)
    found, expected = (each.logits("What is it?", "It is", noise(), adapter="red") for each in (loaded, adapted))
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.3 if "quantize" in options else 1e-4)
    assert len(loaded.chat("What is it?", noise(), adapter="red", max_new_tokens=3)) > 0


def test_mistakes_with_adapters_are_one_line(adapted, checkpoint, adapters, tmp_path):
    message = r"^no adapter is named 'rde': there is 'red', 'blue'; did you mean 'red'\?$"
    for call in (adapted.chat, adapted.logits, lambda prompt, adapter: adapted.generate([prompt], adapter=adapter)):
        with pytest.raises(llava_jax.UserError, match=message):
            call("Hello", adapter="rde")
    other = tiny.checkpoint(tmp_path, tiny.config(projector_type="linear"))
    for base, directory, message in (
        (other, adapters["red"], "red: is for another base: its projector_type is mlp2x_gelu, and that of"),
        (adapters["red"], adapters["blue"], "the checkpoint has an adapter already"),
        (checkpoint, checkpoint, "model: a checkpoint without an adapter: give it as --checkpoint"),
        (checkpoint, "/nope", "^/nope: no such checkpoint"),
    ):
        with pytest.raises(llava_jax.UserError, match=message) as raised:
            llava_jax.load(base, adapters={"mine": directory})
        assert "\n" not in str(raised.value)
    with pytest.raises(llava_jax.UserError, match="'' is no name of an adapter: 1 to 200 printable characters"):
        llava_jax.load(checkpoint, adapters={"": adapters["red"]})


# ------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "hf"
    export(str(checkpoint), str(directory), None)
    return directory


def test_a_model_of_hugging_face_is_the_same_as_after_its_import(exported, tmp_path):
    convert(["import", "--llava", str(exported), "--output", str(tmp_path / "imported")])
    imported, direct = open_checkpoint(tmp_path / "imported"), open_llava(str(exported))
    assert direct.description.to_json() | {"id": 0} == imported.description.to_json() | {"id": 0}
    expected = imported.load(dtype=lambda name, stored: jnp.dtype(jnp.bfloat16))
    found = direct.load(dtype=lambda name, stored: jnp.dtype(jnp.bfloat16))
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    answers = [
        llava_jax.load(source).chat("What?", [noise()], max_new_tokens=4) for source in (exported, imported.root)
    ]
    assert answers[0] == answers[1]


# ------------------------------------------------------------------------------------------------- training


def tiny_run(checkpoint: Path, directory: Path, **changes) -> ConfigDict:
    config = llava_jax.get_config("finetune")
    file, images = tiny.data(directory)
    config.init, config.data.json, config.data.images = str(checkpoint), str(file), str(images)
    config.update(max_length=64, batch_rows=4, steps=4, remat="none", **changes)
    return config


def test_training_reports_to_callbacks_and_resumes_after_an_interrupt(checkpoint, tmp_path):
    config, seen = tiny_run(checkpoint, tmp_path), []

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        seen.append((step, sorted(metrics)))
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="called again, training resumes"):
        llava_jax.train(config, tmp_path / "run", callbacks=[interrupt])
    assert [step for step, _ in seen][:2] == [1, 2] and "loss" in seen[0][1]
    last = open_checkpoint(tmp_path / "run").step
    llava_jax.train(config, str(tmp_path / "run"), callbacks=[interrupt])
    assert [step for step, _ in seen][-(4 - last) :] == list(range(last + 1, 5))
    assert (tmp_path / "run" / "loss.png").exists()
    assert llava_jax.load(tmp_path / "run").chat("Hi", max_new_tokens=2) is not None
    with pytest.raises(llava_jax.UserError, match="config.init is not set"):
        llava_jax.train("finetune:7b", tmp_path / "other")


def test_a_recipe_is_a_name_or_a_file(tmp_path, monkeypatch):
    assert llava_jax.get_config("finetune:13b,v0").model == "llava-v0-13b"
    (tmp_path / "mine.py").write_text(
        "from llava_jax.recipes import common\n"
        "def get_config(rows='8'):\n"
        "    config = common.get_config()\n"
        "    config.batch_rows, config.init = int(rows), '~/runs/start'\n"
        "    return config\n"
    )
    monkeypatch.setenv("HOME", "/home/me")
    config = llava_jax.get_config(f"{tmp_path}/mine.py:2")
    assert (config.batch_rows, config.init) == (2, "/home/me/runs/start")
    assert llava_jax.get_config(tmp_path / "mine.py").batch_rows == 8


def test_what_another_host_writes_to_an_object_store_is_seen():
    code = """
    import sys
    from etils import epath
    from llava_jax import remote
    remote.name(*sys.argv[1:])
    directory = epath.Path("gs://bucket/run")
    for _ in range(2):
        print(sorted(file.name for file in directory.iterdir()), flush=True)
        sys.stdin.readline()
    """

    def listed(*named: str) -> list[str]:
        with FakeGcs() as store:
            store.put("bucket", "run/a", b"1")
            command = [sys.executable, "-c", textwrap.dedent(code), *named]
            environment = os.environ | store.environment
            environment.pop("FSSPEC_GCS", None)  # which commands set
            process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True)
            first = process.stdout.readline()
            store.put("bucket", "run/b", b"2")
            second, _ = process.communicate("\n\n")
        return [first.strip(), second.strip()]

    assert listed("gs://bucket/run") == ["['a']", "['a', 'b']"]
    assert listed() == ["['a']", "['a']"], "gcsfs answers from its cache: this test can fail"
