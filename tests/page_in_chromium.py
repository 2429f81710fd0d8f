"""The web page in a real browser: `make test-browser` installs Debian's Chromium and runs this."""

import contextlib
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import safehttpx
import tiny
from etils import epath
from gradio.utils import get_upload_folder
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from serving import bomb, data_url, eventually, picture, serving

from llava_jax import transcript
from llava_jax.checkpoint import open_checkpoint
from llava_jax.data import check
from llava_jax.generate import Generator, Request, Sampling
from llava_jax.serve.app import create_app
from llava_jax.serve.engine import Engine, QueueFull

FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # root has no sandbox
PHONE = {"width": 390, "height": 844}
MILLISECONDS = 1_800_000  # that anything may take, as in pyproject.toml
expect.set_options(timeout=MILLISECONDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(tiny.checkpoint(tmp_path_factory.mktemp("page")))


@pytest.fixture(scope="module")
def engine(checkpoint) -> Iterator[Engine]:
    engine = Engine.from_checkpoint(checkpoint, slots=2)
    engine.warm_up()
    yield engine
    engine.close(drain=False)


@pytest.fixture(scope="module")
def greedy(checkpoint):
    """The answer to turns of user and assistant."""
    generator = Generator.from_checkpoint(checkpoint)

    def answer(*texts: str, images=(), tokens: int = 12) -> str:
        turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
        return generator.answer([Request(turns, images)], Sampling(max_new_tokens=tokens))[0]

    return answer


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(create_app(engine, "tiny", page=True)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert chromium, "there is no chromium: `make test-browser` installs it, CHROMIUM=FILE names another"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser) -> Iterator[BrowserContext]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"])
    context.set_default_timeout(MILLISECONDS)
    yield context
    context.close()


@pytest.fixture
def page(context, url) -> Iterator[Page]:
    """The page, which asks nobody but its server and has no errors of its own."""
    page = context.new_page()
    elsewhere, errors = [], []
    page.on("request", lambda request: None if _own(request.url, url) else elsewhere.append(request.url))
    page.on("requestfailed", lambda request: elsewhere.remove(request.url) if request.failure == "csp" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    open_page(page, url)
    yield page
    assert (elsewhere, errors) == ([], [])


@pytest.fixture
def png(tmp_path) -> Path:
    picture(1).save(tmp_path / "my picture.png")
    return tmp_path / "my picture.png"


def _own(address: str, url: str) -> bool:
    return address.startswith((url + "/", "data:", "blob:"))


def open_page(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_load_state("networkidle")


def box(page: Page) -> Locator:
    return page.locator("#message textarea")


def questions(page: Page) -> Locator:
    return page.locator("#conversation .user-row")


def answers(page: Page) -> Locator:
    return page.locator("#conversation [data-testid=bot]")


def thumbnails(page: Page) -> Locator:
    return page.locator("#message .thumbnail-item")


def attach(page: Page, *files: Path) -> None:
    before = thumbnails(page).count()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a file").click()
    chooser.value.set_files(files)
    expect(thumbnails(page)).to_have_count(before + len(files))


def send(page: Page, text: str) -> None:
    box(page).fill(text)
    page.locator("#message [data-testid=submit-button]").click()


def wait_until_answered(page: Page, count: int) -> str:
    """-> the last answer's text as it is copied, once it is complete."""
    expect(answers(page)).to_have_count(count)
    expect(page.locator("#message [data-testid=submit-button]")).to_be_visible()
    page.get_by_role("button", name="Copy message").last.click()
    return page.evaluate("navigator.clipboard.readText()")


def set_sampling(page: Page, temperature: float = 0, longest: int = 12) -> None:
    page.get_by_role("button", name="Sampling").click()
    for label, value in (("Temperature", temperature), ("Longest", longest)):
        field = page.locator(f"input[type=number][aria-label*='{label}']")
        field.fill(str(value))
        field.blur()


@contextlib.contextmanager
def slowly(engine: Engine, monkeypatch, seconds: float = 0.2) -> Iterator[None]:
    """Answers come slowly enough for something to be done meanwhile."""
    submit = engine.submit

    def slow_submit(request, sampling, sink):
        def slow_sink(piece):
            time.sleep(seconds)
            sink(piece)

        return submit(request, sampling, slow_sink)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", slow_submit)
        yield


def drop(page: Page, target: str, file: Path, kind: str = "drop") -> None:
    """Drops or pastes a picture onto an element."""
    page.evaluate(
        """async ([target, url, name, kind]) => {
          const data = new DataTransfer();
          data.items.add(new File([await (await fetch(url)).blob()], name, {type: "image/png"}));
          const event = kind == "drop" ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
                                       : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
          document.querySelector(target).dispatchEvent(event);
        }""",
        [target, data_url(Image.open(file)), file.name, kind],
    )


def test_a_picture_is_uploaded_and_talked_about(page, png, greedy):
    set_sampling(page)
    attach(page, png)
    send(page, "What is it?")
    first = wait_until_answered(page, 1)
    assert first == greedy("<image>\nWhat is it?", images=[png])
    expect(questions(page).locator("img")).to_have_count(1)
    attach(page, png, png)
    send(page, "And these?")
    talk = ["<image>\nWhat is it?", first, "<image>\n<image>\nAnd these?"]
    second = wait_until_answered(page, 2)
    assert second == greedy(*talk, images=[png] * 3)
    send(page, "Sure?")
    assert wait_until_answered(page, 3) == greedy(*talk, second, "Sure?", images=[png] * 3)
    expect(box(page)).to_have_value("")
    expect(thumbnails(page)).to_have_count(0)


@pytest.mark.parametrize("target", ["#conversation", "#message textarea"])
def test_a_picture_is_dropped_anywhere(page, png, target):
    drop(page, target, png)
    expect(thumbnails(page)).to_have_count(1)
    drop(page, target, png)
    expect(thumbnails(page)).to_have_count(2)


def test_a_picture_is_pasted(page, png):
    drop(page, "#message textarea", png, kind="paste")
    expect(thumbnails(page)).to_have_count(1)


def test_a_picture_is_taken(page):
    page.get_by_role("button", name="Camera").click()
    page.locator("#camera").get_by_role("button", name="Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video').currentTime > 0.5")
    page.locator("#camera").get_by_role("button", name="capture photo").click()
    expect(thumbnails(page)).to_have_count(1)
    send(page, "Who is it?")
    wait_until_answered(page, 1)
    expect(questions(page).locator("img")).to_have_count(1)


def test_an_answer_streams_and_stops(page, engine, monkeypatch):
    cancelled = engine.stats().cancelled
    set_sampling(page, longest=400)
    with slowly(engine, monkeypatch):
        send(page, "Hello")
        expect(answers(page).last).not_to_be_empty()
        begun = answers(page).last.inner_text()
        page.wait_for_function(
            "begun => document.querySelector('[data-testid=bot]').innerText.length > begun", arg=len(begun)
        )
        page.locator("#message").get_by_role("button", name="Stop").click()
        stopped = wait_until_answered(page, 1)
    assert stopped
    assert eventually(lambda: engine.stats().cancelled == cancelled + 1 and not engine.stats().busy)
    send(page, "Go on")
    wait_until_answered(page, 2)


def test_retry_undo_and_clear(page, png, greedy):
    attach(page, png)
    send(page, "It?")
    wait_until_answered(page, 1)
    set_sampling(page)
    page.get_by_role("button", name="Retry").click()
    expected = greedy("<image>\nIt?", images=[png])
    assert eventually(lambda: wait_until_answered(page, 1) == expected)
    page.get_by_role("button", name="Undo").click()
    expect(box(page)).to_have_value("It?")
    expect(thumbnails(page)).to_have_count(1)
    expect(questions(page)).to_have_count(0)
    page.locator("#message [data-testid=submit-button]").click()
    wait_until_answered(page, 1)
    page.locator("#actions").get_by_role("button", name="Clear").click()
    expect(questions(page)).to_have_count(0)
    page.reload()
    page.wait_for_load_state("networkidle")
    expect(questions(page)).to_have_count(0)


def test_clear_stops_the_answer(page, engine, monkeypatch):
    set_sampling(page, longest=400)
    with slowly(engine, monkeypatch):
        send(page, "Hello")
        expect(answers(page).last).not_to_be_empty()
        page.locator("#actions").get_by_role("button", name="Clear").click()
        expect(questions(page)).to_have_count(0)
        assert eventually(lambda: not engine.stats().busy)
        expect(questions(page)).to_have_count(0)
    send(page, "Again")
    wait_until_answered(page, 1)


def test_an_example_is_asked_with_its_picture(page):
    page.get_by_role("button", name="Describe this picture.").click()
    wait_until_answered(page, 1)
    expect(questions(page).locator("img")).to_have_count(1)


def test_a_reload_keeps_the_conversation(page, png, greedy):
    set_sampling(page)
    attach(page, png)
    send(page, "It?")
    first = wait_until_answered(page, 1)
    page.reload()
    expect(questions(page).locator("img")).to_have_count(1)
    assert wait_until_answered(page, 1) == first
    set_sampling(page)
    send(page, "Sure?")
    assert wait_until_answered(page, 2) == greedy("<image>\nIt?", first, "Sure?", images=[png])


def test_a_reload_frees_the_engine(page, engine, monkeypatch):
    set_sampling(page, longest=400)
    with slowly(engine, monkeypatch):
        send(page, "Hello")
        expect(answers(page).last).not_to_be_empty()
        cancelled = engine.stats().cancelled
        page.reload()
        assert eventually(lambda: engine.stats().cancelled == cancelled + 1 and not engine.stats().busy)
    send(page, "Again")
    wait_until_answered(page, 1)


def test_a_bad_file_is_told_and_the_message_comes_back(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    attach(page, bad)
    send(page, "What is it?")
    expect(page.get_by_test_id("toast-body")).to_contain_text("bad.png")
    expect(page.get_by_test_id("toast-body")).not_to_contain_text("/tmp")
    expect(box(page)).to_have_value("What is it?")
    expect(thumbnails(page)).to_have_count(1)
    expect(questions(page)).to_have_count(0)
    send(page, "Again")
    expect(box(page)).to_have_value("Again")


def test_a_bomb_is_told_and_not_decoded(page, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(9_000))
    attach(page, tmp_path / "bomb.png")
    send(page, "What is it?")
    expect(page.get_by_test_id("toast-body")).to_contain_text("9000 x 9000 pixels are more than 64000000")
    expect(box(page)).to_have_value("What is it?")


def test_a_conversation_beyond_the_context_is_told(page):
    send(page, "word " * 3000)
    expect(page.get_by_test_id("toast-body")).to_contain_text("shorten the conversation")
    expect(questions(page)).to_have_count(0)
    send(page, "Hello")
    wait_until_answered(page, 1)


def test_a_full_queue_is_told(page, engine, monkeypatch):
    def full(*args, **options):
        raise QueueFull(3)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", full)
        send(page, "Hello")
        expect(page.get_by_test_id("toast-body")).to_contain_text("the queue is full")
    expect(box(page)).to_have_value("Hello")


def test_the_page_fits_a_phone(page, png):
    page.set_viewport_size(PHONE)
    attach(page, png)
    send(page, "What is it? " * 8)
    wait_until_answered(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for control in (box(page), page.locator("#actions button").first, page.locator("#conversation")):
        place = control.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= PHONE["width"]
        assert place["y"] >= 0 and place["y"] + place["height"] <= PHONE["height"]
    assert page.locator("#conversation").bounding_box()["width"] >= 0.9 * PHONE["width"]


def test_a_download_is_a_clean_data_set_that_the_chat_loads(page, png, tmp_path):
    attach(page, png)
    send(page, "What is it?")
    wait_until_answered(page, 1)
    attach(page, png)
    send(page, "And this?")
    second = wait_until_answered(page, 2)
    with page.expect_download() as download:
        page.locator("#actions").get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.endswith(".zip")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path / "talk")
    conversation = tmp_path / "talk" / "conversation.json"
    assert not check.main(["--json", str(conversation), "--images", str(conversation.parent)])
    loaded = transcript.load(epath.Path(conversation))
    assert [text for _, text in loaded.turns][0::2] == ["<image>\nWhat is it?", "<image>\nAnd this?"]
    assert loaded.turns[3][1] == second
    assert [Path(file).read_bytes() for file in loaded.pictures] == [png.read_bytes()] * 2


def test_nothing_to_download_is_told(page):
    page.locator("#actions").get_by_role("button", name="Download").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("nothing to download")


def test_no_text_makes_the_browser_ask_another_server(page):
    """Markdown may hold pictures of other servers, whose owners would learn who reads it."""
    with another_server() as (address, asked):
        send(page, f"![track]({address}/pixel.png) <b>bold</b>")
        wait_until_answered(page, 1)
        expect(questions(page).locator("b")).to_have_count(1)
    assert asked == []


def test_the_server_fetches_no_picture_for_the_page(page, png, monkeypatch):
    """By itself Gradio does where a browser names a URL as the file that it uploaded."""
    monkeypatch.setattr(safehttpx, "is_public_ip", lambda address: True)
    with another_server() as (address, asked):
        attach(page, png)
        with naming(page, f"{address}/a.png"):
            send(page, "It?")
            expect(page.get_by_test_id("toast-body")).to_contain_text("have to be uploaded")
    assert asked == []
    expect(questions(page)).to_have_count(0)
    send(page, "It?")
    wait_until_answered(page, 1)


@pytest.mark.parametrize("said_before", [False, True])
def test_no_file_of_the_server_can_be_had(page, png, context, url, tmp_path, said_before):
    """Neither by naming it as an upload or as what was said before, nor by its address."""
    secret = tmp_path / "secret.png"
    picture(2).save(secret)
    attach(page, png)
    if said_before:
        send(page, "It?")
        wait_until_answered(page, 1)
    with naming(page, str(secret)):
        send(page, "Sure?")
        expect(page.get_by_test_id("toast-body")).to_be_visible()
    expect(answers(page)).to_have_count(int(said_before))
    assert context.request.get(f"{url}/gradio_api/file={secret}").status == 403
    assert not list(Path(get_upload_folder()).rglob("secret.png"))


@contextlib.contextmanager
def naming(page: Page, file: str) -> Iterator[None]:
    """The browser says that every picture it uploaded is this one."""

    def rename(route):
        route.continue_(post_data=re.sub('"path":"[^"]+"', f'"path":"{file}"', route.request.post_data))

    page.route("**/queue/join*", rename)
    yield
    page.unroute("**/queue/join*")


@contextlib.contextmanager
def another_server() -> Iterator[tuple[str, list[str]]]:
    """-> its URL, and the paths that it was asked for."""
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_key_opens_the_page(engine, browser, context):
    with serving(create_app(engine, "tiny", page=True, api_key="open sesame")) as url:
        page = context.new_page()
        page.goto(url)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
        page.goto(url)
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("open sesame")
        page.get_by_role("button", name="Login").click()
        expect(box(page)).to_be_visible()
        send(page, "Hello")
        wait_until_answered(page, 1)
