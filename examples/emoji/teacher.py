"""Conversations about emoji, by `datagen` and a server whose replies are scripted: rules in place of a large model.

The server speaks OpenAI's API, as those of large models do, and reads what `datagen` sends: the names, kinds and
keywords of emoji, never their images. Its replies depend on that alone. Ledger, parsing, checks, near-duplicates and
the report are datagen's own; with --base-url and --model another server writes the conversations.
"""

import contextlib
import json
import random
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from examples.emoji import data
from examples.emoji.data import ARTICLES, ASK_KIND, ASK_NAME, ASK_WHETHER, Emoji, another, capitalized
from llava_jax.cli import Parser, UserError, run, say
from llava_jax.datagen.__main__ import main as datagen

NAMES = (
    ASK_NAME,
    "What does the image show?",
    "What is this emoji called?",
    "Can you name it?",
    "Which emoji is this?",
)
KINDS = (ASK_KIND, "Which kind is it of?", "What sort of thing do you see?", "To which group does it belong?")
WHETHER = (ASK_WHETHER, "Do you see {name}?", "Does the image show {name}?", "Would you call it {name}?")
OF_KIND = ("Is it {kind}?", "Do you see {kind}?", "Does the image show {kind}?", "Would you say it is {kind}?")
KEYWORDS = ("Which words come to mind?", "What do people think of?", "Which words would you look for it with?",
            "What else is it about?")  # fmt: skip
DESCRIBE = ("Describe the image.", "Tell me about the image.", "What can you say about it?")
MODEL = "scripted"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m examples.emoji.teacher", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, metavar="D", help="of examples.emoji.data; gets made/")
    parser.add_argument("--base-url", metavar="URL", help="another server that writes the conversations")
    parser.add_argument("--model", default=MODEL, metavar="M", help="its name on that server")
    args = parser.parse_args(argv)
    emoji = data.read(args.root)
    with contextlib.nullcontext(args.base_url) if args.base_url else serving(emoji) as url:
        contexts, images, made = (f"{args.root}/{name}" for name in ("data/contexts.jsonl", "images", "made"))
        line = ["conversation", "--captions", contexts, "--images", images, "--output", made, "--language", "any"]
        line += ["--base-url", url, "--model", args.model]
        say(f"$ python -m llava_jax.datagen {shlex.join(line)}")
        return datagen(line) or 0


# ------------------------------------------------------------------------------------------------------- the script


def conversation(context: str, emoji: list[Emoji]) -> str:
    """The questions and answers about what is known of an image, in the form that datagen asks for."""
    found = re.search(r"^The emoji is called: (.+)\.$", context, re.MULTILINE)
    one = found and next((one for one in emoji if one.name == found[1]), None)
    if one is None:
        raise UserError(f"no emoji is called so: {context[:80]!r}")
    order = random.Random(context)
    # Few: once a name is given, no image is needed for further answers.
    writers = dict.fromkeys(order.sample(list(WRITERS), 3, counts=list(WRITERS.values())))
    turns = [pair for write in writers for pair in write(one, emoji, order)]
    blocks = [f"{head}:\n{text}" for pair in turns for head, text in zip(("Question", "Answer"), pair, strict=True)]
    return "\n===\n".join(blocks)


Turns = Iterator[tuple[str, str]]


def about_name(one: Emoji, emoji: list[Emoji], order: random.Random) -> Turns:
    yield order.choice(NAMES), capitalized(one.name)


def about_kind(one: Emoji, emoji: list[Emoji], order: random.Random) -> Turns:
    yield order.choice(KINDS), capitalized(one.kind)


def about_names(one: Emoji, emoji: list[Emoji], order: random.Random) -> Turns:
    """Twice, with one right name of two on average, so that neither answer is likelier."""
    for _ in range(2):
        asked = one if order.random() < 0.5 else another(one, emoji, order)
        yield order.choice(WHETHER).format(name=asked.name), "Yes." if asked == one else "No."


def about_kinds(one: Emoji, emoji: list[Emoji], order: random.Random) -> Turns:
    others = sorted({other.kind for other in emoji} - {one.kind})
    kind = one.kind if order.random() < 0.5 or not others else order.choice(others)
    yield order.choice(OF_KIND).format(kind=f"{ARTICLES[kind]} {kind}"), "Yes." if kind == one.kind else "No."


def about_keywords(one: Emoji, emoji: list[Emoji], order: random.Random) -> Turns:
    if one.keywords:
        yield order.choice(KEYWORDS), capitalized(", ".join(one.keywords))


def description(one: Emoji, emoji: list[Emoji], order: random.Random) -> Turns:
    words = f" It makes people think of {', '.join(one.keywords)}." if one.keywords else ""
    yield order.choice(DESCRIBE), f"This emoji is called {one.name}. It is {ARTICLES[one.kind]} {one.kind}.{words}"


WRITERS: dict[Callable[[Emoji, list[Emoji], random.Random], Turns], int] = {  # and how often
    about_name: 3,
    about_kind: 2,
    about_names: 2,
    about_kinds: 1,
    about_keywords: 1,
    description: 1,
}


# ------------------------------------------------------------------------------------------------------- the server


@contextlib.contextmanager
def serving(emoji: list[Emoji]) -> Iterator[str]:
    """The address of a server with these replies, on this machine, as long as the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = reply(body, emoji) if self.path == "/v1/chat/completions" else (404, {})
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: Any) -> None:
            """Nothing: the ledger has every request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(body: dict[str, Any], emoji: list[Emoji]) -> tuple[int, dict[str, Any]]:
    """Status and content of the reply to a request for a chat completion. Tokens are counted as words."""
    try:
        text = conversation(body["messages"][-1]["content"], emoji)
    except UserError as error:
        return 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
    words = [len(message["content"].split()) for message in body["messages"]]
    usage = {"prompt_tokens": sum(words), "completion_tokens": len(text.split())}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}


if __name__ == "__main__":
    run(main)
