"""What an answer has to look like: JSON of a schema, a regular expression, one of some texts, or a grammar.

llguidance (of the extra `serve`) compiles it, and says before each token which ones are allowed. Its limits are on
work, not on time: what takes more fails, whatever the machine. It reports errors as states of its objects.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax.cli import UserError
from llava_jax.inference.answer import EngineError
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.inference.requests import WORD

MAX_CHARACTERS = 256 << 10  # of a schema, a grammar or all choices
MAX_REGEX = 4096  # characters
MAX_CHOICES = 1000
MAX_LEXER_STATES = 20_000  # of an answer, about 2 kB each
# Long runs of white space are what small models prefer to an end: a line break with its indentation is enough.
JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n[ \t]{0,40}",
    "lenient": False,
    "coerce_one_of": False,
}


class ConstraintFailed(EngineError):
    """The tokens that a constraint allows took too much work to find."""


class Constraint:
    """A compiled constraint, an `LLMatcher`, which follows one answer by tokens; `words` is the length of a mask."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._words, self._mask = matcher, words, None

    def copy(self) -> "Constraint":
        """For another answer."""
        return Constraint(self._matcher.deep_copy(), self._words)

    def mask(self) -> np.ndarray:
        """Bits of the tokens that are allowed next, uint32[V / 32]. Raises `ConstraintFailed`."""
        if self._mask is None:
            data = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                raise ConstraintFailed(_shortened(self._matcher.get_error()))
            self._mask = np.frombuffer(data, np.uint32, self._words)  # a word more where V is a multiple of 32
        return self._mask

    def allows(self, token: int) -> bool:
        """Whether a token is allowed next. False where that takes too much work, for which `mask` raises."""
        try:
            return bool(self.mask()[token // WORD] >> token % WORD & 1)
        except ConstraintFailed:
            return False

    def complete_after(self, token: int) -> bool:
        """Adds an allowed token -> whether nothing can follow."""
        self._mask = None
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Constraints:
    """Compiles constraints for a model's tokenizer, whose vocabulary may be smaller than the model's. For use from any
    thread."""

    def __init__(self, prompts: PromptEncoder, vocabulary: int):
        self._prompts, self._vocabulary = prompts, vocabulary
        self._lock, self._tokens = threading.Lock(), None

    def compile(self, kind: str, value: Any) -> Constraint:
        """Compiles `value`, which one of `KINDS` describes. Raises `UserError` where it is malformed or takes too much
        work."""
        tokens = self.tokens()
        import llguidance

        limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        grammar = KINDS[kind](llguidance.LLMatcher, value)
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(f"{kind}: {_shortened(matcher.get_error())}")
        return Constraint(matcher, -(-tokens.vocab_size // WORD))

    def tokens(self) -> Any:
        """The vocabulary as llguidance has it; the first call takes a large part of a second. Raises `UserError`."""
        with self._lock:
            if self._tokens is None:
                try:
                    import llguidance
                except ImportError as error:
                    raise UserError(f"{error}: pip install 'llava_jax[serve]'") from error
                text, ends = self._prompts.tokenizer.backend_tokenizer.to_str(), list(self._prompts.stop_ids)
                self._tokens = llguidance.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=ends)
            return self._tokens


# The functions below turn a value into a grammar, with the class `llguidance.LLMatcher`.


def _json(matcher: Any, schema: Mapping[str, Any]) -> str:
    """A JSON schema."""
    return matcher.grammar_from_json_schema(_bounded(json.dumps(schema), "json"), overrides=JSON_OPTIONS)


def _regex(matcher: Any, pattern: str) -> str:
    """A regular expression for all of the answer, in Rust's syntax."""
    return matcher.grammar_from_regex(_bounded(pattern, "regex", MAX_REGEX))


def _choice(matcher: Any, choices: Sequence[str]) -> str:
    """Texts of which the answer is one."""
    if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
        raise UserError(f"choice: it has to be 1 to {MAX_CHOICES} texts that are not empty")
    text = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _grammar(matcher, f"start: {_bounded(text, 'choice')}")


def _grammar(matcher: Any, grammar: str) -> str:
    """A grammar in Lark's syntax, as llguidance reads it."""
    return matcher.grammar_from_lark(_bounded(grammar, "grammar"))


KINDS: dict[str, Callable[[Any, Any], str]] = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}


def _bounded(text: str, what: str, limit: int = MAX_CHARACTERS) -> str:
    if len(text) > limit:
        raise UserError(f"{what}: it has {len(text)} characters, and at most {limit} are taken")
    return text


def _shortened(message: str) -> str:
    """The first line of an error of llguidance."""
    return message.strip().partition("\n")[0][:200]
