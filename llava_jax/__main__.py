"""LLaVA in JAX: trains vision-language models, converts, evaluates and serves them, and makes data for them."""

import sys
from pathlib import PurePath
from typing import NoReturn

from llava_jax import __version__, cli

COMMANDS = {  # what is typed: its function or the module whose `main` is called, and what it does
    "train": ("llava_jax.main:command", "trains one stage; the same command again resumes"),
    "preflight": ("llava_jax.preflight.__main__:command", "compiles the training step for hardware you don't have"),
    "plot": ("llava_jax.plot", "draws the losses of training runs"),
    "chat": ("llava_jax.chat.__main__", "talks with a checkpoint in the terminal"),
    "serve": ("llava_jax.serve.__main__", "serves a checkpoint: OpenAI's API and a web page"),
    "convert": ("llava_jax.convert.__main__", "imports, exports, verifies and copies weights"),
    "evaluate": ("llava_jax.evaluate.__main__", "answers benchmarks, judges and scores the answers"),
    "data check": ("llava_jax.data.check", "finds and fixes the problems of a data set"),
    "data inspect": ("llava_jax.data.inspect", "shows what the model will see and which tokens are targets"),
    "data build": ("llava_jax.data.build", "writes a data set as shards, which training reads faster"),
    "data pack": ("llava_jax.data.pack", "reports how full packed rows would be"),
    "datagen": ("llava_jax.datagen.__main__", "makes instruction data from captions and boxes"),
    "xla-flags": ("llava_jax.xla_flags", "prints the environment variables of a platform"),
}


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    cli.launcher = "python -m llava_jax" if PurePath(sys.argv[0]).name == "__main__.py" else "llava"
    if argv[:1] == ["--version"]:
        cli.say(f"llava_jax {__version__}")
        return 0
    return cli.dispatch(cli.launcher, __doc__, COMMANDS, argv)


def console() -> NoReturn:
    """The command `llava`."""
    cli.run(main)


if __name__ == "__main__":
    console()
