"""Makes instruction data from pictures that have captions and boxes."""

import importlib
import sys

from llava_jax.cli import run

COMMANDS = {  # name: module and function, called with what follows; what it does
    "conversation": ("llava_jax.datagen.generate:conversation", "a language model makes conversations of captions"),
    "detail": ("llava_jax.datagen.generate:detail", "... detailed descriptions of captions and boxes"),
    "reasoning": ("llava_jax.datagen.generate:reasoning", "... questions that take thought, and their answers"),
    "captions": ("llava_jax.datagen.captions:main", "captions to the samples of stage 1: an instruction for each"),
    "filter": ("llava_jax.datagen.filter:main", "chooses captions so that concepts are balanced, as 595K of CC3M were"),
    "report": ("llava_jax.datagen.report:main", "the quality of any LLaVA JSON as an HTML page with its pictures"),
}


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module, _, function = COMMANDS[argv[0]][0].partition(":")
        return getattr(importlib.import_module(module), function)(argv[1:])
    asked = bool(argv) and argv[0] in ("-h", "--help")
    print(_help(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _help() -> str:
    lines = [f"  {name:<14}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m llava_jax.datagen COMMAND ... (COMMAND --help has its options)", "", __doc__, "", *lines]
    )


if __name__ == "__main__":
    run(main)
