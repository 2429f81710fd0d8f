"""`python -m llava_jax.serve`: from the command line to exit status 0."""

import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
import tiny
from serving import eventually

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.inference.engine import Engine
from llava_jax.inference.options import mesh_axes
from llava_jax.inference.requests import Request, Sampling
from llava_jax.parallel import compilation_cache
from llava_jax.serve import __main__ as command
from llava_jax.serve.app import create_app
from llava_jax.serve.server import Server, listen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("command"))


def status(url: str) -> int | None:
    try:
        return httpx2.get(f"{url}/health", timeout=None).status_code
    except httpx2.TransportError:
        return None


def test_it_serves_until_sigterm_and_finishes_what_it_began(checkpoint):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    arguments = ["--checkpoint", checkpoint, "--port", str(port), "--model-name", "tiny/model", "--no-page"]
    arguments += ["--slots", "4", "--queue", "8"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "LLAVA_API_KEY": "secret"}
    process = subprocess.Popen([sys.executable, "-m", "llava_jax.serve", *arguments], env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        seen = []
        assert eventually(lambda: process.poll() is not None or seen.append(status(url)) or seen[-1] == 200)
        assert set(seen) <= {None, 503, 200}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert client.models.retrieve("tiny/model").id == "tiny/model"
        hello = [{"role": "user", "content": "Hello"}]
        stream = client.chat.completions.create(model="tiny/model", messages=hello, stream=True, seed=0, max_tokens=400)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: status(url) != 200)
        *_, last = stream
        assert last.choices[0].finish_reason in ("stop", "length")
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def test_who_ends_it_while_it_compiles_does_not_wait(checkpoint):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    arguments = ["--checkpoint", checkpoint, "--port", str(port), "--no-page", "--compilation-cache", ""]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.Popen([sys.executable, "-m", "llava_jax.serve", *arguments], env=environment)
    try:
        assert eventually(lambda: status(f"http://127.0.0.1:{port}") == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


def test_the_first_signal_lets_answers_end_and_the_second_does_not(checkpoint, monkeypatch):
    engine = Engine.from_checkpoint(open_checkpoint(checkpoint), slots=1)
    server = Server(create_app(engine, "tiny"), engine)
    serving = threading.Thread(target=server.run, args=([listen("127.0.0.1", 0)],))
    serving.start()
    assert eventually(lambda: engine.ready)
    decode = engine._programs.decode
    monkeypatch.setattr(engine._programs, "decode", lambda *arguments: (time.sleep(0.05), decode(*arguments))[1])
    answer = engine.submit(Request([("user", "Hello")]), Sampling(max_new_tokens=1900, temperature=2.0))
    next(iter(answer))
    server.handle_exit(signal.SIGTERM, None)
    serving.join(0.5)
    assert serving.is_alive() and answer.finish_reason is None and not engine.ready
    server.handle_exit(signal.SIGTERM, None)
    serving.join()
    assert answer.finish_reason == "cancelled"


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Address already in use"):
        command.main(["--checkpoint", "nowhere", "--port", str(taken.getsockname()[1])])


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "nowhere: no such checkpoint"),
        (["--host", "no such host"], "no such host"),
        (["--host", "a" * 70], "no name of a host"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(args, message):
    with pytest.raises(UserError, match=message) as error:
        command.main(["--checkpoint", "nowhere", "--port", "0", *args])
    assert "\n" not in str(error.value)


def test_slots_that_do_not_fit_say_what_they_would_take(checkpoint):
    with pytest.raises(
        UserError,
        match=r"^100000000 slots take [\d.]+ GB for keys and values at least, .* room for [\d.]+ GB: lower --slots$",
    ):
        command.main(
            ["--checkpoint", str(checkpoint), "--port", "0", "--slots", "100000000", "--compilation-cache", ""]
        )


def test_two_servers_that_start_at_once(checkpoint):
    """Both can have the port until one of them listens."""
    engine = Engine.from_checkpoint(open_checkpoint(checkpoint), slots=1)
    with listen("127.0.0.1", 0) as first:
        second = listen(*first.getsockname())
        first.listen()
        with pytest.raises(UserError, match="Address already in use"):
            Server(create_app(engine, "tiny"), engine).run([second])


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    compilation_cache.use(str(tmp_path / path))
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs are not kept" in line


def test_a_full_disk_is_a_warning(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))  # nothing larger can be written
    try:
        compilation_cache.use(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--allowed-hosts", "http://a/"],
        ["--allow-origin", "*"],
        ["--allow-origin", "https://a/b"],
        ["--model-name", ""],
        ["--model-name", "a\nb"],
        ["--model-name", "a" * 201],
        ["--mesh", "tensor=0"],
        ["--queue", "1000000000"],
        ["--max-body-mb", "1000000000"],
    ],
)
def test_options_that_cannot_be(args, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--checkpoint", "nowhere", *args])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_options_of_hosts():
    args = command._parse(
        [
            "--checkpoint",
            "c",
            "--allowed-hosts",
            "a.example.org,*.b",
            "--allow-origin",
            "https://x",
            "--allow-origin",
            "http://y:1",
        ]
    )
    assert (args.allowed_hosts, args.allow_origin) == (["a.example.org", "*.b"], ["https://x", "http://y:1"])
    with pytest.raises(UserError, match="--image-hosts is for --allow-remote-images: give it, too"):
        command.main(["--checkpoint", "nowhere", "--image-hosts", "a.example.org"])


def test_numbers_out_of_range(capsys):
    for args in (["--port", "70000"], ["--slots", "0"], ["--queue", "many"]):
        with pytest.raises(SystemExit) as exit:
            command.main(["--checkpoint", "nowhere", *args])
        assert exit.value.code == 2
        assert "is no whole number from" in capsys.readouterr().err


def test_meshes(capsys):
    assert mesh_axes("tensor=2,fsdp=4") == {"tensor": 2, "fsdp": 4}
    for text in ("4", "tensor", "tensor=many", "heads=4"):
        with pytest.raises(SystemExit):
            command.main(["--checkpoint", "nowhere", "--mesh", text])
        assert "does not look like tensor=4" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"two words", b"two\nlines", "clé".encode(), bytes(range(256)), b"k" * 5000])
def test_keys_that_no_header_can_carry(tmp_path, content):
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(UserError, match="a key is one line"):
        command.main(["--checkpoint", "nowhere", "--api-key-file", str(file)])


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert command._api_key(str(file)) == "secret"
    assert command._api_key(None) is None
    monkeypatch.setenv("LLAVA_API_KEY", "other")
    assert command._api_key(None) == "other"


def test_the_unit_of_systemd_and_the_docs_use_flags_that_exist():
    root = Path(__file__).parents[2]
    texts = [
        (root / name).read_text().replace("\\\n", " ") for name in ("launch/llava-serve.service", "docs/serving.md")
    ]
    lines = [line for text in texts for line in text.splitlines() if "-m llava_jax.serve " in line]
    assert len(lines) >= 4
    for line in lines:
        command._parse(shlex.split(line.partition("llava_jax.serve ")[2]))
