"""Adapters by their names over HTTP: answered together, listed, loaded and unloaded, from one directory alone."""

import functools
import json
import os

import adapters as support
import jax.numpy as jnp
import openai
import pytest
import tiny
from fastapi.testclient import TestClient
from serving import data_url, eventually, noise_image, serving

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.convert.served_adapter import read_for
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import Generator
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.llava import build
from llava_jax.serve import __main__ as command
from llava_jax.serve.app import create_app
from llava_jax.serve.models import AdapterDirectory

LORAS = {"red": support.lora(2), "blue": support.lora(4, dora=True)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and a directory of adapters of it: `red` and `blue`, which has its own projector."""
    directory = tmp_path_factory.mktemp("adapters")
    base = tiny.checkpoint(directory)
    for seed, (name, lora) in enumerate(LORAS.items(), 1):
        trained = support.adapter(tiny.config(), lora, seed, projector=name == "blue")
        support.workdir(directory / "below" / name, base, lora, trained)
    return directory


@pytest.fixture(scope="module")
def engine(world):
    checkpoint = open_checkpoint(world / "model")
    engine = Engine.from_checkpoint(checkpoint, slots=4, queue=8, adapters=2, adapter_rank=4)
    engine.adapters.load("red", read_for(str(world / "below/red"), checkpoint))
    engine.warm_up()
    yield engine
    engine.close(drain=False)


@pytest.fixture(scope="module")
def app(world, engine):
    read = functools.partial(read_for, base=open_checkpoint(world / "model"))
    directory = AdapterDirectory(engine, "tiny", str(world / "below"), read)
    return create_app(engine, "tiny", api_key="secret", adapter_directory=directory)


@pytest.fixture
def http(app):
    with TestClient(app, headers={"Authorization": "Bearer secret"}) as http:
        yield http


def change(http: TestClient, what: str, **body):
    return http.post(f"/v1/{what}_lora_adapter", json=body)


@functools.cache
def merged(directory, name: str) -> Generator:
    """A model without adapters that computes the same."""
    checkpoint = open_checkpoint(directory / "model")
    params = checkpoint.load()
    if name != "tiny":
        read = read_for(str(directory / "below" / name), checkpoint)
        params = support.with_merged(params, read.lora, read.params)
    model = build(checkpoint.config, {name: jnp.array(value) for name, value in params.items()})
    return Generator(model, PromptEncoder.from_checkpoint(checkpoint))


def test_the_models_name_chooses_the_adapter(world, app, http):
    assert change(http, "load", lora_name="blue", lora_path="blue").status_code == 200
    image, asked = noise_image(3), [{"type": "image_url", "image_url": {"url": data_url(noise_image(3))}}]
    content = [*asked, {"type": "text", "text": "What colour is it?"}]
    request = Request([("user", "<image>\nWhat colour is it?")], [image])
    texts = {}
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        options = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_completion_tokens": 8}
        streams = {name: client.chat.completions.create(model=name, stream=True, **options)
                   for name in ("tiny", "red", "blue")}  # fmt: skip
        for name, stream in streams.items():
            pieces = list(stream)
            assert {piece.model for piece in pieces} == {name}
            texts[name] = "".join(piece.choices[0].delta.content or "" for piece in pieces)
            answers = client.chat.completions.create(model=name, n=2, logprobs=True, **options)
            assert [choice.message.content for choice in answers.choices] == [texts[name]] * 2
            assert answers.model == name and answers.choices[0].logprobs.content
        assert [model.id for model in client.models.list()] == ["tiny", "red", "blue"]
        with pytest.raises(openai.NotFoundError, match="'green' is not served here: there is 'tiny', 'red', 'blue'"):
            client.chat.completions.create(model="green", **options)
    for name, text in texts.items():
        assert text == merged(world, name).answer([request], Sampling(max_new_tokens=8))[0]
    assert len(set(texts.values())) == 3
    assert "llava_adapters 2.0" in http.get("/metrics").text
    assert change(http, "unload", lora_name="blue").text == "Success: LoRA adapter 'blue' removed successfully."


def test_adapters_are_listed_with_their_base(http):
    base, red = http.get("/v1/models").json()["data"]
    assert set(base) == {"id", "created", "object", "owned_by", "max_model_len"}
    assert (red["id"], red["parent"], red["root"].endswith("below/red")) == ("red", "tiny", True)
    assert http.get("/v1/models/red").json() == red
    assert http.get("/v1/models/blue").status_code == 404


def test_a_name_may_have_odd_characters(http):
    for name in ("a/b", "../x", "a b", "färbig 🦙", "red:1", "NAME=DIR", "%2e", "'", "\\"):
        response = change(http, "load", lora_name=name, lora_path="red")
        assert response.status_code == 200 and repr(name)[1:-1] in repr(response.text)
        assert name in [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert change(http, "unload", lora_name=name).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"lora_name": "red", "lora_path": "red"}, 400, "lora_path", "named red already: unload it first"),
        ({"lora_name": "tiny", "lora_path": "red"}, 400, "lora_name", "is the name of the base"),
        ({"lora_name": "", "lora_path": "red"}, 400, "lora_name", "is no name of an adapter"),
        ({"lora_name": "a\nb", "lora_path": "red"}, 400, "lora_name", "is no name of an adapter"),
        ({"lora_name": "x"}, 400, "lora_path", "Field required"),
        ({"lora_name": "x", "lora_path": 3}, 400, "lora_path", "valid string"),
        ({"lora_name": "x", "lora_path": "red", "load_inplace": True}, 400, "load_inplace", "not supported"),
        ({"lora_name": "x", "lora_path": "red", "rank": 3}, 400, "rank", "no field that is known"),
        ({"lora_name": "x", "lora_path": "empty"}, 400, "lora_path", "empty: neither the output of"),
    ],
)
def test_what_cannot_be_loaded_is_refused(world, http, body, status, param, message):
    (world / "below/empty").mkdir(exist_ok=True)
    response = change(http, "load", **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"] and str(world) not in error["message"]


def test_only_what_is_below_the_directory_is_read(world, http, monkeypatch):
    os.symlink(world / "model", world / "below/link")
    os.symlink("/dev/zero", world / "below/zero")
    os.symlink("loop", world / "below/loop")
    (world / "below/file").write_text("")
    reads = []
    monkeypatch.setattr("llava_jax.convert.served_adapter.open_checkpoint", lambda path: reads.append(path))
    messages = set()
    paths = ["..", ".", "", "/", "../model", str(world / "model"), "/etc", "/proc/self/fd/0", "red/../../model"]
    paths += ["link", "zero", "loop", "file", "missing", "~root", "\\..\\..", "red\n", "a\0b", "a" * 5000]
    for path in [*paths, "gs://bucket/x", "file:///etc"]:
        response = change(http, "load", lora_name="x", lora_path=path)
        assert response.status_code == 400, path
        messages.add(response.json()["error"]["message"])
    assert messages == {"lora_path: there is no such directory below the server's --adapter-directory"}
    assert reads == []


def test_unloading_lets_accepted_answers_end(engine, http, monkeypatch):
    assert change(http, "load", lora_name="blue", lora_path="blue").status_code == 200
    prompt = engine.prepare(Request([("user", "Hello")]), engine.adapters.get("blue"))
    answer = engine.submit(prompt, Sampling(temperature=1.0, max_new_tokens=400))
    assert change(http, "unload", lora_name="blue").status_code == 200
    body = {"model": "blue", "messages": [{"role": "user", "content": "Hello"}]}
    assert http.post("/v1/chat/completions", json=body).json()["error"]["code"] == "model_not_found"
    assert "".join(piece.text for piece in answer) and answer.finish_reason in ("stop", "length")
    response = change(http, "unload", lora_name="blue")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "lora_name")
    assert change(http, "unload", lora_name="tiny").status_code == 404
    assert eventually(lambda: engine.stats().busy == 0)


def test_the_routes_need_the_key_and_the_flag(engine, app):
    with TestClient(app) as http:
        for what in ("load", "unload"):
            assert change(http, what, lora_name="red", lora_path="red").status_code == 401
    with TestClient(create_app(engine, "tiny")) as http:
        for what in ("load", "unload"):
            assert change(http, what, lora_name="red", lora_path="red").status_code == 404
        assert "/v1/load_lora_adapter" not in http.get("/openapi.json").json()["paths"]


def test_the_command_loads_what_it_is_given_and_keeps_room(world, monkeypatch):
    given = {}
    monkeypatch.setattr(command.options, "open_engine", lambda args, read, **options: given.update(options, args=args))
    monkeypatch.setattr("llava_jax.serve.app.create_app", lambda *args, **options: given.update(app=options))
    monkeypatch.setattr("llava_jax.serve.server.Server.__init__", lambda *args: None)
    monkeypatch.setattr("llava_jax.serve.server.Server.run", lambda *args: None)
    start = ["--checkpoint", str(world / "model"), "--port", "0", "--adapter", f"red={world}/below/red"]
    command.main(start)
    assert given["args"].adapter == [("red", f"{world}/below/red")]
    assert "adapters" not in given and given["app"]["adapter_directory"] is None
    command.main([*start, "--adapter-directory", str(world / "below"), "--max-adapters", "3"])
    assert (given["adapters"], given["adapter_rank"]) == (3, 64)
    assert given["app"]["adapter_directory"] is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--adapter", "model=x"], "'model' is the name of the base"),
        (["--adapter", "a\tb=x"], "is no name of an adapter"),
        (["--max-adapters", "3"], "for adapters of --adapter-directory: give it, too"),
        (["--adapter-directory", "/missing"], "--adapter-directory /missing: there is no such local directory"),
        (["--adapter", "a=/missing"], "/missing: no such checkpoint"),
        (["--adapter", "a={below}/red", "--adapter", "a={below}/blue"], "another one has this name"),
    ],
)
def test_bad_adapters_are_errors_of_one_line_before_weights_are_read(world, args, message, monkeypatch):
    monkeypatch.setattr(Engine, "__init__", None)
    args = [arg.format(below=world / "below") for arg in args]
    with pytest.raises(command.UserError, match=message):
        command.main(["--checkpoint", str(world / "model"), "--port", "0", *args])


def test_arguments_that_are_no_adapter(capsys):
    for text in ("red", "=x", "red="):
        with pytest.raises(SystemExit):
            command.main(["--checkpoint", "nowhere", "--adapter", text])
        assert "does not look like NAME=DIR" in capsys.readouterr().err


def test_hostile_bodies_are_refused(http):
    for data, status in ((b"[" * 1000, 400), (b"null", 400), (b'{"lora_name": "a", "lora_name": "b"}', 400)):
        for what in ("load", "unload"):
            headers = {"Content-Type": "application/json"}
            response = http.post(f"/v1/{what}_lora_adapter", content=data, headers=headers)
            assert response.status_code == status and set(response.json()) == {"error"}
    assert http.post("/v1/unload_lora_adapter", content=json.dumps({"lora_name": "red"})).status_code == 400
