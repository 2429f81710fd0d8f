"""The noun phrases of captions: spaCy's where it and a model are installed, else those of a rule of stop-words.

Either way a phrase is in lower case, its words separated by one space, without the determiners and possessives that it
begins with ("the two dogs" and "Two dogs" are one); pronouns alone are none.
"""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from llava_jax.cli import UserError

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
    return ("words", _by_words) if method == "words" else _spacy_extractor(method, workers)


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
_STOP_WORDS = (
    # articles, determiners, quantifiers
    "a an the this that these those some any each every either neither no all both many much more most few several "
    "another other others such own same enough "
    # pronouns
    "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself yourself "
    "himself herself itself ourselves themselves who whom whose which what one's there here something someone anything "
    "anyone everything everyone nothing nobody "
    # prepositions and particles
    "of in on at by for with without from to into onto upon over under above below between among through across along "
    "around about against toward towards behind beside besides beneath underneath near next off out up down inside "
    "outside within during before after since until till past per via as like than atop amid beyond away back "
    # conjunctions and question words
    "and or but nor so yet if because while when where why how whether although though unless whereas "
    # auxiliaries and the verbs that captions are full of
    "is are was were be been being am do does did done have has had will would can could shall should may might must "
    "'s sits sit sat stands stand stood holds hold held lies lie lay walks walk wears wear wore looks look shows show "
    "shown plays rides runs run eats ate hangs goes go gone went comes come came takes take took taken makes make made "
    "gets get got sees see seen saw uses used seems appears becomes became gives give gave given puts put keeps keep "
    "kept leads lead contains contain includes include features feature poses pose arrives attends performs attend "
    # adverbs
    "not very too also just only even still again ever never always often then now together almost well however "
    "once twice ago soon"
)
_NOUNS_IN_ING = (
    "building buildings ceiling ceilings painting paintings wedding weddings evening evenings morning mornings king "
    "kings ring rings string strings spring springs wing wings thing things clothing drawing drawings railing railings "
    "awning awnings icing pudding bedding lightning lighting sibling siblings duckling ducklings swing swings sling "
    "ceiling-fan earring earrings crossing crossings parking dining living swimming shopping landing flooring topping "
    "toppings filling frosting dressing stuffing wiring meeting meetings outing outings beijing"
)
_NOUNS_IN_LY = "family butterfly jelly belly fly lily italy july assembly bully trolley ally"
LONGEST = 3  # words of a phrase

_stop_words, _nouns = frozenset(_STOP_WORDS.split()), frozenset(f"{_NOUNS_IN_ING} {_NOUNS_IN_LY}".split())


def _by_words(texts: Iterable[str]) -> Iterator[list[str]]:
    return map(word_phrases, texts)


def word_phrases(text: str) -> list[str]:
    """The noun phrases of a text, by a rule.

    A text is cut at punctuation, at the words of `_STOP_WORDS`, at numbers, and at words in -ing and -ly that are not
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
    no_noun = word.endswith(("ing", "ly")) and word not in _nouns
    return no_noun or word in _stop_words or not word[0].isalpha()
