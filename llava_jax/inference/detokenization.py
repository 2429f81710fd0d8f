"""Decodes generated token ids to text, one by one."""

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 32  # characters of the text that an answer continues, enough to decode the space before a word
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE (Radford et al. 2019)
_INCOMPLETE = "\ufffd"  # tokenizers decode the first bytes of an incomplete character to this


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes of a token, which may be a part of a character; none for a special token."""
    if token in tokenizer.all_special_ids or (name := tokenizer.convert_ids_to_tokens(token)) is None:
        return b""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # of SentencePiece
        return bytes.fromhex(byte[1])
    if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder):
        return bytes(_BYTES[letter] for letter in name if letter in _BYTES)
    return name.replace("\u2581", " ").encode()


class AnswerStream:
    """The text of one answer, token by token.

    `push` and `close` return the text that cannot change any more: no part of a character or of a stop string, and no
    white space at either end of the answer. Together, all that they return is the answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,  # SentencePiece or byte-level BPE
        stop_ids: Collection[int] = (),  # tokens that end the answer, of which they are no part
        stop_strings: Sequence[str] = (),  # strings that do, also across tokens
        begun: str = "",  # text that the answer continues, with its white space; it is not returned
        verbatim: bool = False,  # keeps the white space at both ends
        special: bool = False,  # keeps the text of special tokens
    ):
        self.finished = False
        begun = begun or (":" if verbatim else "")  # SentencePiece drops the space before the first word of a text
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._stop_strings = tuple(stop_strings)
        self._ids: list[int] = tokenizer.encode(begun[-CONTEXT:], add_special_tokens=False) if begun else []
        # ids[:decoded] are decoded already, and ids[window:decoded] are the last of these.
        self._window, self._decoded = 0, len(self._ids)
        self._held = ""  # decoded text that may be the start of a stop string, or white space at the end
        self._begun, self._verbatim, self._special = bool(begun), verbatim, special

    def stops_at(self, token: int) -> bool:
        """Whether the token ends the answer."""
        return token in self._stop_ids

    def push(self, token: int) -> str:
        """Adds a token -> new text. Does nothing after the answer's end."""
        if self.finished:
            return ""
        if token in self._stop_ids:
            return self.close()
        self._ids.append(token)
        text = self._decode_window()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._window, self._decoded = self._decoded, len(self._ids)
        return self._release(text)

    def close(self) -> str:
        """Ends the answer -> the rest of its text. Bytes of an incomplete character are dropped."""
        if self.finished:
            return ""
        released = self._release(self._decode_window().rstrip(_INCOMPLETE))
        if not self.finished:
            released += self._take(self._stripped_length(self._held))
        self.finished = True
        return released

    def _decode_window(self) -> str:
        """The text of the tokens that are not decoded yet.

        They are decoded together with a few tokens before them: alone, a SentencePiece word would lack its space.
        """
        known = self._decode(self._ids[self._window : self._decoded])
        return self._decode(self._ids[self._window :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": not self._special, "clean_up_tokenization_spaces": False}
        return self._tokenizer.decode(ids, **options)

    def _release(self, text: str) -> str:
        self._held += text
        stops = [self._held.find(stop) for stop in self._stop_strings if stop in self._held]
        if stops:
            self.finished = True
            self._held = self._held[: min(stops)]
            return self._take(self._stripped_length(self._held))
        certain = self._held[: len(self._held) - self._partial_stop_length()]
        return self._take(self._stripped_length(certain))

    def _stripped_length(self, text: str) -> int:
        return len(text if self._verbatim else text.rstrip())

    def _partial_stop_length(self) -> int:
        """The length of the end of the held text that may be the start of a stop string."""
        begun = (n for stop in self._stop_strings for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return max(begun, default=0)

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        if not self._begun:
            taken = taken.lstrip()
        self._begun = self._begun or bool(taken)
        return taken
