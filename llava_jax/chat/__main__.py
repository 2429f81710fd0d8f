"""Talks with a checkpoint in the terminal, or answers one prompt."""

import argparse
import contextlib
import dataclasses
import functools
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console

from llava_jax.chat import terminal
from llava_jax.chat.conversation import Conversation
from llava_jax.cli import Parser, UserError, one_line, run, say
from llava_jax.data.image_folder import add_allow_absolute
from llava_jax.data.transcript import unmarked
from llava_jax.inference import options
from llava_jax.inference.requests import Request, Sampling

if TYPE_CHECKING:
    from llava_jax.inference.engine import Engine

EPILOG = """examples:
  python -m llava_jax.chat --checkpoint runs/finetune --image cat.jpg --prompt "What is this?"
  echo "What is this?" | python -m llava_jax.chat --checkpoint runs/finetune --image cat.jpg
  python -m llava_jax.chat --checkpoint runs/finetune

Each line of a pipe is a message, as if it were typed."""
HELP = """/image FILE   adds an image to your next message: before its text, or where the text has an <image>
/system TEXT  sets the system prompt; without TEXT, the template's own
/save FILE    saves the conversation as LLaVA JSON; images below the folder of FILE are named relative to it
/load FILE    continues a saved conversation; with --allow-absolute-images its images may be anywhere
/adapter NAME answers with this adapter of --adapter; without NAME, with the checkpoint alone
/reset        forgets the conversation, but not the system prompt
/help         shows this
/quit         quits, like Ctrl-D; Ctrl-C stops an answer
Three quotes (\"\"\") begin and end a message of several lines."""
MAX_ANSWER = 512  # tokens, unless the context has less room or --max-new-tokens says otherwise


@dataclasses.dataclass
class Answerer:
    """An engine, the sampling of its answers, and the adapter that gives them; "" for none."""

    engine: "Engine"
    sampling: Sampling
    max_new_tokens: int | None
    adapter: str = ""

    def stream(self, request: Request) -> Iterator[str]:
        """The text of the answer as it is generated. Raises `UserError` where the context has no room for it."""
        prompt = self.engine.prepare(request, self.engine.adapters.get(self.adapter) if self.adapter else None)
        longest = self.max_new_tokens or max(1, min(MAX_ANSWER, self.engine.room(prompt)))
        answer = self.engine.submit(prompt, dataclasses.replace(self.sampling, max_new_tokens=longest))
        try:
            for piece in answer:
                yield piece.text
        finally:
            answer.cancel()


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if args.max_new_tokens is not None:
        sampling = dataclasses.replace(sampling, max_new_tokens=args.max_new_tokens)  # which checks it
    conversation = Conversation(args.system, args.allow_absolute_images)
    for file in args.image:
        conversation.attach(file)
    from llava_jax.convert.served_adapter import read_for  # imports JAX

    read = functools.partial(read_for, template=args.template)
    with contextlib.closing(options.open_engine(args, read, slots=1)) as engine:
        answerer = Answerer(engine, sampling, args.max_new_tokens, args.adapter[0][0] if args.adapter else "")
        if args.prompt is None:
            return talk(answerer, conversation)
        say("".join(answerer.stream(conversation.request(args.prompt))))
        return 0


def talk(answerer: Answerer, conversation: Conversation) -> int:
    """Reads messages and commands until the input ends. A mistake is reported, and the session continues.

    Returns the exit status: 1 where the input was not a terminal and held a mistake.
    """
    mistakes = 0
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
        for attached in conversation.waiting:
            _show(attached.image)
    with terminal.history():
        for message in terminal.messages():
            try:
                if message == "/quit":
                    break
                if message.startswith("/"):
                    _run_command(message, conversation, answerer)
                elif message:
                    _reply(answerer, conversation, message)
            except UserError as error:
                mistakes += 1
                say(f"error: {one_line(str(error))}", file=sys.stderr, flush=True)
    return 1 if mistakes and not sys.stdin.isatty() else 0


def _run_command(message: str, conversation: Conversation, answerer: Answerer) -> None:
    command, _, argument = message.partition(" ")
    argument = argument.strip()
    match command:
        case "/help":
            print(HELP, file=sys.stderr)
        case "/reset":
            conversation.reset()
        case "/adapter":
            if argument:
                answerer.engine.adapters.get(argument)  # raises `UserError` for an unknown one
            answerer.adapter = argument
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
            _show_conversation(conversation)
        case _:
            raise UserError(f"there is no command {command}; /help lists them")


def _reply(answerer: Answerer, conversation: Conversation, text: str) -> None:
    """Prints the answer as it is generated. Ctrl-C stops it and keeps the text so far."""
    pieces = []
    try:
        for piece in answerer.stream(conversation.request(text)):
            pieces.append(piece)
            say(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print(flush=True)
    conversation.add(text, "".join(pieces))


def _show_conversation(conversation: Conversation) -> None:
    """Shows a loaded conversation on a terminal."""
    if sys.stdin.isatty():
        for attached in conversation.images:
            _show(attached.image)
        for role, text in conversation.turns:
            say(f"> {unmarked(text).strip()}" if role == "user" else text, file=sys.stderr)


def _show(image: Image.Image) -> None:
    if sys.stdin.isatty():
        terminal.show(image, Console(stderr=True))


def _unquoted(file: str) -> str:
    """A file as it was typed, with spaces, or as a shell reads it, since terminals quote files dropped on them."""
    try:
        words = shlex.split(file)
    except ValueError:
        return file
    return words[0] if len(words) == 1 else file


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.chat", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    options.add_checkpoint(parser)
    options.add_adapters(parser)
    add("--image", action="append", default=[], metavar="F", help="for the first message; repeatable")
    add_allow_absolute(parser)
    add("--prompt", metavar="TEXT", help="answer only this, on standard output")
    add("--system", metavar="TEXT", help="system prompt instead of the template's")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    options.add_sampling(parser)
    add("--max-new-tokens", type=int, metavar="N", help=f"{MAX_ANSWER} or what the context has room for")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
