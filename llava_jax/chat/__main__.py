"""Talks with a checkpoint in the terminal, or answers one prompt."""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from etils import epath
from PIL import Image
from rich.console import Console

from llava_jax.chat import terminal
from llava_jax.cli import Parser, UserError, one_line, run, say
from llava_jax.data import transcript
from llava_jax.data.image_folder import add_allow_absolute
from llava_jax.data.images import load_image
from llava_jax.data.templates import choose_template
from llava_jax.data.transcript import marked, unmarked
from llava_jax.parallel import compilation_cache
from llava_jax.remote import is_remote

if TYPE_CHECKING:
    from llava_jax.inference.engine import Engine
    from llava_jax.inference.requests import Request, Sampling

EPILOG = """examples:
  python -m llava_jax.chat --checkpoint runs/finetune --image cat.jpg --prompt "What is this?"
  echo "What is this?" | python -m llava_jax.chat --checkpoint runs/finetune --image cat.jpg
  python -m llava_jax.chat --checkpoint runs/finetune

Of a pipe every line is a message, as if it were typed."""
HELP = """/image FILE   adds an image to your next message: before its text, or where the text has an <image>
/system TEXT  sets the system prompt; without TEXT it is the template's own
/save FILE    writes the conversation as LLaVA JSON, and where its images are: relative to FILE, if they are below
/load FILE    goes on with a conversation that was saved; --allow-absolute-images takes images from anywhere
/reset        forgets the conversation, but not the system prompt
/help         shows this
/quit         ends, as Ctrl-D does; Ctrl-C stops an answer
Three quotes (\"\"\") begin and end a message of several lines."""
LONGEST_ANSWER = 512  # tokens, unless the context has less room or --max-new-tokens says otherwise


class Attached(NamedTuple):
    """A picture, and the file that it came from."""

    file: str
    image: Image.Image


class Conversation:
    """The turns so far and their pictures."""

    def __init__(self, system: str | None, allow_absolute: bool = False):
        self.system, self.allow_absolute = system, allow_absolute
        self.reset()

    def reset(self) -> None:
        self.turns: list[tuple[str, str]] = []
        self.pictures: list[Attached] = []
        self.waiting: list[Attached] = []  # pictures for the next message

    def attach(self, file: str) -> Image.Image:
        self.waiting.append(_attached(file))
        return self.waiting[-1].image

    def ask(self, text: str) -> "Request":
        """The request of the next message."""
        from llava_jax.inference.requests import Request

        system = [] if self.system is None else [("system", self.system)]
        images = [picture.image for picture in [*self.pictures, *self.waiting]]
        return Request([*system, *self.turns, ("user", marked(text, len(self.waiting)))], images)

    def keep(self, text: str, answer: str) -> None:
        """The message was answered: both belong to the conversation."""
        self.turns += [("user", marked(text, len(self.waiting))), ("assistant", unmarked(answer))]
        self.pictures += self.waiting
        self.waiting = []

    def save(self, file: str) -> None:
        folder = f"{_path(file).parent}/"
        names = [picture.file.removeprefix(folder) for picture in self.pictures]
        transcript.save(_path(file), transcript.Transcript(self.turns, names, self.system))

    def load(self, file: str) -> None:
        loaded = transcript.load(_path(file), self.allow_absolute)
        pictures = [_attached(name) for name in loaded.images]
        self.turns, self.pictures, self.waiting = list(loaded.turns), pictures, []
        self.system = loaded.system


