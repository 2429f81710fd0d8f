"""Continuous batching: between two dispatches, answers enter the slots of the running batch and leave them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.data.features import TEXT
from llava_jax.inference.answer import Alternative, Answer, EngineError, Piece, TokenLogprob
from llava_jax.inference.constraints import Constraint, ConstraintFailed
from llava_jax.inference.decoding import RowSampling, Sampled, prompt_hash
from llava_jax.inference.detokenization import AnswerStream, token_bytes
from llava_jax.inference.prefix_cache import LruIndex, PrefixCache, PreparedPrompt
from llava_jax.inference.programs import CHUNK_SIZES, Programs, PromptChunk
from llava_jax.inference.scores import ScoreRules

STEPS = 4  # tokens a dispatch: clients read along, and other requests wait to enter
PREFILL_POSITIONS = CHUNK_SIZES[-1]  # of prompts, after which the running answers get tokens, too
STEPS_BETWEEN = 1  # tokens that they get while prompts are left: the time to the first token counts more
MAX_PADDING = 32  # positions of a chunk


@dataclasses.dataclass
class Running:
    """An answer in a slot."""

    answer: Answer
    stream: AnswerStream
    prompt_hash: int
    matcher: Constraint | None = None  # of an answer with a constraint
    row: int | None = None  # of the cache, once its prompt has begun
    done: int = 0  # positions of the prompt that the cache holds

    @property
    def prompt(self) -> PreparedPrompt:
        return self.answer.prompt

    @property
    def remaining(self) -> int:
        """Positions of the prompt that are not computed yet."""
        return len(self.prompt.tokens) - self.done

    @property
    def tokens(self) -> list[int]:
        """Of the answer."""
        return self.answer.tokens

    @property
    def cached(self) -> np.ndarray:
        """Contents of the positions that the cache holds, all but the newest token."""
        if not self.tokens:
            return self.prompt.contents[: self.done]
        return self.prompt.extended(self.tokens[:-1])


class Batch:
    """The answers in all slots. For use from one thread."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self._prefix_cache, self._tiles = PrefixCache(programs.rows), LruIndex(programs.images)
        self.running: list[Running] = []

    @property
    def full(self) -> bool:
        return len(self.running) == self._programs.slots

    def enter(self, answer: Answer) -> None:
        """Takes a free slot."""
        stream = answer.prompt.adapter.prompts.answer_stream(answer.sampling, answer.prompt.request.begun)
        matcher = answer.sampling.constraint and answer.sampling.constraint.copy()
        self.running.append(Running(answer, stream, prompt_hash(answer.prompt.tokens), matcher))

    def step(self) -> list[Answer]:
        """Computes some positions of prompts, then some tokens of every answer that has begun -> those that ended; an
        answer that failed has no `finish_reason`."""
        ended = [self._end(running, "cancelled") for running in list(self.running) if running.answer.cancelled]
        positions = 0
        while positions < PREFILL_POSITIONS and (waiting := next((r for r in self.running if not r.tokens), None)):
            if waiting.row is None:
                self._begin(waiting)
            positions += waiting.remaining
            ended += self._prefill(waiting)
        return ended + self._decode([running for running in self.running if running.tokens])

    def _begin(self, running: Running) -> None:
        """Finds a row for a prompt. Not before its turn: the prompt before it may begin in the same way."""
        placement = self._prefix_cache.allocate(running.prompt.contents)
        if placement.source is not None:
            self._programs.copy(placement.source, placement.row)
        running.row = placement.row
        running.done = running.answer.prefix_tokens = placement.reused

    def _prefill(self, running: Running) -> list[Answer]:
        """Computes the next chunk of a prompt. The last one gives the first token."""
        size = chunk_size(running.remaining)
        length = min(size, running.remaining)
        rules = self._programs.no_rules[1]
        if length == running.remaining and running.answer.sampling.changes_scores:
            rules = self._programs.new_rules(1)
            if failed := self._set_rules(rules, 0, running):
                return failed
        chunk = self._chunk(running, length, size, rules)
        sampled = self._programs.prefill(chunk, running.answer.sampling.logprobs is not None)
        running.done += length
        self._prefix_cache.update(running.row, running.cached)
        return [] if running.remaining else self._deliver(running, sampled)

    def _set_rules(self, rules: ScoreRules, row: int, running: Running) -> list[Answer]:
        """Sets the rules of an answer's next token -> the answer, if that failed."""
        prompt = running.prompt
        try:
            mask = running.matcher and running.matcher.mask()
        except ConstraintFailed as error:
            return [self._end(running, None, error)]
        text = prompt.image_feature_index == TEXT
        rules.set(row, running.answer.sampling, prompt.tokens, text, running.tokens, mask)
        return []

    def _chunk(self, running: Running, length: int, size: int, rules: ScoreRules) -> PromptChunk:
        """The next `length` positions of a prompt, padded to `size`. Encodes the tiles that are not cached."""
        patches, start = self._programs.image_tokens, running.done
        tokens, features = np.zeros(size, np.int32), np.full(size, TEXT, np.int32)
        tokens[:length] = running.prompt.tokens[start : start + length]
        index = running.prompt.image_feature_index[start : start + length]
        features[:length] = np.minimum(index, TEXT)  # newlines stay
        for tile in np.unique(index[index >= 0] // patches):
            own = np.flatnonzero(index // patches == tile)
            features[own] = self._tile(running.prompt, tile) * patches + index[own] % patches
        sampling = RowSampling.greedy(1)
        sampling.set(0, running.answer.sampling, running.prompt_hash)
        numbers = map(np.int32, (start, length, running.row))
        return PromptChunk(tokens, features, *numbers, sampling, np.int32(running.prompt.adapter.index), rules)

    def _tile(self, prompt: PreparedPrompt, tile: int) -> int:
        """The index of a tile in the cached features."""
        adapter = prompt.adapter
        index, known = self._tiles.find((prompt.digests[tile], adapter.version if adapter.own_projector else 0))
        if not known:
            self._programs.encode(prompt.tiles[tile], index, adapter.index)
        return index

    def _decode(self, begun: Sequence[Running]) -> list[Answer]:
        """Generates some more tokens of answers -> those that ended."""
        if not begun:
            return []
        B = next(size for size in self._programs.sizes if size >= len(begun))
        slots, ended = self._programs.idle_slots(B), []
        if any(running.answer.sampling.changes_scores for running in begun):
            slots = slots._replace(rules=self._programs.new_rules(B))
        placed = list(enumerate(begun))
        for slot, running in list(placed):
            if running.answer.sampling.changes_scores and (failed := self._set_rules(slots.rules, slot, running)):
                ended += failed
                placed.remove((slot, running))
        for slot, running in placed:
            length = len(running.prompt.tokens)
            slots.rows[slot], slots.tokens[slot] = running.row, running.tokens[-1]
            slots.positions[slot] = length + len(running.tokens) - 1
            slots.limits[slot] = length + running.answer.sampling.max_new_tokens - 1
            slots.adapters[slot] = running.prompt.adapter.index
            slots.endless[slot] = running.answer.sampling.ignore_eos
            slots.sampling.set(slot, running.answer.sampling, running.prompt_hash)
        report = any(running.answer.sampling.logprobs is not None for running in begun)
        constrained = any(running.matcher for running in begun)  # what is allowed depends on the token before
        steps = STEPS if len(begun) == len(self.running) and not constrained else STEPS_BETWEEN
        sampled = self._programs.decode(slots, steps, report)
        for slot, running in placed:
            ended += self._deliver(running, Sampled(*(x[slot] for x in sampled)))
        return ended

    def _deliver(self, running: Running, sampled: Sampled) -> list[Answer]:
        """Passes on the new tokens [steps] of an answer -> the answer, if it ended."""
        wanted = running.answer.sampling.logprobs
        tokenizer = running.prompt.adapter.prompts.tokenizer
        texts, logprobs = [], []
        for step, token in enumerate(sampled.tokens.tolist()):
            if token < 0 or running.stream.finished:
                break
            running.tokens.append(token)
            texts.append(running.stream.push(token))
            if wanted is not None and not running.stream.stops_at(token):
                logprobs.append(_logprob(tokenizer, Sampled(*(x[step] for x in sampled)), wanted))
            if running.matcher and running.matcher.complete_after(token):
                texts.append(running.stream.close())
        at_limit = len(running.tokens) >= running.answer.sampling.max_new_tokens and not running.stream.finished
        if at_limit:
            texts.append(running.stream.close())
        self._prefix_cache.update(running.row, running.cached)
        running.answer.give(Piece("".join(texts), logprobs))
        return [self._end(running, "length" if at_limit else "stop")] if running.stream.finished else []

    def _end(self, running: Running, reason: str | None, error: EngineError | None = None) -> Answer:
        """Frees the slot. The row of the cache keeps its contents until it is needed."""
        if running.row is not None:
            self._prefix_cache.release(running.row)
        self.running.remove(running)
        if error:
            running.answer.fail(error)
        else:
            running.answer.finish(reason)
        return running.answer


def _logprob(tokenizer: PreTrainedTokenizerBase, sampled: Sampled, alternatives: int) -> TokenLogprob:
    def entry(token: int, logprob: float) -> Alternative:
        data = token_bytes(tokenizer, int(token))
        return Alternative(data.decode(errors="replace"), data, float(logprob))

    top = map(entry, sampled.top_tokens[:alternatives], sampled.top_logprobs[:alternatives])
    allowed = [each for each in top if each.logprob > -math.inf]
    return TokenLogprob(*entry(sampled.tokens, sampled.logprobs), allowed)


def chunk_size(left: int) -> int:
    """The size of the next chunk of a prompt of which so many positions are left."""
    fitting = [size for size in CHUNK_SIZES if size <= left]
    enough = next((size for size in CHUNK_SIZES if size >= left), None)
    return enough if enough is not None and (not fitting or enough - left <= MAX_PADDING) else fitting[-1]
