"""Makes instruction data from images with captions and boxes."""

import importlib
import sys

from llava_jax.cli import run

COMMANDS = {  # name: module and function, called with what follows; what it does
    "conversation": ("llava_jax.datagen.generate:conversation", "conversations by a language model, from captions"),
    "detail": ("llava_jax.datagen.generate:detail", "... detailed descriptions, from captions and boxes"),
    "reasoning": ("llava_jax.datagen.generate:reasoning", "... questions that need reasoning, and their answers"),
    "captions": ("llava_jax.datagen.captions:main", "samples of stage 1: an instruction for each caption"),
    "filter": ("llava_jax.datagen.filter:main", "selects captions so that concepts are balanced, as CC3M-595K"),
    "report": ("llava_jax.datagen.report:main", "reports the quality of any LLaVA JSON as an HTML page"),
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
