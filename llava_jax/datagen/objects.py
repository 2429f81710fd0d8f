"""Finds the objects that a text names: COCO's categories, by a table of synonyms and their plurals, whole words only.

CHAIR (Rohrbach et al. 2018) counts hallucinated objects this way. A name does not count where it is negated ("no dog",
"without any cars") or a part of another name ("train station"). A word that can mean several categories ("bike") counts
for all of them.
"""

import re
from collections.abc import Iterable, Iterator

from llava_jax.datagen.words import read_entries, read_words

# category: its other names
SYNONYMS = {category: other.strip() for category, _, other in (e.partition(":") for e in read_entries("objects.txt"))}
# Words that mostly mean something else (a colour, a verb) in the singular.
ONLY_PLURAL = ("orange", "bat", "mobile", "cook", "ski")
IRREGULAR = {
    "person": "persons", "people": "people", "child": "children", "mouse": "mice", "knife": "knives", "goose": "geese",
    "ox": "oxen", "calf": "calves", "sheep": "sheep", "cattle": "cattle", "scissors": "scissors", "skis": "skis",
    "aircraft": "aircraft", "luggage": "luggage", "broccoli": "broccoli", "human": "humans",
}  # fmt: skip
_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
_NEGATIONS = {"no", "not", "without", "neither", "nor", "isn't", "aren't", "wasn't", "weren't", "don't", "doesn't"}
# Words between a negation and the object.
_FILLERS = {"a", "an", "any", "the", "other", "visible", "single", "one", "have", "see"}


class Finder:
    """Finds the categories that a text names: COCO's, and `categories` by their own names."""

    def __init__(self, categories: Iterable[str] = ()):
        names: dict[str, set[str]] = {}
        table = {**{category.lower(): "" for category in categories}, **SYNONYMS}
        for category, synonyms in table.items():
            for name in (category, *map(_spaced, synonyms.split())):
                for form in {plural(name), *(() if name in ONLY_PLURAL else (name,))}:
                    names.setdefault(form, set()).add(category)
        for name in map(_spaced, read_words("not_objects.txt")):
            names |= {name: set(), plural(name): set()}
        self.categories = tuple(table)
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._longest: dict[str, int] = {}  # words of a name that begins with this one
        for name, found in names.items():
            if words := tuple(_words(name)):
                self._names[words] = tuple(sorted(found))
                self._longest[words[0]] = max(len(words), self._longest.get(words[0], 0))

    def mentions(self, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each mention of an object, in lower case, and the categories that it can mean."""
        words = _words(text)
        start = 0
        while start < len(words):
            for length in range(self._longest.get(words[start], 0), 0, -1):
                name = tuple(words[start : start + length])
                if name in self._names:
                    if self._names[name] and not _negated(words, start):
                        yield " ".join(name), self._names[name]
                    start += length - 1
                    break
            start += 1

    def named(self, text: str) -> set[str]:
        """All categories that the mentions of a text can mean."""
        return {category for _, categories in self.mentions(text) for category in categories}


def _words(text: str) -> list[str]:
    """In lower case and without a possessive 's."""
    return [word.removesuffix("'s") for word in _TOKEN.findall(text.lower().replace("’", "'"))]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _negated(words: list[str], start: int) -> bool:
    before = start - 1
    while before >= 0 and words[before] in _FILLERS:
        before -= 1
    return before >= 0 and words[before] in _NEGATIONS


def plural(name: str) -> str:
    """The plural of a noun, or of the last word of several."""
    rest, _, word = name.rpartition(" ")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("man"):
        word = f"{word[:-3]}men"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word = f"{word}es"
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = f"{word[:-1]}ies"
    else:
        word = f"{word}s"
    return f"{rest} {word}".strip()
