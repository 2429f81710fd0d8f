"""The web page as files and headers, without a browser: tests/serve/page_in_chromium.py has the rest."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from serving import tiny_engine
from starlette.testclient import TestClient

from llava_jax.serve import page
from llava_jax.serve.app import create_app

ROOT = Path(__file__).parents[2]
SOURCES = {file.name: file.read_text() for file in page.FILES}


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    page.mount(app, 12_345)
    return TestClient(app)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page beside the API, which wants a key."""
    with tiny_engine(tmp_path_factory.mktemp("page"), slots=1) as engine:
        yield TestClient(create_app(engine, "tiny", page=True, api_key="secret"))


def path_of(file: Path) -> str:
    return "/" if file.name == "index.html" else f"/static/{file.name}"


@pytest.mark.parametrize("file", page.FILES, ids=lambda file: file.name)
def test_files_are_served_with_their_types_and_nothing_may_be_added_to_them(client, file):
    response = client.get(path_of(file))
    types = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    assert response.headers["content-type"] == types.get(file.suffix[1:], "text/javascript; charset=utf-8")
    assert response.content == file.read_bytes().replace(b"{max_body_bytes}", b"12345")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert response.headers["permissions-policy"].startswith("camera=(self), microphone=()")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert {policy[name] for name in ("default-src", "form-action", "base-uri", "frame-ancestors")} == {"'none'"}
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]


def test_an_unchanged_file_is_not_sent_again(client):
    response = client.get("/")
    assert response.headers["cache-control"] == "no-cache"
    tag = response.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/static/main.js").headers["etag"] != tag


def test_the_page_knows_the_largest_body(client):
    assert '<meta name="max-body-bytes" content="12345">' in client.get("/").text


def test_other_paths_and_methods_get_the_errors_of_the_api(server):
    for path in ("/nothing", "/static/", "/static/nothing.js", "/static/../page.py", "/static/%2e%2e/page.py"):
        response = server.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    for path in ("/", "/static/main.js"):
        assert server.head(path).status_code == 200
        response = server.post(path)
        assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert server.get("/v1/models").status_code == 401
    response = server.get("/v1/nothing", headers={"Authorization": "Bearer secret"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["gradio_api/upload", "gradio_api/file=/etc/passwd", "queue/join", "config"])
def test_there_is_no_second_server(server, path):
    for response in (server.get(f"/{path}"), server.post(f"/{path}", json={})):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("name", [name for name in SOURCES if name.endswith(".js")])
def test_text_cannot_become_markup_or_code(name):
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|srcdoc|setAttribute|DOMParser"
    assert not re.search(sinks + r"|setTimeout\([\"'`]|createContextualFragment|javascript:", SOURCES[name])


def test_the_html_has_no_script_style_or_handler_of_its_own():
    html = SOURCES["index.html"]
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]* src=)|javascript:|</script>\S", html)


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_names_another_host(name):
    assert not re.search(r"(?<!xmlns=\")https?://[\w.]|url\(|@import|[\"'(]//", SOURCES[name])


def test_only_three_paths_of_the_server_are_asked():
    asked = re.findall(r"request\(\"([^\"]+)\"", "".join(SOURCES.values()))
    assert sorted(asked) == ["health", "v1/chat/completions", "v1/models"]
    assert "".join(SOURCES.values()).count("fetch(") == 1


def test_all_files_are_in_a_wheel(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    folders = [tmp_path / "llava_jax" / name for name in ("serve/static", "style")]
    built = {file.name: file.read_text() for folder in folders for file in folder.iterdir()}
    assert built == SOURCES
