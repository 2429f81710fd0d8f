"""Talks with a checkpoint in the terminal, or answers one prompt."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator

from etils import epath
from PIL import Image

from llava_jax.checkpoint import open_checkpoint
from llava_jax.cli import UserError, run
from llava_jax.data.conversation import IMAGE_TOKEN, choose_template
from llava_jax.data.images import load_image
from llava_jax.generate import Generator, Request, Sampling

EPILOG = """examples:
  python -m llava_jax.chat --checkpoint runs/finetune --image cat.jpg --prompt "What is this?"
  python -m llava_jax.chat --checkpoint runs/finetune"""
HELP = """/image FILE  adds a picture to your next message
/reset       forgets the conversation
/help        shows this
/quit        ends, as Ctrl-D does; Ctrl-C stops an answer"""
LONGEST_ANSWER = 512  # tokens, unless the context has less room or --max-new-tokens says otherwise


class Conversation:
    """The turns so far and their pictures."""

    def __init__(self, system: str | None):
        self.system = system
        self.reset()

    def reset(self) -> None:
        self.turns: list[tuple[str, str]] = [] if self.system is None else [("system", self.system)]
        self.images: list[Image.Image] = []
        self.waiting: list[Image.Image] = []  # pictures for the next message

    def ask(self, text: str) -> Request:
        """The request of the next message: its pictures stand before its text, as in training."""
        marks = f"{IMAGE_TOKEN}\n" * len(self.waiting)
        return Request([*self.turns, ("user", marks + _unmarked(text))], [*self.images, *self.waiting])

    def keep(self, request: Request, answer: str) -> None:
        """The request was answered: both belong to the conversation."""
        self.turns = [*request.turns, ("assistant", _unmarked(answer))]
        self.images, self.waiting = list(request.images), []


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A generator and how it is asked."""

    generator: Generator
    sampling: Sampling
    max_new_tokens: int | None

    def stream(self, request: Request) -> Iterator[str]:
        """The answer in pieces. Raises UserError where the context has no room for it."""
        longest = self.max_new_tokens or max(1, min(LONGEST_ANSWER, self.generator.room(request)))
        return self.generator.stream(request, dataclasses.replace(self.sampling, max_new_tokens=longest))


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if args.max_new_tokens is not None:
        sampling = dataclasses.replace(sampling, max_new_tokens=args.max_new_tokens)  # which checks it
    conversation = Conversation(args.system)
    conversation.waiting = [load_image(file) for file in args.image]
    checkpoint = open_checkpoint(args.checkpoint)
    template = choose_template(args.template, checkpoint.template)
    answerer = Answerer(Generator.from_checkpoint(checkpoint, template), sampling, args.max_new_tokens)
    if args.prompt is not None:
        print("".join(answerer.stream(conversation.ask(args.prompt))))
    else:
        talk(answerer, conversation)


def talk(answerer: Answerer, conversation: Conversation) -> None:
    """Reads messages and commands until the input ends. A mistake is told, and the session goes on."""
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _obey(line, conversation):
                    return
            elif line:
                _reply(answerer, conversation, line)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D; Ctrl-C at the prompt begins the line anew."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return


def _obey(line: str, conversation: Conversation) -> bool:
    """Carries out a command; False ends the session."""
    command, _, argument = line.partition(" ")
    match command:
        case "/quit":
            return False
        case "/help":
            print(HELP, file=sys.stderr)
        case "/reset":
            conversation.reset()
        case "/image" if argument.strip():
            conversation.waiting.append(load_image(epath.Path(argument.strip()).expanduser()))
        case "/image":
            raise UserError("/image needs a file: /image FILE")
        case _:
            raise UserError(f"there is no command {command}; /help lists them")
    return True


def _reply(answerer: Answerer, conversation: Conversation, text: str) -> None:
    """Prints the answer as it comes; Ctrl-C keeps what there is of it."""
    request, pieces = conversation.ask(text), []
    try:
        for piece in answerer.stream(request):
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print(flush=True)
    conversation.keep(request, "".join(pieces))


def _unmarked(text: str) -> str:
    """The text without what would stand for one more picture."""
    return text.replace(IMAGE_TOKEN, "")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava_jax.chat",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="D", help="an import, a workdir or a step of it")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="for the first message; repeatable")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this alone, on standard output")
    parser.add_argument("--system", metavar="TEXT", help="system prompt instead of the template's")
    parser.add_argument("--template", metavar="NAME", help="instead of the checkpoint's")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest with this probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"{LONGEST_ANSWER} or what the context has room for"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
