"""The noun phrases of captions: spaCy's where it and a model are installed, else those of a rule of stop-words.

Either way a phrase is in lower case, its words separated by one space, without the determiners and possessives that it
begins with ("the two dogs" and "Two dogs" are one); pronouns alone are none.
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
"""The different phrases of each text, in the order of the texts."""


def extractor(method: str = "auto", workers: int = 1) -> tuple[str, Extract]:
    """The name of a method and what extracts phrases by it.

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
        raise UserError("noun phrases by a model of spaCy need it: pip install 'llava_jax[phrases]'") from None
    try:
        nlp = spacy.load(model, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise UserError(f"spaCy has no model {model}: python -m spacy download {model} ({error})") from error
    if "parser" not in nlp.pipe_names:
        raise UserError(f"the model {model} of spaCy has no parser, without which there are no noun phrases")

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
LONGEST = 3  # words of a phrase
_STOP_WORDS, _NOUNS = frozenset(read_words("stop_words.txt")), frozenset(read_words("nouns.txt"))


def word_phrases(text: str) -> list[str]:
    """The noun phrases of a text, by a rule.

    A text is cut at punctuation, at stop words, at numbers, and at words in -ing and -ly that are not
    known as nouns. What is left between two cuts, without words in -ed at its end, is a phrase: its last three words.
    """
    phrases, run = {}, []
    for word in itertools.chain(_WORD.findall(text.lower()), "."):
        if not _cuts(word):
            run.append(word)
            continue
        while run and run[-1].endswith("ed") and len(run[-1]) > 4:
            run.pop()
        if run:
            phrases[" ".join(run[-LONGEST:])] = None
        run = []
    return list(phrases)


def _cuts(word: str) -> bool:
    no_noun = word.endswith(("ing", "ly")) and word not in _NOUNS
    return no_noun or word in _STOP_WORDS or not word[0].isalpha()
