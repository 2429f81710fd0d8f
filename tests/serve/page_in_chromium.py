"""The web page in a real browser: `make test-browser` installs Debian's Chromium and runs this."""

import contextlib
import json
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
from axe_playwright_python.sync_playwright import Axe
from etils import epath
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from serving import bomb, data_url, eventually, noise_image, serving

from llava_jax.chat import __main__ as chat
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.data import check, transcript
from llava_jax.inference.engine import Engine, QueueFull
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request as Prompt
from llava_jax.inference.requests import Sampling
from llava_jax.serve.app import create_app
from llava_jax.serve.page import mount

FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # root has no sandbox
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
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
        return generator.answer([Prompt(turns, images)], Sampling(max_new_tokens=tokens))[0]

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


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def context(browser, request) -> Iterator[BrowserContext]:
    touch = request.param is PHONE
    allowed = ["clipboard-read", "clipboard-write", "camera"]
    context = browser.new_context(permissions=allowed, viewport=request.param, has_touch=touch)
    context.set_default_timeout(MILLISECONDS)
    yield context
    context.close()


@pytest.fixture
def watched(context) -> Iterator[Page]:
    """A page that is not open yet. It asks nobody but its server, and breaks neither its policy nor anything else."""
    page, faults = context.new_page(), []
    page.on("request", lambda request: None if _own(request.url) else faults.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    yield page
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []  # refusals, by status


def _own(address: str) -> bool:
    return address.startswith(("http://127.0.0.1:", "data:", "blob:")) and "/elsewhere" not in address


@pytest.fixture
def page(watched, url) -> Page:
    return opened(watched, url)


@pytest.fixture
def png(tmp_path) -> Path:
    noise_image(1).save(tmp_path / "my picture.png")
    return tmp_path / "my picture.png"


def opened(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#model")).to_have_text("tiny")
    return page


def box(page: Page) -> Locator:
    return page.get_by_label("Your question")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def questions(page: Page) -> Locator:
    return page.locator("#conversation .question")


def answers(page: Page) -> Locator:
    return page.locator("#conversation .answer")


def thumbnails(page: Page) -> Locator:
    return page.get_by_role("list", name="Images to send").locator(".picture")


def notice(page: Page) -> Locator:
    return page.locator("#notice p")


def choose(page: Page, name: str, *files: Path) -> None:
    with page.expect_file_chooser() as chooser:
        button(page, name).click()
    chooser.value.set_files(files)


def attach(page: Page, *files: Path) -> None:
    before = thumbnails(page).count()
    choose(page, "Add images", *files)
    expect(thumbnails(page)).to_have_count(before + len(files))


def send(page: Page, text: str) -> None:
    box(page).fill(text)
    button(page, "Send").click()


def wait_until_answered(page: Page, count: int) -> str:
    """-> the last answer's text as it is copied, once it is complete."""
    expect(answers(page)).to_have_count(count)
    expect(button(page, "Send")).to_be_visible()
    return copied(answers(page).last)


def copied(message: Locator) -> str:
    message.get_by_role("button", name="Copy", exact=True).click()
    expect(message.get_by_role("button", name="Copied")).to_be_visible()
    return message.page.evaluate("navigator.clipboard.readText()")


def set_sampling(page: Page, temperature: float = 0, longest: int | str = 12, system: str = "") -> None:
    button(page, "Settings").click()
    page.get_by_label("Temperature").fill(str(temperature))
    page.get_by_label("Longest answer").fill(str(longest))
    page.get_by_label("System prompt").fill(system)
    button(page, "Done").click()


def accessible(page: Page) -> None:
    """axe-core finds nothing serious."""
    found = Axe().run(page).response["violations"]
    serious = [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")]
    assert serious == []


def within_the_window(page: Page) -> None:
    """Nothing makes the page wider than the window."""
    wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
    wider = page.evaluate(f"document.documentElement.scrollWidth > innerWidth && {wide}.map((e) => e.outerHTML)")
    assert not wider


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
    """Drops or pastes a file onto an element."""
    page.evaluate(
        """([target, base64, name, kind]) => {
          const data = new DataTransfer();
          const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt());
          data.items.add(new File([bytes], name, {type: "image/png"}));
          const event = kind == "drop" ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
                                       : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
          document.querySelector(target).dispatchEvent(event);
        }""",
        [target, data_url(Image.open(file)).partition(",")[2], file.name, kind],
    )


# A server that answers as a test wants it to.

Reply = Callable[[dict[str, Any]], Any]


class Script:
    """`reply` makes of a request's body either a response or pieces of text. Pieces wait for events among them, and end
    with an exception among them."""

    def __init__(self, reply: Reply = lambda body: ["yes"]):
        self.reply, self.asked, self.health, self.key = reply, [], "ok", None
        self.models = ["tiny"]
        self.largest_body = 1 << 20

    def app(self) -> FastAPI:
        app = FastAPI()
        mount(app, self.largest_body)

        @app.get("/health")
        def health() -> Response:
            return JSONResponse({"status": self.health}, 200 if self.health == "ok" else 503)

        @app.get("/v1/models")
        def models(request: Request) -> Response:
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return refusal(401, "send the server's key")
            base, *adapters = self.models
            return JSONResponse({"data": [{"id": base}, *({"id": name, "parent": base} for name in adapters)]})

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                return refusal(401, "send the server's key")
            reply = self.reply(body)
            return reply if isinstance(reply, Response) else StreamingResponse(events(reply))

        return app


async def events(pieces: list[Any], finish_reason: str = "stop") -> AsyncIterator[str]:
    yield event(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    for piece in pieces:
        if isinstance(piece, threading.Event):
            while not piece.is_set():
                await anyio.sleep(0.01)
        elif isinstance(piece, Response):
            yield f"data: {piece.body.decode()}\n\n"
            return
        elif piece is None:
            return
        else:
            yield event(choices=[{"delta": {"content": piece}, "finish_reason": None}])
    yield event(choices=[{"delta": {}, "finish_reason": finish_reason}])
    yield event(choices=[], usage={"completion_tokens": len(pieces)})
    yield "data: [DONE]\n\n"


def event(**chunk: Any) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def refusal(status: int, message: str, headers: dict[str, str] | None = None, **more: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "param": None, "code": None} | more}, status, headers)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def scripted(watched, script) -> Iterator[Page]:
    with serving(script.app()) as url:
        yield opened(watched, url)


# Models.


def test_the_model_is_chosen_where_there_are_several(watched, script):
    script.models = ["tiny", "red", "an adapter with a name that is longer than a phone is wide, 'blue'"]
    with serving(script.app()) as url:
        watched.goto(url)
        choice = watched.get_by_label("Model", exact=True)
        expect(choice.locator("option")).to_have_text(script.models)
        expect(choice).to_have_value("tiny")
        for number, name in enumerate(script.models, 1):
            choice.select_option(name)
            expect(watched).to_have_title(f"{name} · LLaVA")
            send(watched, "Hello")
            wait_until_answered(watched, number)
        assert [body["model"] for body in script.asked] == script.models
        expect(watched.locator(".figures").first).to_have_text(re.compile("^tiny · 1 tokens"))
        assert choice.locator("optgroup").get_attribute("label") == "Adapters"
        script.models.insert(1, "loaded meanwhile")
        watched.evaluate("dispatchEvent(new Event('focus'))")
        expect(choice.locator("optgroup option")).to_have_text(script.models[1:])
        expect(choice).to_have_value(script.models[-1])
        within_the_window(watched)
        accessible(watched)
        choice.select_option("red")
        watched.reload()
        expect(choice).to_have_value("red")  # as it was chosen
        script.models.remove("red")
        script.reply = lambda body: refusal(404, f"model '{body['model']}' is not served here", code="model_not_found")
        send(watched, "Still there?")
        expect(notice(watched)).to_have_text("model 'red' is not served here")
        expect(choice).to_have_value("tiny")
        expect(box(watched)).to_have_value("Still there?")
        script.models = ["tiny", "blue"]
        watched.evaluate("dispatchEvent(new Event('focus'))")
        expect(choice.locator("option")).to_have_text(script.models)
        choice.select_option("blue")
        script.models = ["tiny"]
        watched.evaluate("dispatchEvent(new Event('focus'))")
        expect(notice(watched)).to_have_text("blue is not served any more: tiny answers now.")
        watched.reload()
        expect(watched.locator("#model")).to_have_text("tiny")
        expect(choice).to_be_hidden()


# Images.


def test_images_are_chosen_and_talked_about(page, png, greedy):
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
    within_the_window(page)


@pytest.mark.parametrize("target", ["main", "header", "#box"])
def test_an_image_is_dropped_anywhere(page, png, target):
    drop(page, target, png)
    expect(thumbnails(page)).to_have_count(1)
    drop(page, target, png)
    expect(thumbnails(page)).to_have_count(2)
    button(page, f"Remove {png.name}").first.click()
    expect(thumbnails(page)).to_have_count(1)


@pytest.mark.parametrize("target", ["#box", "body"])
def test_an_image_is_pasted(page, png, target):
    drop(page, target, png, kind="paste")
    expect(thumbnails(page)).to_have_count(1)


def test_a_photo_is_taken(page):
    button(page, "Take a photo").click()
    accessible(page)
    button(page, "Take photo").click()
    expect(thumbnails(page)).to_have_count(1)
    page.wait_for_function("document.querySelector('#camera video').srcObject === null")
    send(page, "Who is it?")
    wait_until_answered(page, 1)
    expect(questions(page).locator("img")).to_have_count(1)


def test_the_camera_is_let_go_and_its_absence_is_told(page):
    button(page, "Take a photo").click()
    expect(button(page, "Take photo")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(button(page, "Take a photo")).to_be_focused()
    page.wait_for_function("document.querySelector('#camera video').srcObject === null")
    page.evaluate("() => { navigator.mediaDevices.getUserMedia = async () => { throw new Error('refused') }; }")
    button(page, "Take a photo").click()
    expect(page.locator("#camera [role=alert]")).to_have_text("There is no camera: refused.")
    button(page, "Cancel").click()
    expect(thumbnails(page)).to_have_count(0)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.gif", "a.bmp", "a.tiff", "a.ppm"])
def test_the_server_gets_the_bytes_of_the_file(scripted, script, tmp_path, name):
    """Also of formats that the browser cannot draw, which are shown by name."""
    noise_image(3, (300, 200)).save(tmp_path / name)
    attach(scripted, tmp_path / name)
    drawn = name not in ("a.tiff", "a.ppm")
    expect(thumbnails(scripted).locator("img")).to_have_count(int(drawn))
    if not drawn:
        expect(thumbnails(scripted)).to_have_text(f"{name}: no preview")
    send(scripted, "")
    wait_until_answered(scripted, 1)
    (part,) = script.asked[0]["messages"][0]["content"]
    expected = scripted.evaluate(
        "async (bytes) => (await (new Response(new Uint8Array(bytes))).bytes()).toBase64()",
        list((tmp_path / name).read_bytes()),
    )
    assert part["image_url"]["url"].partition(";base64,")[2] == expected


def test_an_image_is_seen_in_full(page, png):
    attach(page, png)
    thumbnails(page).click()
    expect(page.get_by_role("dialog", name="Image")).to_be_visible()
    accessible(page)
    button(page, "Close").click()
    expect(thumbnails(page)).to_be_focused()


# Answers.


def test_an_answer_streams_and_stops(page, engine, monkeypatch):
    cancelled = engine.stats().cancelled
    set_sampling(page, longest=400)
    with slowly(engine, monkeypatch):
        send(page, "Hello")
        text = answers(page).locator(".body")
        expect(text).not_to_be_empty()
        begun = text.inner_text()
        expect(text).not_to_have_text(begun)
        page.keyboard.press("Escape")
        stopped = wait_until_answered(page, 1)
    assert len(stopped) >= len(begun)
    assert eventually(lambda: engine.stats().cancelled == cancelled + 1 and not engine.stats().busy)
    send(page, "Go on")
    wait_until_answered(page, 2)


def test_what_is_stopped_before_it_began_goes_back_to_the_box(scripted, script, png):
    script.reply = lambda body: [threading.Event()]
    attach(scripted, png)
    send(scripted, "Hello")
    expect(questions(scripted)).to_have_count(1)
    button(scripted, "Stop").click()
    expect(box(scripted)).to_have_value("Hello")
    expect(thumbnails(scripted)).to_have_count(1)
    expect(questions(scripted)).to_have_count(0)


def test_retry_undo_and_a_new_conversation(page, png, greedy):
    attach(page, png)
    send(page, "It?")
    wait_until_answered(page, 1)
    set_sampling(page)
    button(page, "Retry").click()
    expected = greedy("<image>\nIt?", images=[png])
    assert eventually(lambda: wait_until_answered(page, 1) == expected)
    button(page, "Undo").click()
    expect(box(page)).to_have_value("It?")
    expect(thumbnails(page)).to_have_count(1)
    expect(questions(page)).to_have_count(0)
    button(page, "Send").click()
    wait_until_answered(page, 1)
    button(page, "New conversation").click()
    expect(questions(page)).to_have_count(0)
    page.locator("#restore").click()
    expect(questions(page)).to_have_count(1)
    button(page, "New conversation").click()
    button(page, "Dismiss").click()
    page.reload()
    expect(page.get_by_role("heading", name="Ask about an image")).to_be_visible()
    expect(questions(page)).to_have_count(0)


def test_a_question_is_edited(page, png, greedy):
    set_sampling(page)
    attach(page, png)
    send(page, "What?")
    first = wait_until_answered(page, 1)
    send(page, "Sure?")
    wait_until_answered(page, 2)
    button(page, "Edit").first.click()
    expect(box(page)).to_have_value("What?")
    expect(page.locator("article.replaced")).to_have_count(4)
    accessible(page)
    button(page, "Cancel").click()
    expect(page.locator("article.replaced")).to_have_count(0)
    button(page, "Edit").last.click()
    send(page, "Why?")
    second = wait_until_answered(page, 2)
    assert second == greedy("<image>\nWhat?", first, "Why?", images=[png])
    expect(questions(page).last.locator(".text")).to_have_text("Why?")


def test_a_failed_edit_or_retry_loses_nothing(scripted, script):
    send(scripted, "One")
    wait_until_answered(scripted, 1)
    script.reply = lambda body: refusal(400, "not like this")
    button(scripted, "Retry").click()
    expect(notice(scripted)).to_have_text("not like this")
    expect(answers(scripted).locator(".body")).to_have_text("yes")
    button(scripted, "Edit").click()
    send(scripted, "Two")
    expect(notice(scripted)).to_have_text("not like this")
    expect(box(scripted)).to_have_value("Two")
    expect(questions(scripted).locator(".text")).to_have_text("One")
    expect(scripted.locator("article.replaced")).to_have_count(2)
    script.reply = lambda body: ["no"]
    button(scripted, "Send").click()
    expect(answers(scripted).locator(".body")).to_have_text("no")
    assert [m["content"] for m in script.asked[-1]["messages"]] == [[{"type": "text", "text": "Two"}]]


def test_sampling_and_system_prompt_are_sent_and_kept(scripted, script):
    set_sampling(scripted, 0.5, 7, "Be brief.")
    scripted.reload()
    expect(scripted.locator("#model")).to_have_text("tiny")
    send(scripted, "Hello")
    wait_until_answered(scripted, 1)
    assert (script.asked[0]["temperature"], script.asked[0]["max_completion_tokens"]) == (0.5, 7)
    assert script.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    set_sampling(scripted, longest="")
    send(scripted, "Hello")
    wait_until_answered(scripted, 2)
    assert "max_completion_tokens" not in script.asked[1]
    assert [message["role"] for message in script.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_an_answer_takes_the_room_that_there_is(page, engine):
    """More tokens than the context has room for may be wanted: then it ends with the context."""
    set_sampling(page, longest=engine.context)
    send(page, "Hello")
    assert wait_until_answered(page, 1)


def test_tokens_a_second_and_cut_answers_are_told(page):
    set_sampling(page)
    send(page, "Hello")
    wait_until_answered(page, 1)
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s · [\d.]+ tokens/s", page.locator(".figures").inner_text())
    expect(page.locator(".note")).to_contain_text("was cut")


# Formats of answers.


def set_format(page: Page, kind: str, field: str = "", text: str = "") -> None:
    page.get_by_role("button", name="Format of the answers").click()
    page.get_by_role("combobox", name="Format", exact=True).select_option(kind)
    if field:
        page.get_by_role("textbox", name=field).fill(text)
    button(page, "Done").click()


def test_json_is_asked_for_and_shown_with_a_line_for_each_value(scripted, script):
    goes_on = threading.Event()
    script.reply = lambda body: ['{"a": [1,2.50], "b":', goes_on, ' "x, [y]", "c": {}}']
    set_format(scripted, "JSON")
    send(scripted, "Hello")
    code = answers(scripted).locator("code")
    expect(code).to_have_text('{\n  "a": [\n    1,\n    2.50\n  ],\n  "b": ', use_inner_text=True)  # while it comes
    goes_on.set()
    assert wait_until_answered(scripted, 1) == '{"a": [1,2.50], "b": "x, [y]", "c": {}}'
    whole = '{\n  "a": [\n    1,\n    2.50\n  ],\n  "b": "x, [y]",\n  "c": {}\n}'
    expect(code).to_have_text(whole, use_inner_text=True)
    assert script.asked[0]["response_format"] == {"type": "json_object"}
    scripted.reload()
    expect(code).to_have_text(whole, use_inner_text=True)
    expect(scripted.locator("#shape")).to_have_text("JSON")
    accessible(scripted)
    within_the_window(scripted)
    set_format(scripted, "Text")
    script.reply = lambda body: ["yes"]
    send(scripted, "Hello")
    wait_until_answered(scripted, 2)
    assert script.asked[1].keys() & {"response_format", "structured_outputs"} == set()
    expect(answers(scripted).last.locator("code")).to_have_count(0)


def test_a_schema_or_choices_are_asked_for_and_faults_in_them_are_told(scripted, script):
    alert = scripted.locator("#format [role=alert]")
    for field, kind, text, told in (
        ("JSON schema", "JSON of a schema", "{", "The schema is no JSON"),
        ("JSON schema", "JSON of a schema", "[1]", "The schema has to be a JSON object."),
        ("Choices", "One of some choices", " \n", "Write at least one choice."),
    ):
        set_format(scripted, kind, field, text)
        expect(alert).to_contain_text(told)
        accessible(scripted)
        scripted.keyboard.press("Escape")
    expect(scripted.locator("#shape")).to_be_empty()
    set_format(scripted, "One of some choices", "Choices", "red\n green \n\nblue")
    send(scripted, "Which?")
    wait_until_answered(scripted, 1)
    assert script.asked[0]["structured_outputs"] == {"choice": ["red", "green", "blue"]}
    set_format(scripted, "JSON of a schema", "JSON schema", '{"type": "object"}')
    script.reply = lambda body: refusal(400, "response_format: too large", param="response_format")
    send(scripted, "Which?")
    expect(notice(scripted)).to_have_text("too large")
    assert script.asked[1]["response_format"]["json_schema"] == {"name": "answer", "schema": {"type": "object"}}


def test_the_server_follows_the_schema(page):
    set_sampling(page, longest=100)
    wanted = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    set_format(page, "JSON of a schema", "JSON schema", json.dumps(wanted | {"additionalProperties": False}))
    send(page, "Which?")
    assert json.loads(wait_until_answered(page, 1))["colour"] in ("red", "green")
    expect(answers(page).locator("code")).to_have_text(re.compile(r'^{\n  "colour": "(red|green)"\n}$'))


# Judgements.


def improve(page: Page, answer: Locator, text: str) -> None:
    answer.get_by_role("button", name="Better text").click()
    page.get_by_label("The answer as it should be").fill(text)
    button(page, "Save").click()


def test_judged_answers_are_kept_downloaded_and_loaded_again(scripted, script, png, tmp_path):
    texts = iter(["one", "two", "three"])
    script.reply = lambda body: [next(texts)]
    set_sampling(scripted, system="Be brief.")
    attach(scripted, png)
    send(scripted, "It?")
    wait_until_answered(scripted, 1)
    button(scripted, "Good answer").click()
    expect(button(scripted, "Good answer")).to_have_attribute("aria-pressed", "true")
    expect(button(scripted, "Good answer")).to_be_focused()
    button(scripted, "Bad answer").click()  # in place of the other
    expect(button(scripted, "Good answer")).to_have_attribute("aria-pressed", "false")
    button(scripted, "Retry").click()
    wait_until_answered(scripted, 1)
    button(scripted, "Good answer").click()
    send(scripted, "Sure?")
    wait_until_answered(scripted, 2)
    improve(scripted, answers(scripted).last, "better <b>")
    expect(answers(scripted).last.get_by_role("button", name="Better text")).to_be_focused()
    scripted.reload()
    expect(answers(scripted).last.locator(".body > p")).to_have_text("better <b>")
    answers(scripted).last.get_by_text("The model's answer").click()
    answers(scripted).first.get_by_text("Other answers that were judged: 1").click()
    expect(answers(scripted).first.locator("details")).to_contain_text("Bad:")
    accessible(scripted)
    within_the_window(scripted)

    conversation = download(scripted, tmp_path)
    first, second = json.loads(conversation.read_text())[0]["conversations"][1::2]
    assert first == {"from": "gpt", "value": "two", "rating": "good", "others": [{"value": "one", "rating": "bad"}]}
    assert second == {"from": "gpt", "value": "better <b>", "rejected": "three"}
    for name in ("conversation.json", "chosen.json"):
        assert not check.main(["--json", str(conversation.with_name(name)), "--images", str(conversation.parent)])
        turns = transcript.load(epath.Path(conversation.with_name(name))).turns
        assert [text for _, text in turns] == ["<image>\nIt?", "two", "Sure?", "better <b>"]
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "It?"}]}
    pairs = [json.loads(line) for line in conversation.with_name("preferences.jsonl").read_text().splitlines()]
    assert [pair["images"] for pair in pairs] == [["1.png"], ["1.png"]]
    assert pairs[0]["prompt"] == [system, question]
    assert [[pair[key][0]["content"][0]["text"] for key in ("chosen", "rejected")] for pair in pairs] == [
        ["two", "one"],
        ["better <b>", "three"],
    ]
    assert [message["role"] for message in pairs[1]["prompt"]] == ["system", "user", "assistant", "user"]

    button(scripted, "New conversation").click()
    choose(scripted, "Load a conversation", tmp_path / "talk.zip")
    expect(button(scripted, "Good answer").first).to_have_attribute("aria-pressed", "true")
    again = tmp_path / "again"
    again.mkdir()
    assert download(scripted, again).parent.joinpath("preferences.jsonl").read_text().splitlines() == [
        json.dumps(pair, separators=(",", ":")) for pair in pairs
    ]
    script.reply = lambda body: ["four"]
    send(scripted, "So?")
    wait_until_answered(scripted, 3)
    assert [m["content"] for m in script.asked[-1]["messages"] if m["role"] == "assistant"] == ["two", "better <b>"]


def test_a_better_text_is_taken_back_and_single_judgements_are_told(scripted, script, tmp_path):
    send(scripted, "It?")
    wait_until_answered(scripted, 1)
    improve(scripted, answers(scripted), "no")
    assert wait_until_answered(scripted, 1) == "no"
    button(scripted, "Better text").click()
    accessible(scripted)
    expect(scripted.get_by_label("The answer as it should be")).to_have_value("no")
    button(scripted, "Back to the model's answer").click()
    assert wait_until_answered(scripted, 1) == "yes"
    button(scripted, "Better text").click()
    scripted.get_by_label("The answer as it should be").fill("never")
    button(scripted, "Cancel").click()
    button(scripted, "Bad answer").click()
    files = download(scripted, tmp_path).parent
    assert [file.name for file in files.iterdir()] == ["conversation.json"]  # there is nothing to learn
    expect(notice(scripted)).to_contain_text("1 of the judged answers is in no preference pair: write a better text")
    turns = json.loads((files / "conversation.json").read_text())[0]["conversations"]
    assert turns[1] == {"from": "gpt", "value": "yes", "rating": "bad"}


def test_keys(scripted):
    box(scripted).fill("first")
    box(scripted).press("Shift+Enter")
    box(scripted).press_sequentially("second")
    expect(box(scripted)).to_have_value("first\nsecond")
    if scripted.viewport_size == PHONE:  # whose keyboard has no Shift+Enter
        box(scripted).press("Enter")
        expect(box(scripted)).to_have_value("first\nsecond\n")
        return
    box(scripted).press("Enter")
    expect(questions(scripted).locator(".text")).to_have_text("first\nsecond", use_inner_text=True)
    expect(button(scripted, "Send")).to_be_visible()
    expect(box(scripted)).to_be_focused()
    names = []
    while "Send" not in names:  # the order in which Tab visits
        scripted.keyboard.press("Tab")
        names.append(scripted.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent"))
        assert scripted.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert names == ["Add images", "Take a photo", "Format of the answers", "Send"]


# What the browser keeps.


def test_a_reload_keeps_the_conversation(page, png, greedy):
    set_sampling(page)
    attach(page, png)
    send(page, "It?")
    first = wait_until_answered(page, 1)
    page.reload()
    expect(questions(page).locator("img")).to_have_count(1)
    assert wait_until_answered(page, 1) == first
    expect(page.locator("#model")).to_have_text("tiny")
    send(page, "Sure?")
    assert wait_until_answered(page, 2) == greedy("<image>\nIt?", first, "Sure?", images=[png])


def test_a_browser_that_keeps_nothing_can_ask(watched, script):
    """As browsers are that block all cookies."""
    kinds = "'localStorage', 'sessionStorage', 'indexedDB', 'BroadcastChannel'"
    denied = "get() { throw new DOMException('denied', 'SecurityError'); }"
    watched.add_init_script(f"for (const kind of [{kinds}]) Object.defineProperty(window, kind, {{ {denied} }});")
    with serving(script.app()) as url:
        page = opened(watched, url)
        expect(notice(page)).to_contain_text("This browser keeps no conversation: denied")
        send(page, "one")
        assert wait_until_answered(page, 1) == "yes"
        button(page, "Light or dark").click()
        set_sampling(page)
        expect(notice(page)).to_contain_text("This browser does not keep the conversation: denied")


def test_a_reload_keeps_what_there_is_of_an_answer(page, engine, monkeypatch):
    set_sampling(page, longest=400)
    with slowly(engine, monkeypatch):
        send(page, "Hello")
        text = answers(page).locator(".body")
        expect(text).not_to_be_empty()
        begun = text.inner_text()
        cancelled = engine.stats().cancelled
        page.reload()
        assert eventually(lambda: engine.stats().cancelled == cancelled + 1 and not engine.stats().busy)
    expect(page.locator(".note")).to_have_text("The answer was interrupted.")
    assert text.inner_text().startswith(begun)
    expect(page.locator("#model")).to_have_text("tiny")
    send(page, "Again")
    wait_until_answered(page, 2)


# Browsers drop a transaction that has not finished when its page goes away.
UNFINISHED = """
IDBObjectStore.prototype.put = () => {};
Object.defineProperty(IDBTransaction.prototype, 'oncomplete', { set() {} });
"""


def test_a_reload_keeps_what_was_not_saved_yet(scripted, script, png):
    script.reply = lambda body: ["one"]
    attach(scripted, png)
    send(scripted, "It?")
    wait_until_answered(scripted, 1)
    scripted.reload()  # the image is kept by now
    wait_until_answered(scripted, 1)
    scripted.evaluate(UNFINISHED)
    button(scripted, "Bad answer").click()
    scripted.reload()
    expect(button(scripted, "Bad answer")).to_have_attribute("aria-pressed", "true")
    expect(questions(scripted).locator("img")).to_have_js_property("complete", True)
    button(scripted, "Good answer").click()  # what is saved later takes its place
    assert eventually(lambda: scripted.evaluate("localStorage.getItem('llava_jax.unsaved')") is None)
    scripted.reload()
    expect(button(scripted, "Good answer")).to_have_attribute("aria-pressed", "true")


def test_a_reload_before_the_answer_gives_the_question_back(scripted, script, png):
    script.reply = lambda body: [threading.Event()]
    attach(scripted, png)
    send(scripted, "Hello")
    assert eventually(lambda: script.asked)
    scripted.reload()
    expect(box(scripted)).to_have_value("Hello")
    expect(thumbnails(scripted)).to_have_count(1)
    expect(questions(scripted)).to_have_count(0)


def test_another_tab_shows_the_same_conversation(scripted, context):
    other = opened(context.new_page(), scripted.url)
    send(scripted, "Hello")
    wait_until_answered(scripted, 1)
    expect(answers(other).locator(".body")).to_have_text("yes")
    send(other, "And?")
    expect(answers(scripted)).to_have_count(2)


def test_the_server_keeps_nothing(page, png, url):
    """No cookie, and no image of the conversation at any address of the server."""
    attach(page, png)
    send(page, "It?")
    wait_until_answered(page, 1)
    assert page.context.cookies() == []
    assert page.locator("article img").get_attribute("src").startswith(f"blob:{url}/")


# What cannot be answered.


def test_a_bad_file_is_told_and_the_question_comes_back(page, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    attach(page, bad)
    send(page, "What is it?")
    expect(notice(page)).to_contain_text(re.compile("^bad.png: .*damaged"))
    expect(box(page)).to_have_value("What is it?")
    expect(thumbnails(page)).to_have_count(1)
    expect(questions(page)).to_have_count(0)
    accessible(page)
    button(page, "Remove bad.png").click()
    send(page, "Again")
    wait_until_answered(page, 1)


def test_a_bomb_is_told_and_not_decoded(page, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(9_000))
    attach(page, tmp_path / "bomb.png")
    send(page, "What is it?")
    expect(notice(page)).to_contain_text("9000 x 9000 pixels are more than 64000000")
    expect(box(page)).to_have_value("What is it?")


def test_a_conversation_beyond_the_context_is_told(page):
    send(page, "word " * 3000)
    expect(notice(page)).to_contain_text("shorten the conversation")
    expect(questions(page)).to_have_count(0)
    send(page, "Hello")
    wait_until_answered(page, 1)


def test_a_full_queue_is_told(page, engine, monkeypatch):
    def full(*args, **options):
        raise QueueFull(3)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", full)
        send(page, "Hello")
        expect(notice(page)).to_contain_text(re.compile(r"the queue is full.*\(Try again in 3 s\.\)"))
    expect(box(page)).to_have_value("Hello")


def test_files_that_are_no_images_or_too_large_are_told_before_they_are_sent(scripted, script, tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    choose(scripted, "Add images", tmp_path / "notes.txt")
    expect(notice(scripted)).to_have_text(re.compile("^notes.txt is no image"))
    (tmp_path / "large.png").write_bytes(b"x" * script.largest_body)
    choose(scripted, "Add images", tmp_path / "large.png")
    expect(notice(scripted)).to_have_text(re.compile(r"^large.png has 1.0 MB: the server takes 1.0 MB"))
    expect(thumbnails(scripted)).to_have_count(0)
    (tmp_path / "half.png").write_bytes(b"x" * (script.largest_body // 2))
    attach(scripted, *[tmp_path / "half.png"] * 2)
    send(scripted, "Two?")
    expect(notice(scripted)).to_have_text(re.compile(r"^With its images this is 1.3 MB"))
    expect(thumbnails(scripted)).to_have_count(2)
    assert script.asked == []


def test_warming_up_is_told_and_the_page_continues_by_itself(watched, script):
    script.health = "the server is warming up: try again later"
    with serving(script.app()) as url:
        watched.goto(url)
        expect(watched.locator("#state")).to_contain_text("Waiting: the server is warming up (this")
        accessible(watched)
        send(watched, "Hello")
        expect(box(watched)).to_have_value("Hello")
        script.health = "ok"
        expect(watched.locator("#model")).to_have_text("tiny")
        expect(watched.locator("#state")).to_be_hidden()
        button(watched, "Send").click()
        wait_until_answered(watched, 1)


def test_a_server_that_is_gone_is_told_and_found_again(scripted, script, context):
    context.set_offline(True)
    send(scripted, "Hello")
    expect(notice(scripted)).to_contain_text("The server cannot be reached")
    expect(scripted.locator("#state")).to_contain_text("Waiting")
    expect(box(scripted)).to_have_value("Hello")
    context.set_offline(False)
    expect(scripted.locator("#state")).to_be_hidden()
    button(scripted, "Send").click()
    wait_until_answered(scripted, 1)


def test_an_answer_that_breaks_off_is_kept_with_the_reason(scripted, script):
    script.reply = lambda body: ["Half of", None]
    send(scripted, "Hello")
    expect(scripted.locator(".note")).to_have_text("The connection broke before the answer was complete.")
    assert wait_until_answered(scripted, 1) == "Half of"
    script.reply = lambda body: ["Some", refusal(500, "the engine failed")]
    button(scripted, "Retry").click()
    expect(scripted.locator(".note")).to_have_text("the engine failed")
    script.reply = lambda body: [" ", "yes"]
    button(scripted, "Retry").click()
    expect(answers(scripted).locator(".body")).to_have_text("yes")
    expect(scripted.locator(".note")).to_have_count(0)


def test_a_key_is_asked_for_once(watched, script, context):
    script.key = "open-sesame"
    with serving(script.app()) as url:
        watched.goto(url)
        dialog = watched.get_by_role("dialog", name="This server needs a key")
        expect(dialog).to_be_visible()
        accessible(watched)
        watched.get_by_label("Key", exact=True).fill("wrong")
        button(watched, "Continue").click()
        expect(dialog.get_by_role("alert")).to_contain_text("does not know this key")
        watched.get_by_label("Key", exact=True).fill("pässwörd")  # which no header can carry
        button(watched, "Continue").click()
        expect(dialog.locator("#secret:invalid")).to_be_visible()
        watched.get_by_label("Key", exact=True).fill("open-sesame")
        button(watched, "Continue").click()
        expect(watched.locator("#model")).to_have_text("tiny")
        watched.reload()  # keeps it, in this tab
        expect(watched.locator("#model")).to_have_text("tiny")
        send(watched, "Hello")
        wait_until_answered(watched, 1)
        other = context.new_page()
        other.goto(url)
        other.get_by_label("Key", exact=True).fill("open-sesame")
        other.get_by_label("Remember").check()
        button(other, "Continue").click()
        expect(other.locator("#model")).to_have_text("tiny")
        opened(context.new_page(), url)  # remembers it
        script.key = "changed"
        send(watched, "Hello")
        expect(dialog).to_be_visible()
        watched.keyboard.press("Escape")
        expect(box(watched)).to_have_value("Hello")
        button(watched, "Send").click()
        watched.get_by_label("Key", exact=True).fill("changed")
        button(watched, "Continue").click()
        expect(watched.locator("#model")).to_have_text("tiny")
        button(watched, "Send").click()
        wait_until_answered(watched, 2)


def test_the_real_server_knows_the_key(engine, watched):
    with serving(create_app(engine, "tiny", page=True, api_key="open-sesame")) as url:
        watched.goto(url)
        watched.get_by_label("Key", exact=True).fill("open-sesame")
        button(watched, "Continue").click()
        expect(watched.locator("#model")).to_have_text("tiny")
        send(watched, "Hello")
        wait_until_answered(watched, 1)


# Conversations as files.


def download(page: Page, directory: Path) -> Path:
    """-> the unpacked conversation.json, beside its images."""
    with page.expect_download() as file:
        button(page, "Download the conversation").click()
    assert re.fullmatch(r"llava-\d{8}-\d{6}\.zip", file.value.suggested_filename)
    file.value.save_as(directory / "talk.zip")
    with zipfile.ZipFile(directory / "talk.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(directory / "talk")
    return directory / "talk" / "conversation.json"


def test_a_download_is_a_clean_data_set_that_the_chat_loads(page, png, tmp_path):
    set_sampling(page, system="Be brief.")
    attach(page, png)
    send(page, "What is it? ä 中 <image> <image>")  # more marks than images: text
    wait_until_answered(page, 1)
    attach(page, png)
    send(page, "")
    second = wait_until_answered(page, 2)
    conversation = download(page, tmp_path)
    assert not check.main(["--json", str(conversation), "--images", str(conversation.parent)])
    loaded = transcript.load(epath.Path(conversation))
    assert [text for _, text in loaded.turns][0::2] == ["<image>\nWhat is it? ä 中 < image> < image>", "<image>\n"]
    assert (loaded.turns[3][1], loaded.system) == (second, "Be brief.")
    assert [Path(file).read_bytes() for file in loaded.images] == [png.read_bytes()] * 2
    talk = chat.Conversation(None)
    talk.load(str(conversation))
    assert (talk.turns, talk.system, len(talk.images)) == (list(loaded.turns), "Be brief.", 2)


@pytest.mark.parametrize("way", ["zip", "drop", "deflated", "folder", "files"])
def test_a_download_is_loaded_again(scripted, script, png, tmp_path, way):
    attach(scripted, png)
    send(scripted, "It?")
    wait_until_answered(scripted, 1)
    conversation = download(scripted, tmp_path)
    files = [tmp_path / "talk.zip"]
    if way in ("deflated", "folder"):
        with zipfile.ZipFile(files[0], "w", zipfile.ZIP_DEFLATED) as archive:
            for file in conversation.parent.iterdir():
                archive.write(file, file.name if way == "deflated" else f"talk/{file.name}")
    elif way == "files":
        files = list(conversation.parent.iterdir())
    button(scripted, "New conversation").click()
    if way == "drop":
        drop_bytes(scripted, files[0])
    else:
        choose(scripted, "Load a conversation", *files)
    expect(questions(scripted).locator("img")).to_have_count(1)
    expect(questions(scripted).locator(".text")).to_have_text("It?")
    send(scripted, "Sure?")
    wait_until_answered(scripted, 2)
    first, again = script.asked[0]["messages"][0], script.asked[1]["messages"][0]
    assert again["content"][0]["image_url"]["url"] == first["content"][0]["image_url"]["url"]
    assert again == first


def drop_bytes(page: Page, file: Path) -> None:
    page.evaluate(
        """([bytes, name]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], name));
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [list(file.read_bytes()), file.name],
    )


def test_what_the_chat_saved_is_loaded(scripted, script, png, tmp_path):
    """Marks keep their places, and an empty system prompt, which means none, stays one."""
    turns = [("user", "before\n<image>\nafter <image>"), ("assistant", "yes"), ("user", "Sure?"), ("assistant", "no")]
    file = epath.Path(tmp_path / "saved.json")
    transcript.save(file, transcript.Transcript(turns, [png.name, png.name], ""))
    choose(scripted, "Load a conversation", Path(file), png)
    expect(questions(scripted)).to_have_count(2)
    send(scripted, "And?")
    wait_until_answered(scripted, 3)
    system, question, *_ = script.asked[0]["messages"]
    assert system == {"role": "system", "content": ""}
    assert [part.get("text", "image") for part in question["content"]] == ["before", "image", "after ", "image"]
    conversation = download(scripted, tmp_path)
    loaded = transcript.load(epath.Path(conversation))
    assert (list(loaded.turns[:4]), loaded.system) == (turns, "")
    assert [Path(name).name for name in loaded.images] == ["1.png", "1.png"]


def test_images_stand_where_the_text_has_their_marks(scripted, script, png):
    """Further images come before it, and a question that is edited keeps all places."""
    attach(scripted, png, png, png)
    send(scripted, "Is <image> like <image>?")
    wait_until_answered(scripted, 1)
    (question,) = script.asked[0]["messages"][-1:]
    assert [part.get("text", "image") for part in question["content"]] == [
        "image",
        "Is ",
        "image",
        " like ",
        "image",
        "?",
    ]
    button(scripted, "Edit").click()
    expect(box(scripted)).to_have_value("<image>\nIs <image> like <image>\n?")
    expect(thumbnails(scripted)).to_have_count(3)


def llava(*texts: str, **more: Any) -> str:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]
    turns[-1] |= more.pop("judged", {})
    return json.dumps([{"id": "a", "conversations": turns} | more])


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1, 2]", "holds 2 samples"),
        ("null", "is no conversation of LLaVA"),
        ('[{"conversations": [{"from": "human", "value": 3}]}]', "is no conversation of LLaVA"),
        ('[{"conversations": [{"from": "robot", "value": "a"}]}]', "is no conversation of LLaVA"),
        (llava("It?"), "have to take turns"),
        (llava("It?", "yes", image="1.png"), "has 0 <image> for 1 images"),
        (llava("<image>\nIt?", "yes", image=["1.png"]), "names 1.png, which is not here"),
        (llava("<image>\nIt?", "yes", image=[3]), "neither a name nor a list of names"),
        (llava("It?", "yes <image>", image="a.png"), "an answer has <image>"),
        (llava("It?", "yes", system=[1]), "`system` is no text"),
        (llava("It?", "yes", judged={"rating": 5}), "`rating` is neither good nor bad"),
        (llava("It?", "yes", judged={"rejected": ["no"]}), "`rejected` of an answer is no text"),
        (llava("It?", "yes", judged={"others": "no"}), "`others` of an answer is no list"),
        (llava("It?", "yes", judged={"others": [None]}), "`others` of an answer is no list"),
    ],
)
def test_files_that_are_no_conversation_are_told(scripted, tmp_path, png, text, told):
    (tmp_path / "conversation.json").write_text(text)
    shutil.copy(png, tmp_path / "a.png")
    send(scripted, "Hello")
    wait_until_answered(scripted, 1)
    choose(scripted, "Load a conversation", tmp_path / "conversation.json", tmp_path / "a.png")
    expect(notice(scripted)).to_contain_text(told)
    expect(questions(scripted)).to_have_count(1)


def hostile_zip(kind: str) -> bytes:
    """A ZIP file with something wrong in it."""
    import io

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversation.json", llava("It?", "yes"))
        if kind == "many":
            for i in range(10_001):
                archive.writestr(f"{i}", "")
    data = bytearray(file.getvalue())
    directory = data.rindex(b"PK\x01\x02")
    if kind == "cut":
        return bytes(data[:-30])
    if kind == "empty":
        return b""
    if kind == "bomb":  # it says that there is little in it
        bomb = io.BytesIO()
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("conversation.json", b" " * (1 << 28))
        data = bytearray(bomb.getvalue())
        directory = data.rindex(b"PK\x01\x02")
        data[directory + 24 : directory + 28] = (100).to_bytes(4, "little")
    if kind == "claim":
        data[directory + 24 : directory + 28] = (1 << 31).to_bytes(4, "little")
    if kind == "crc":
        data[directory + 16] ^= 1
    if kind == "encrypted":
        data[directory + 8] |= 1
    if kind == "method":
        data[directory + 10] = 99
    if kind == "offset":
        data[directory + 42 : directory + 46] = (1 << 31).to_bytes(4, "little")
    if kind == "names":
        data[directory + 28 : directory + 30] = b"\xff\xff"
    return bytes(data)


@pytest.mark.parametrize(
    "kind, told",
    [
        ("cut", "is no complete ZIP file"),
        ("empty", "is no complete ZIP file"),
        ("many", "too many files"),
        ("bomb", "conversation.json is damaged"),
        ("claim", "has more than 512 MiB in it"),
        ("crc", "conversation.json is damaged"),
        ("encrypted", "conversation.json is encrypted"),
        ("method", "conversation.json is encrypted, or compressed in a rare way"),
        ("offset", "conversation.json is damaged"),
        ("names", "has a damaged directory"),
    ],
)
def test_bad_zip_files_are_told(scripted, tmp_path, kind, told):
    (tmp_path / "talk.zip").write_bytes(hostile_zip(kind))
    choose(scripted, "Load a conversation", tmp_path / "talk.zip")
    expect(notice(scripted)).to_contain_text(told)


def test_nothing_to_download_is_told(page):
    button(page, "Download the conversation").click()
    expect(notice(page)).to_contain_text("nothing to download")


# Texts.


def rendered(page: Page, text: str) -> str:
    """The HTML of what Markdown becomes."""
    return page.evaluate(
        """async (text) => {
          const { element, render } = await import("/static/markdown.js");
          return element("div", {}, render(text)).outerHTML.slice(5, -6);
        }""",
        text,
    )


@pytest.fixture(scope="module")
def blank(browser, url) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(url)
    yield page
    page.close()


def a(address: str, text: str) -> str:
    return f'<a href="{address}" title="{address}" target="_blank" rel="noopener noreferrer">{text}</a>'


@pytest.mark.parametrize(
    "text, html",
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("# A\n###### B\n#c", "<h3>A</h3><h6>B</h6><p>#c</p>"),
        (
            "*a* **b** ***c*** _d_ ~~e~~",
            "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <del>e</del></p>",
        ),
        ("**a *b*** and *a **b***", "<p><strong>a <em>b</em></strong> and <em>a <strong>b</strong></em></p>"),
        ("snake_case_name, 2 * 3 * 4, **open, \\*a\\*", "<p>snake_case_name, 2 * 3 * 4, **open, *a*</p>"),
        ("`a*b*` ``c`d`` `e", "<p><code>a*b*</code> <code>c`d</code> `e</p>"),
        (
            "- a\n- b\n  - c\n    - d\n- e",
            "<ul><li>a</li><li>b<ul><li>c<ul><li>d</li></ul></li></ul></li><li>e</li></ul>",
        ),
        ("3. a\n\n   more\n4. b\n- c", '<ol start="3"><li>a<p>more</p></li><li>b</li></ol><ul><li>c</li></ul>'),
        ("1. a\n   - b\n2. c\n\nafter", '<ol start="1"><li>a<ul><li>b</li></ul></li><li>c</li></ol><p>after</p>'),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
        ("a\n---\n* * *", "<p>a</p><hr><hr>"),
        ("[a](http://b/c)", f"<p>{a('http://b/c', 'a')}</p>"),
        ("<https://d.e/f>.", f"<p>&lt;{a('https://d.e/f', 'https://d.e/f')}&gt;.</p>"),
        ("![cat](https://b/c.png)", f"<p>{a('https://b/c.png', 'cat')}</p>"),
        ("[a](javascript:alert(1)) [b](data:text/html,x)", "<p>[a](javascript:alert(1)) [b](data:text/html,x)</p>"),
        ("[a](JaVaScRiPt:x) [b](//e.org) [c](/v1)", "<p>[a](JaVaScRiPt:x) [b](//e.org) [c](/v1)</p>"),
        (
            "<script>x</script> <img src=x onerror=y>",
            "<p>&lt;script&gt;x&lt;/script&gt; &lt;img src=x onerror=y&gt;</p>",
        ),
        ("", ""),
        (" \n\n ", ""),
    ],
)
def test_markdown(blank, text, html):
    assert rendered(blank, text) == html


def test_code_and_tables_of_markdown(blank):
    copy = '<button type="button" class="copy-code">Copy code</button>'
    head = '<div class="code"><div class="code-head"><span>{}</span>' + copy + "</div>"
    code = head + '<pre tabindex="0"><code>{}</code></pre></div>'
    assert rendered(blank, "```py\na < b\n\n  c\n```\nd") == code.format("py", "a &lt; b\n\n  c") + "<p>d</p>"
    assert rendered(blank, "~~~\n```\n") == code.format("code", "```\n")
    assert rendered(blank, "- a\n  ```\n  b\n  ```") == f"<ul><li>a{code.format('code', 'b')}</li></ul>"
    row = "<tr><{0}>{1}</{0}><{0}>{2}</{0}></tr>"
    table = f"<thead>{row.format('th', 'a', '<em>b</em>')}</thead><tbody>{row.format('td', '1', '2')}</tbody>"
    assert rendered(blank, "| a | *b* |\n|---|:-:|\n| 1 | 2 |") == (
        f'<div class="table" tabindex="0"><table>{table}</table></div>'
    )


HOSTILE = ["*", "[", "`", "_a", "*a ", "![", "[](", ">", "-", "|", "|-", "#", "http://", "\\", "~~a", "[a](", "**a *b "]
HOSTILE += ["> ", "- ", "  " * 9 + "- a\n", "| ", "- b\n\n", "1. ", "a\n```\n", "a | b\n-|-\n"]


@pytest.mark.parametrize("unit", HOSTILE)
def test_markdown_takes_no_longer_than_the_text_is_long(blank, unit):
    """What took the square of it would not end; and nothing is nested so deeply that a browser breaks."""
    depth = blank.evaluate(
        """async (text) => {
          const { element, render } = await import("/static/markdown.js");
          const made = element("div", {}, render(text));
          const walker = document.createTreeWalker(made);
          let deepest = 0;
          for (let depth = 0; ; ) {
            if (walker.firstChild()) deepest = Math.max(deepest, ++depth);
            else { while (!walker.nextSibling()) { if (!walker.parentNode()) return deepest; depth--; } }
          }
        }""",
        unit * (300_000 // len(unit)),
    )
    assert 1 <= depth <= 60


def test_a_text_that_grows_is_rendered_as_a_whole_one(blank):
    """However it is cut, what was done before the last block is not done again."""
    text = "# A\n\none *two*\nthree\n\n- a\n- b\n\n  c\n\nlast\n\n```py\nx\n\ny\n```\n\n"
    text += "| a | b |\n|---|---|\n| 1 | 2 |\n\n> q\n\nend"
    html, kept = blank.evaluate(
        """async (text) => {
          const { Growing, element } = await import("/static/markdown.js");
          const made = element("div");
          const growing = new Growing(made);
          let first = null, kept = true;
          for (let end = 1; end <= text.length; end++) {
            growing.show(text.slice(0, end));
            if (end > 10) kept &&= (first ??= made.firstChild) === made.firstChild;
          }
          return [made.outerHTML.slice(5, -6), kept];
        }""",
        text,
    )
    assert kept
    assert html == rendered(blank, text)


def test_code_is_copied(scripted, script):
    script.reply = lambda body: ["Look:\n\n```py\nprint('<b>')\n```\n"]
    send(scripted, "Hello")
    button(scripted, "Copy code").click()
    expect(button(scripted, "Copied")).to_be_visible()
    assert scripted.evaluate("navigator.clipboard.readText()") == "print('<b>')"
    within_the_window(scripted)


def test_texts_run_nothing_and_make_the_browser_ask_nobody(scripted, script):
    """Whatever a question or an answer holds. `watched` sees each request, and what the policy had to refuse."""
    with another_server() as (address, asked):
        text = f"""<img src={address}/a onerror=document.title='run'> <script>document.title='run'</script>
            ![track]({address}/elsewhere.png) [click](javascript:document.title='run') <svg onload=alert(1)>
            <iframe src={address}/c></iframe> <link rel=stylesheet href={address}/d> <style>@import '{address}'</style>
            <a href={address}/f ping={address}/g>x</a> <base href={address}> <form action={address}><button>y</button>
            <meta http-equiv=refresh content=0;{address}>"""
        script.reply = lambda body: [*text[:400], text[400:]]
        send(scripted, text)
        assert wait_until_answered(scripted, 1) == text
        scripted.reload()
        expect(answers(scripted)).to_have_count(1)
    assert asked == []
    assert "run" not in scripted.title()
    expect(scripted.locator("article :is(script, iframe, link, style, base, meta, svg, form)")).to_have_count(0)
    expect(questions(scripted).locator(".text")).to_have_text(text)
    assert scripted.evaluate("document.querySelectorAll('article img').length") == 0


def test_the_policy_refuses_what_gets_past_the_code(scripted, context):
    """Were there a way for markup: no script of its own runs, nothing is loaded, and no form is sent."""
    page = context.new_page()
    page.goto(scripted.url)
    with another_server() as (address, asked):
        refused = page.evaluate(
            """async (address) => {
              const refused = [];
              addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
              try { document.body.innerHTML = "<b>x</b>"; } catch { refused.push("sink"); }
              const image = document.createElement("img");
              image.src = address;
              fetch(address).catch(() => 0);
              const form = document.createElement("form");
              form.action = address;
              document.body.append(form);
              form.submit();
              await new Promise((resolve) => setTimeout(resolve, 1000));
              return refused;
            }""",
            f"{address}/elsewhere",
        )
    assert asked == []
    assert {"sink", "img-src", "connect-src", "form-action"} <= set(refused)


def test_a_long_answer_is_shown_while_it_comes(scripted, script):
    """In pieces of a character, most of them in one block."""
    goes_on = threading.Event()
    text = "- word *word* `word`\n" * 1500
    script.reply = lambda body: [*text, goes_on, "\n\nend"]
    send(scripted, "Hello")
    expect(answers(scripted).locator("li")).to_have_count(1500)
    goes_on.set()
    assert wait_until_answered(scripted, 1) == text + "\n\nend"
    within_the_window(scripted)


@contextlib.contextmanager
def another_server() -> Iterator[tuple[str, list[str]]]:
    """-> its URL, and the paths that it was asked for."""
    asked = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


# How it looks.


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everybody_can_use_it(scripted, script, png, theme):
    scripted.emulate_media(color_scheme="dark" if theme == "light" else "light")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    before = scripted.evaluate(background)
    button(scripted, "Light or dark").click()
    assert scripted.evaluate(background) != before
    scripted.reload()
    expect(scripted.locator("#model")).to_have_text("tiny")
    assert scripted.evaluate(background) != before
    accessible(scripted)
    goes_on = threading.Event()
    markdown = "# A\n\n- *b*\n\n```\nc\n```\n\n> d [e](https://f.g)\n\n| h | i |\n|---|---|\n| j | k |"
    script.reply = lambda body: [markdown, goes_on, "."]
    attach(scripted, png)
    accessible(scripted)
    send(scripted, "Hello")
    expect(answers(scripted).locator("td")).to_have_count(2)
    accessible(scripted)
    expect(scripted.locator("#spoken")).to_be_empty()  # no screen reader is told of each piece
    goes_on.set()
    wait_until_answered(scripted, 1)
    expect(scripted.locator("#spoken")).to_contain_text("Answer: # A")
    accessible(scripted)
    button(scripted, "Settings").click()
    accessible(scripted)
    scripted.keyboard.press("Escape")
    expect(button(scripted, "Settings")).to_be_focused()
    within_the_window(scripted)


def test_the_parts_of_the_page_are_in_the_window(page, png):
    attach(page, png)
    send(page, "What is it? " * 8)
    wait_until_answered(page, 1)
    within_the_window(page)
    for control in (box(page), button(page, "Send"), button(page, "Settings"), page.locator("h1")):
        place = control.bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= page.viewport_size["width"]
        assert place["y"] >= 0 and place["y"] + place["height"] <= page.viewport_size["height"]
    width = page.locator("#conversation").bounding_box()["width"]
    assert width >= 0.9 * PHONE["width"]
    assert width <= 40 * 18  # a readable column, in ems


def test_a_page_behind_a_prefix(scripted, script, watched):
    """All addresses are relative, as for a proxy that serves it at https://host/llava/."""
    app = FastAPI()
    app.mount("/llava", script.app())
    with serving(app) as url:
        opened(watched, f"{url}/llava/")
        send(watched, "Hello")
        wait_until_answered(watched, 1)
