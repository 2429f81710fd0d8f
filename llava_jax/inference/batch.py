"""Continuous batching: between two dispatches, answers enter the slots of the running batch and leave them."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.data.features import TEXT
from llava_jax.inference.answer import Alternative, Answer, EngineError, Piece, TokenLogprob
from llava_jax.inference.constraints import Constraint, ConstraintFailed
from llava_jax.inference.decoding import Sampled, prompt_hash
from llava_jax.inference.detokenization import AnswerStream, token_bytes
from llava_jax.inference.prefix_cache import Held, LruIndex, PrefixCache, PreparedPrompt, common_length
from llava_jax.inference.programs import CHUNK_SIZES, PAGE, PIECE, PIECES, Programs, PromptChunk
from llava_jax.inference.scores import ScoreRules

STEPS = 4  # tokens a dispatch: clients read along, and other requests wait to enter
PREFILL_POSITIONS = CHUNK_SIZES[-1]  # of prompts, after which the running answers get tokens, too
STEPS_BETWEEN = 1  # tokens that they get while prompts are left: the time to the first token counts more
MAX_PADDING = 32  # positions of a chunk
PATIENCE = 16  # dispatches after a token that a constraint does not allow, in which only such answers get one token


@dataclasses.dataclass
class Running:
    """An answer in a slot."""

    answer: Answer
    stream: AnswerStream
    prompt_hash: int
    matcher: Constraint | None = None  # of an answer with a constraint
    doubt: int = 0  # dispatches before its tokens are guessed again, see `guesses`
    held: Held | None = None  # in the cache, once its prompt has begun
    done: int = 0  # positions of the prompt that the cache holds

    @property
    def prompt(self) -> PreparedPrompt:
        return self.answer.prompt

    @property
    def remaining(self) -> int:
        """Positions of the prompt that are not computed yet."""
        return len(self.prompt.tokens) - self.done

    @property
    def guesses(self) -> bool:
        """Whether tokens after the next one are generated as if all were allowed, and kept as long as they are.

        A token that is sampled from all of them is the one that is sampled from the allowed ones, if it is one of them;
        not with top-k, top-p and min-p, which depend on the others, as log probabilities do.
        """
        sampling = self.answer.sampling
        limited = sampling.temperature > 0 and (sampling.top_k, sampling.top_p, sampling.min_p) != (0, 1, 0)
        return self.matcher is None or not (limited or sampling.logprobs is not None)

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
        self._prefix_cache, self._tiles = PrefixCache(programs.pages, PAGE), LruIndex(programs.images)
        self.running: list[Running] = []
        self._waits_for_page = False  # an answer, between two tokens

    @property
    def full(self) -> bool:
        return len(self.running) == self._programs.slots

    @property
    def pages_used(self) -> int:
        """The number of pages of the cache that belong to running answers."""
        return self._prefix_cache.in_use

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
        while positions < PREFILL_POSITIONS and (prompts := self._next_prompts()):
            positions += sum(running.remaining for running in prompts)
            ended += self._prefill(prompts)
        begun = [running for running in self.running if running.tokens]
        others_wait = positions >= PREFILL_POSITIONS and len(begun) < len(self.running)
        return ended + self._decode(begun, STEPS_BETWEEN if others_wait else STEPS)

    def _next_prompts(self) -> list[Running]:
        """The next prompt, or several whose ends are computed in one dispatch, in no more positions than one by one;
        none if the next one has to wait for pages."""
        waiting = [running for running in self.running if not running.tokens]
        waiting.sort(key=lambda running: running.held is None)  # else one could hold pages and wait behind another
        chosen = self._joined(waiting) or waiting[:1]
        begun = list(itertools.takewhile(self._begin, chosen))
        return self._joined(begun) or begun[:1]  # again: one may have lost what it begins like

    def _joined(self, waiting: Sequence[Running]) -> list[Running]:
        """The next prompt and others with it, where that gives the same bits. A prompt that begins like one of these
        waits: it will find in the cache what both have in common."""
        joined, alone, free = [], 0, PIECES
        for running in waiting if self._programs.joins and len(waiting) > 1 else ():
            if not free:
                break
            contents, known = running.prompt.contents, running.done
            if running.held is None:
                known = self._prefix_cache.known(contents)
                if any(common_length(contents, other.prompt.contents) > known for other in joined):
                    continue
            sizes, pieces = chunks(len(contents) - known), -(-(len(contents) - known) // PIECE)
            if pieces <= free and self._programs.joins.issuperset(sizes):
                joined, alone, free = [*joined, running], alone + sum(sizes), free - pieces
            elif not joined:
                return []
        return joined if len(joined) > 1 and alone >= PIECES * PIECE else []

    def _begin(self, running: Running) -> bool:
        """Finds pages for a prompt, if it has none -> whether there are enough. Not before its turn: the prompt before
        it may begin in the same way. Not while an answer waits for a page either, which gets the next one."""
        if running.held:
            return True
        if self._waits_for_page:
            return False
        prompt = running.prompt
        longest = len(prompt.tokens) + running.answer.sampling.max_new_tokens
        placement = self._prefix_cache.begin(prompt.contents, longest)
        if placement is None:
            return False
        if placement.copy:
            self._programs.copy(*placement.copy)
        running.held = placement.held
        running.done = running.answer.prefix_tokens = len(placement.held.contents)
        return True

    def _prefill(self, prompts: Sequence[Running]) -> list[Answer]:
        """Computes the next chunk of a prompt, or all that is left of several. The end of a prompt gives a token."""
        B, T = shape = (1, chunk_size(prompts[0].remaining)) if len(prompts) == 1 else (PIECES, PIECE)
        ending = [running for running in prompts if running.remaining <= B * T]
        changed = [running for running in ending if running.answer.sampling.changes_scores]
        chunk = self._programs.new_chunk(shape, self._programs.new_rules(B) if changed else None)
        ended, computed, free = [], [], 0  # `computed`: prompts with their last pieces
        for running in prompts:
            starts = range(running.done, min(running.done + B * T, len(running.prompt.tokens)), T)
            if running in changed and (failed := self._set_rules(chunk.rules, free + len(starts) - 1, running)):
                ended += failed
                continue
            for b, start in enumerate(starts, free):
                self._set_piece(chunk, b, running, start, T)
            free += len(starts)
            computed.append((running, free - 1))
        if not computed:
            return ended
        report = any(running.answer.sampling.logprobs is not None for running, _ in computed)
        sampled = self._programs.prefill(chunk, report)
        if ending:
            sampled = jax.device_get(sampled)
        for running, b in computed:
            running.done = min(running.done + B * T, len(running.prompt.tokens))
            running.held.contents = running.cached
            if not running.remaining:
                ended += self._deliver(running, Sampled(*(x[b : b + 1] for x in sampled)))
        return ended

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

    def _set_piece(self, chunk: PromptChunk, b: int, running: Running, start: int, size: int) -> None:
        """Sets piece b to positions of a prompt. Encodes the tiles that are not cached."""
        prompt, patches, own = running.prompt, self._programs.image_tokens, slice(start, start + size)
        index = prompt.image_feature_index[own]
        features = np.minimum(index, TEXT)  # newlines stay
        for tile in np.unique(index[index >= 0] // patches):
            of_tile = np.flatnonzero(index // patches == tile)
            features[of_tile] = self._tile(prompt, tile) * patches + index[of_tile] % patches
        chunk.set(b, prompt.tokens[own], features, start, running.held.pages, prompt.adapter.index)
        chunk.sampling.set(b, running.answer.sampling, running.prompt_hash)

    def _tile(self, prompt: PreparedPrompt, tile: int) -> int:
        """The index of a tile in the cached features."""
        adapter = prompt.adapter
        index, known = self._tiles.find((prompt.digests[tile], adapter.version if adapter.own_projector else 0))
        if not known:
            self._programs.encode(prompt.tiles[tile], index, adapter.index)
        return index

    def _has_room(self, running: Running, steps: int) -> bool:
        """Whether an answer has a place for its next token. It gets those for `steps`, if there are enough pages."""
        held, length = running.held, len(running.prompt.tokens) + len(running.tokens)
        longest = len(running.prompt.tokens) + running.answer.sampling.max_new_tokens
        return self._prefix_cache.extend(held, min(length - 1 + steps, longest)) or length <= len(held.pages) * PAGE

    def _decode(self, begun: Sequence[Running], steps: int) -> list[Answer]:
        """Generates at most so many more tokens of answers -> those that ended. An answer without a page for them waits
        until another one ends."""
        having_room = [running for running in begun if self._has_room(running, steps)]
        self._waits_for_page = len(having_room) < len(begun)
        begun = having_room
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
            pages = running.held.pages
            slots.pages[slot, : len(pages)], slots.tokens[slot] = pages, running.tokens[-1]
            slots.positions[slot] = length + len(running.tokens) - 1
            longest = running.answer.sampling.max_new_tokens - 1 if running.guesses else len(running.tokens)
            slots.limits[slot] = min(length + longest, len(pages) * PAGE)
            running.doubt = max(0, running.doubt - 1)
            slots.adapters[slot] = running.prompt.adapter.index
            slots.endless[slot] = running.answer.sampling.ignore_eos
            slots.sampling.set(slot, running.answer.sampling, running.prompt_hash)
        report = any(running.answer.sampling.logprobs is not None for running in begun)
        if not any(running.guesses and not running.doubt for running in begun):
            steps = STEPS_BETWEEN
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
            if step and running.matcher and not running.matcher.allows(token):
                running.doubt = PATIENCE
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
        running.held.contents = running.cached
        running.answer.give(Piece("".join(texts), logprobs))
        return [self._end(running, "length" if at_limit else "stop")] if running.stream.finished else []

    def _end(self, running: Running, reason: str | None, error: EngineError | None = None) -> Answer:
        """Frees the slot. The pages of the cache keep their contents until they are needed."""
        if running.held:
            self._prefix_cache.end(running.held)
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


def chunks(left: int) -> list[int]:
    """The sizes of all its chunks."""
    sizes = []
    while left > 0:
        sizes.append(chunk_size(left))
        left -= sizes[-1]
    return sizes