@dataclasses.dataclass(frozen=True)
class Answerer:
    """An engine and how it is asked."""

    engine: "Engine"
    sampling: "Sampling"
    max_new_tokens: int | None

    def stream(self, request: "Request") -> Iterator[str]:
        """The answer in pieces. Raises UserError where the context has no room for it."""
        prompt = self.engine.prepare(request)
        longest = self.max_new_tokens or max(1, min(LONGEST_ANSWER, self.engine.room(prompt)))
        answer = self.engine.submit(prompt, dataclasses.replace(self.sampling, max_new_tokens=longest))
        try:
            for piece in answer:
                yield piece.text
        finally:
            answer.cancel()


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    from llava_jax.checkpoint.reading import (
        open_checkpoint,  # only now: JAX takes seconds, and a typing error need not wait
    )
    from llava_jax.inference.engine import Engine
    from llava_jax.inference.requests import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if args.max_new_tokens is not None:
        sampling = dataclasses.replace(sampling, max_new_tokens=args.max_new_tokens)  # which checks it
    conversation = Conversation(args.system, args.allow_absolute_images)
    for file in args.image:
        conversation.attach(file)
    compilation_cache.use(compilation_cache.usual())
    checkpoint = open_checkpoint(args.checkpoint)
    template = choose_template(args.template, checkpoint.template)
    with contextlib.closing(Engine.from_checkpoint(checkpoint, template, slots=1)) as engine:
        answerer = Answerer(engine, sampling, args.max_new_tokens)
        if args.prompt is None:
            return talk(answerer, conversation)
        say("".join(answerer.stream(conversation.ask(args.prompt))))
        return 0


def talk(answerer: Answerer, conversation: Conversation) -> int:
    """Reads messages and commands until the input ends. A mistake is told, and the session goes on.

    -> the exit status, 1 where nobody but a program sent a message that was a mistake."""
    mistakes = 0
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
        for picture in conversation.waiting:
            _show(picture.image)
    with terminal.history():
        for message in terminal.messages():
            try:
                if message == "/quit":
                    break
                if message.startswith("/"):
                    _obey(message, conversation)
                elif message:
                    _reply(answerer, conversation, message)
            except UserError as error:
                mistakes += 1
                say(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
    return 1 if mistakes and not sys.stdin.isatty() else 0


def _obey(message: str, conversation: Conversation) -> None:
    """Carries out a command."""
    command, _, argument = message.partition(" ")
    argument = argument.strip()
    match command:
        case "/help":
            print(HELP, file=sys.stderr)
        case "/reset":
            conversation.reset()
        case "/system":
            conversation.system = argument or None
        case "/image" | "/save" | "/load" if not argument:
            raise UserError(f"{command} needs a file: {command} FILE")
        case "/image":
            _show(conversation.attach(_unquoted(argument)))
        case "/save":
            conversation.save(_unquoted(argument))
        case "/load":
            conversation.load(_unquoted(argument))
            _recall(conversation)
        case _:
            raise UserError(f"there is no command {command}; /help lists them")


def _reply(answerer: Answerer, conversation: Conversation, text: str) -> None:
    """Prints the answer as it comes; Ctrl-C keeps what there is of it."""
    pieces = []
    try:
        for piece in answerer.stream(conversation.ask(text)):
            pieces.append(piece)
            say(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print(flush=True)
    conversation.keep(text, "".join(pieces))


def _recall(conversation: Conversation) -> None:
    """Shows on a terminal what was said before."""
    if sys.stdin.isatty():
        for picture in conversation.pictures:
            _show(picture.image)
        for role, text in conversation.turns:
            say(f"> {unmarked(text).strip()}" if role == "user" else text, file=sys.stderr)


def _show(image: Image.Image) -> None:
    if sys.stdin.isatty():
        terminal.show(image, Console(stderr=True))


def _attached(file: str) -> Attached:
    path = _path(file)
    return Attached(str(path), load_image(path))


def _unquoted(file: str) -> str:
    """A file as it was typed, spaces and all, or as a shell would read it: terminals quote what is dropped on them."""
    try:
        words = shlex.split(file)
    except ValueError:
        return file
    return words[0] if len(words) == 1 else file


def _path(file: str) -> epath.Path:
    """Where a file is, from wherever that is said."""
    path = epath.Path(file).expanduser()
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.chat", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="D", help="an import, a workdir or a step of it")
    add("--image", action="append", default=[], metavar="F", help="for the first message; repeatable")
    add_allow_absolute(parser)
    add("--prompt", metavar="TEXT", help="answer this alone, on standard output")
    add("--system", metavar="TEXT", help="system prompt instead of the template's")
    add("--template", metavar="NAME", help="instead of the checkpoint's")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest with this probability")
    add("--seed", type=int, default=0, help="of sampling")
    add("--max-new-tokens", type=int, metavar="N", help=f"{LONGEST_ANSWER} or what the context has room for")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
