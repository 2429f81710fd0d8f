"""What the commands of this package share."""

import argparse

from llava_jax.cli import Parser


def command_parser(name: str, description: str, epilog: str) -> Parser:
    """The parser of `python -m llava_jax.evaluate NAME`, without its arguments."""
    return Parser(
        prog=f"python -m llava_jax.evaluate {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
