"""The web page: pictures come by drop, paste, camera or file, and are talked about."""

import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from fastapi import FastAPI
from gradio import processing_utils
from gradio.utils import get_upload_folder

from llava_jax.serve import messages
from llava_jax.serve.engine import Engine
from llava_jax.serve.messages import Message
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.page_examples import draw_examples
from llava_jax.serve.pictures import Reader
from llava_jax.serve.talk import READY, Talk

KEPT_SECONDS = 86400  # of uploaded pictures
LONGEST_TEXT = 1_000_000  # characters that stay text where they are pasted

# The browser asks nobody but this server, whatever an answer holds; a picture may be dropped anywhere.
HEAD = """
<meta http-equiv="Content-Security-Policy"
      content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'">
<script>
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  if (event.target.closest("#message")) return;
  event.preventDefault();
  const input = document.querySelector("#message input[type=file]");
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});
</script>
<style>
.gradio-container { padding: 0 !important; }
.main.app { padding: 8px !important; }
#actions button { flex-grow: 0; }
#conversation .user img { max-height: 240px; object-fit: contain; }
#conversation [aria-label="Share"] { display: none; } /* which would upload to Hugging Face */
</style>
"""
CLICK_ARCHIVE = "() => setTimeout(() => document.querySelector('#archive').click(), 100)"


def mount(app: FastAPI, engine: Engine, metrics: Metrics, reader: Reader, model: str, **options: Any) -> FastAPI:
    """Serves the page at `/` of `app`, whose own routes come first.

    Args:
      app: what it is added to.
      engine: what answers.
      metrics: what is told of the answers.
      reader: of pictures.
      model: the name that is shown.
      options: of Gradio: `auth` (a function of user and password), `max_file_size` (bytes).
    """
    processing_utils.async_ssrf_protected_download = _refuse_url
    page = build(engine, metrics, reader, model)
    page.has_launched = True  # else Gradio takes any file of this machine that a client names as its upload
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        head=HEAD,
        footer_links=[],
        run_history=False,
        **options,
    )


async def _refuse_url(url: str, cache_dir: str) -> NoReturn:
    """In place of what Gradio does where a client names a URL as an uploaded file: the server would fetch it, whatever
    its size."""
    raise gr.Error("Pictures have to be uploaded, not named by a URL.", print_exception=False)


def build(engine: Engine, metrics: Metrics, reader: Reader, model: str) -> gr.Blocks:
    """The page."""
    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    examples = draw_examples(Path(tempfile.mkdtemp(dir=uploads)))
    with gr.Blocks(title=model, analytics_enabled=False, fill_height=True, delete_cache=(3600, KEPT_SECONDS)) as page:
        kept = gr.BrowserState([], storage_key="llava_jax")  # the conversation, for when the page is loaded again
        chatbot = gr.Chatbot(
            label=model,
            elem_id="conversation",
            scale=1,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            placeholder="Drop, paste or take a picture, and ask about it.",
            examples=copy.deepcopy(examples),  # Gradio writes into them
        )
        box = gr.MultimodalTextbox(
            elem_id="message",
            file_types=["image"],
            file_count="multiple",
            show_label=False,
            placeholder="Ask something",
            max_plain_text_length=LONGEST_TEXT,
            autofocus=True,
            **READY,
        )
        with gr.Row(elem_id="actions"):
            clear = gr.Button("Clear", size="sm", min_width=80)
            download = gr.Button("Download", size="sm", min_width=80)
            archive = gr.DownloadButton(visible="hidden", elem_id="archive")
        with gr.Accordion("Camera", open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", format="png", show_label=False, elem_id="camera")
        with gr.Accordion("Sampling", open=False):
            temperature = gr.Slider(0, 2, 0.2, step=0.05, label="Temperature: 0 always takes the likeliest word")
            top_p = gr.Slider(
                0.05, 1, 0.7, step=0.05, label="Top-p: among the likeliest with this probability together"
            )
            longest = gr.Slider(1, engine.context, min(512, engine.context), step=1, label="Longest answer, in tokens")

        talk = Talk(engine, metrics, reader, examples)
        sampling, shown = [temperature, top_p, longest], [box, chatbot]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        parallel = private | {"concurrency_limit": None}  # the engine has a queue of its own
        asking = [
            box.submit(talk.ask, [box, chatbot, *sampling], shown, **parallel),
            chatbot.retry(talk.retry, [chatbot, *sampling], shown, **parallel),
            chatbot.example_select(talk.example, sampling, shown, **parallel),
        ]
        for event in asking:
            event.then(lambda: gr.MultimodalTextbox(**READY), None, box, **private).then(keep, chatbot, kept, **private)
        box.stop(None, cancels=asking, **private)
        chatbot.undo(undo, chatbot, shown, cancels=asking, **private).then(keep, chatbot, kept, **private)
        gr.on([chatbot.clear, clear.click], lambda: ([], []), None, [chatbot, kept], cancels=asking, **private)
        download.click(pack, chatbot, archive, **private).success(None, js=CLICK_ARCHIVE)
        camera.input(attach, [box, camera], [box, camera], **private)
        page.load(restore, kept, chatbot, **private)
    return page


def keep(history: list[Message]) -> list[tuple[str, str, list[str]]]:
    """What the browser keeps of a conversation."""
    return [(m["role"], messages.text_of(m), messages.files_of(m)) for m in messages.answered(history)]


def restore(kept: Any) -> list[Message]:
    """What the browser kept, unless a picture of it is gone or was never uploaded: anybody may write there."""
    try:
        if all(_is_upload(file) for _, _, files in kept for file in files):
            return [messages.question(t, f) if role == "user" else messages.answer(t) for role, t, f in kept]
    except (AttributeError, TypeError, ValueError):
        pass
    return []


def undo(history: list[Message], event: gr.UndoData) -> tuple[dict[str, Any], list[Message]]:
    """Takes the last question back into the text box."""
    asked = history[event.index]
    return {"text": messages.text_of(asked), "files": messages.files_of(asked)}, history[: event.index]


def attach(message: dict[str, Any], photo: str | None) -> tuple[dict[str, Any], None]:
    """Moves a photo into the message."""
    return message | {"files": [*message["files"], *([photo] if photo else [])]}, None


def pack(history: list[Message]) -> Iterator[str]:
    """The conversation as a file to download."""
    conversation = messages.answered(history)
    if not conversation:
        raise gr.Error("There is nothing to download yet.", print_exception=False)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / time.strftime("llava-%Y%m%d-%H%M%S.zip")
        messages.write_zip(conversation, file)
        yield str(file)  # Gradio copies it before it goes on


def _is_upload(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_file() and path.is_relative_to(Path(get_upload_folder()).resolve())
