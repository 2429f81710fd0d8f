"""Reads the tables of words and sentences in `word_files`."""

import re
from pathlib import Path

FOLDER = Path(__file__).with_name("word_files")


def read_entries(name: str) -> list[str]:
    """The entries of a file, one a line. Comments begin with #; indented lines continue the one before."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r"\n\s+", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()


def read_words(name: str) -> list[str]:
    """All words of a file."""
    return " ".join(read_entries(name)).split()
