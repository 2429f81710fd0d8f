"""The noun phrases of captions: by spaCy if it and a model are installed, else by a rule of stop words.

In both cases a phrase is in lower case, with one space between words, and without leading determiners and possessives
("the two dogs" and "Two dogs" are one phrase). Pronouns alone are not phrases.
"""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from llava_jax.cli import UserError
from llava_jax.datagen.words import read_words

SPACY_MODEL = "en_core_web_sm"
METHODS = ("auto", "words")  # or the name of a model

Extract = Callable[[Iterable[str]], Iterator[list[str]]]
"""Yields the distinct phrases of each text."""


def extractor(method: str = "auto", workers: int = 1) -> tuple[str, Extract]:
    """The name of a method, and the function that extracts phrases with it.

    Args:
      method: "words", the name of an installed model of spaCy, or "auto": `SPACY_MODEL` if there is one, else "words".
      workers: processes of spaCy.
    """
    if method == "auto":
        method = SPACY_MODEL if _installed("spacy") and _installed(SPACY_MODEL) else "words"
    return ("words", partial(map, word_phrases)) if method == "words" else _spacy_extractor(method, workers)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------------------------ spaCy


def _spacy_extractor(model: str, workers: int) -> tuple[str, Extract]:
    try:
        import spacy
    except ImportError:
        raise UserError("noun phrases by a spaCy model need spaCy: pip install 'llava_jax[phrases]'") from None
    try:
        nlp = spacy.load(model, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise UserError(f"spaCy has no model {model}: python -m spacy download {model} ({error})") from error
    if "parser" not in nlp.pipe_names:
        raise UserError(f"the model {model} of spaCy has no parser, which noun phrases need")

    def by_spacy(texts: Iterable[str]) -> Iterator[list[str]]:
        return map(spacy_phrases, nlp.pipe(texts, n_process=workers, batch_size=1000))

    return f"spaCy {spacy.__version__}, {nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}", by_spacy


def spacy_phrases(doc) -> list[str]:
    """The noun phrases of a parsed `spacy.tokens.Doc`."""
    phrases = {}
    for chunk in doc.noun_chunks:
        start = chunk.start
        while start < chunk.end and (doc[start].pos_ in ("DET", "PRON") or doc[start].is_punct):
            start += 1
        if text := " ".join(doc[start : chunk.end].text.lower().split()):
            phrases[text] = None
    return list(phrases)


# ------------------------------------------------------------------------------------------------------------ words

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]+|_")
MAX_WORDS = 3  # words of a phrase
_STOP_WORDS, _NOUNS = frozenset(read_words("stop_words.txt")), frozenset(read_words("nouns.txt"))


def word_phrases(text: str) -> list[str]:
    """The noun phrases of a text, by a rule.

    A text is cut at punctuation, stop words, numbers, and words in -ing and -ly that are not known nouns. The words
    between two cuts, without words in -ed at the end, are a phrase, or the last three of them if there are more.
    """
    phrases, run = {}, []
    for word in itertools.chain(_WORD.findall(text.lower()), "."):
        if not _cuts(word):
            run.append(word)
            continue
        while run and run[-1].endswith("ed") and len(run[-1]) > 4:
            run.pop()
        if run:
            phrases[" ".join(run[-MAX_WORDS:])] = None
        run = []
    return list(phrases)


def _cuts(word: str) -> bool:
    no_noun = word.endswith(("ing", "ly")) and word not in _NOUNS
    return no_noun or word in _STOP_WORDS or not word[0].isalpha()
