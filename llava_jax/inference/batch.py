"""Continuous batching: answers enter the slots of a running batch and leave them, between two dispatches."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llava_jax.inference.answer import Alternative, Answer, Piece, TokenLogprob
from llava_jax.inference.detokenization import AnswerStream, token_bytes
from llava_jax.inference.generate import PromptEncoder, prompt_number
from llava_jax.inference.prefix_cache import Places, PreparedPrompt, Shelf
from llava_jax.inference.programs import LENGTHS, Chosen, Programs, PromptPiece, Slots, make_choice

STEPS = 4  # tokens a dispatch: someone reads along, and others wait to enter
READING = LENGTHS[-1]  # positions of prompts after which those who read along get something, too
STEPS_BETWEEN = 1  # tokens that they get while prompts are left: who waits for a first one waits longest
WASTE = 32  # positions that a piece of a prompt may be padded by


@dataclasses.dataclass
class Running:
    """An answer in a slot."""

    answer: Answer
    prompt: PreparedPrompt
    slot: int
    stream: AnswerStream
    number: int  # see `Choice.numbers`
    conversation: int | None = None  # its place in the cache, once its prompt is begun
    done: int = 0  # positions of the prompt that the cache holds

    @property
    def tokens(self) -> list[int]:
        """Of the answer."""
        return self.answer.tokens

    @property
    def held(self) -> np.ndarray:
        """Contents of the positions that the cache holds: the newest token is not there yet."""
        if not self.tokens:
            return self.prompt.contents[: self.done]
        return np.concatenate([self.prompt.contents, np.array(self.tokens[:-1], np.int64)])


class Batch:
    """Everything in the slots. To be used from one thread."""

    def __init__(self, programs: Programs, prompts: PromptEncoder, conversations: int, pictures: int):
        self._programs, self._prompts = programs, prompts
        self._shelf, self._pictures = Shelf(conversations), Places(pictures)
        self._free = list(range(programs.slots))[::-1]
        self.running: list[Running] = []

    @property
    def full(self) -> bool:
        return not self._free

    def enter(self, answer: Answer, prompt: PreparedPrompt) -> None:
        """Takes a free slot."""
        stream = self._prompts.answer_stream(answer.sampling, answer.request.begun)
        self.running.append(Running(answer, prompt, self._free.pop(), stream, prompt_number(prompt.tokens)))

    def step(self) -> list[Answer]:
        """Some positions of prompts, and then some tokens of every answer that has begun; -> those that ended."""
        ended = [self._end(running, "cancelled") for running in list(self.running) if running.answer.cancelled]
        positions = 0
        while positions < READING and (unread := next((one for one in self.running if not one.tokens), None)):
            if unread.conversation is None:
                self._begin(unread)
            positions += len(unread.prompt.tokens) - unread.done
            ended += self._read(unread)
        begun = [running for running in self.running if running.tokens]
        return ended + (self._write(begun) if begun else [])

    def _begin(self, running: Running) -> None:
        """Finds a place for a prompt. Not before it is its turn: what came just before it may begin as it does."""
        place = self._shelf.take(running.prompt.contents)
        if place.source is not None:
            self._programs.copy(place.source, place.conversation)
        running.conversation = place.conversation
        running.done = running.answer.prefix_tokens = place.reused

    def _read(self, running: Running) -> list[Answer]:
        """Computes the next piece of a prompt. The last one gives the first token."""
        left = len(running.prompt.tokens) - running.done
        size = piece_size(left)
        piece = self._piece(running, min(size, left), size)
        chosen = self._programs.extend(piece, running.answer.sampling.logprobs is not None)
        running.done += min(size, left)
        self._shelf.holds(running.conversation, running.held)
        return self._deliver(running, chosen) if running.done == len(running.prompt.tokens) else []

    def _piece(self, running: Running, length: int, size: int) -> PromptPiece:
        """The next `length` positions of a prompt, padded to `size`. Pictures are encoded if need be."""
        P, start = self._prompts.config.image_tokens, running.done
        tokens, features = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        tokens[:length] = running.prompt.tokens[start : start + length]
        index = running.prompt.features[start : start + length]
        for picture in np.unique(index[index >= 0] // P):
            own = np.flatnonzero(index // P == picture)
            features[own] = self._picture(running.prompt, picture) * P + index[own] % P
        choice = make_choice(1)
        _set_choice(choice, 0, running)
        return PromptPiece(tokens, features, np.int32(start), np.int32(length), np.int32(running.conversation), choice)

    def _picture(self, prompt: PreparedPrompt, picture: int) -> int:
        """Where the picture's features are kept."""
        place, known = self._pictures.find(prompt.digests[picture])
        if not known:
            self._programs.encode(prompt.pixels[picture], place)
        return place

    def _write(self, begun: Sequence[Running]) -> list[Answer]:
        """Some more tokens of answers."""
        B = self._programs.slots
        zeros = np.zeros(B, np.int32)
        nowhere = np.full(B, self._programs.positions, np.int32)
        slots = Slots(zeros.copy(), zeros.copy(), nowhere, zeros.copy(), make_choice(B))
        for running in begun:
            at, length = running.slot, len(running.prompt.tokens)
            slots.conversations[at], slots.tokens[at] = running.conversation, running.tokens[-1]
            slots.positions[at] = length + len(running.tokens) - 1
            slots.limits[at] = length + running.answer.sampling.max_new_tokens - 1
            _set_choice(slots.choice, at, running)
        report = any(running.answer.sampling.logprobs is not None for running in begun)
        steps = STEPS if len(begun) == len(self.running) else STEPS_BETWEEN
        written = self._programs.decode(slots, steps, report)
        ended = []
        for running in begun:
            ended += self._deliver(running, Chosen(*(x[running.slot] for x in written)))
            if running.answer.finish_reason is None:
                self._shelf.holds(running.conversation, running.held)
        return ended

    def _deliver(self, running: Running, chosen: Chosen) -> list[Answer]:
        """Passes on what tokens [steps] are; -> the answer, if it ended."""
        wanted = running.answer.sampling.logprobs
        texts, logprobs = [], []
        for step, token in enumerate(chosen.tokens.tolist()):
            if token < 0 or running.stream.finished:
                break
            running.tokens.append(token)
            texts.append(running.stream.push(token))
            if wanted is not None and token not in self._prompts.stop_ids:
                logprobs.append(self._logprob(Chosen(*(x[step] for x in chosen)), wanted))
        at_limit = len(running.tokens) >= running.answer.sampling.max_new_tokens and not running.stream.finished
        if at_limit:
            texts.append(running.stream.close())
        running.answer.give(Piece("".join(texts), logprobs))
        return [self._end(running, "length" if at_limit else "stop")] if running.stream.finished else []

    def _end(self, running: Running, reason: str) -> Answer:
        """Frees the slot; what the cache holds stays until its place is needed."""
        if running.conversation is not None:
            self._shelf.holds(running.conversation, running.held)
            self._shelf.give_back(running.conversation)
        self._free.append(running.slot)
        self.running.remove(running)
        running.answer.finish(reason)
        return running.answer

    def _logprob(self, chosen: Chosen, alternatives: int) -> TokenLogprob:
        def entry(token: int, logprob: float) -> Alternative:
            data = token_bytes(self._prompts.tokenizer, int(token))
            return Alternative(data.decode(errors="replace"), data, float(logprob))

        top = map(entry, chosen.top_tokens[:alternatives], chosen.top_logprobs[:alternatives])
        return TokenLogprob(*entry(chosen.tokens, chosen.logprobs), list(top))


def piece_size(left: int) -> int:
    """How long a program to take for a prompt of which so many positions are left."""
    fitting = [length for length in LENGTHS if length <= left]
    enough = next((length for length in LENGTHS if length >= left), None)
    return enough if enough is not None and (not fitting or enough - left <= WASTE) else fitting[-1]


def _set_choice(choice, row: int, running: Running) -> None:
    sampling = running.answer.sampling
    choice.temperature[row], choice.top_p[row], choice.top_k[row] = sampling.temperature, sampling.top_p, sampling.top_k
    choice.seeds[row], choice.numbers[row] = sampling.seed, running.number
