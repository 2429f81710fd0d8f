"""Writes the samples and the rejects of a ledger in the order of the contexts, not in that of the answers."""

import collections
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import track
from llava_jax.data.samples import conversation
from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.duplicates import near_duplicates
from llava_jax.datagen.instructions import with_image
from llava_jax.datagen.parsing import Turns
from llava_jax.files.writing import atomic_list
from llava_jax.llm_api.ledger import ACCEPTED, Ledger

SAMPLES, REJECTS = "llava.json", "rejects.jsonl"
NEAR_DUPLICATE = "near-duplicate"
GOOD = (ACCEPTED, NEAR_DUPLICATE)  # verdicts on answers that are good by themselves


class Result(NamedTuple):
    """The result for a context: questions and answers, or the reason of its rejection with details."""

    context: Context
    reason: str  # ACCEPTED, or the reason of the rejection
    turns: Turns
    detail: str


class Counts(NamedTuple):
    contexts: int
    verdicts: dict[str, int]  # the number of contexts with each

    @property
    def missing(self) -> int:
        """Contexts without a verdict."""
        return self.contexts - sum(self.verdicts.values())


def write_outputs(ledger: Ledger, directory: Path, limit: int | None, seed: int) -> Counts:
    """Writes the samples and the rejects of those of the first `limit` contexts that have a verdict."""
    find_duplicates(ledger, limit)
    verdicts: collections.Counter[str] = collections.Counter()
    count = contexts.count(ledger.db, limit)
    with atomic_list(directory / SAMPLES, lines=False) as add, atomic_list(directory / REJECTS, lines=True) as reject:
        for result in track(read_results(ledger, limit), f"writing {directory / SAMPLES}", count):
            verdicts[result.reason] += 1
            if result.reason == ACCEPTED:
                add(_line(sample(result.context, result.turns, seed)))
            else:
                why = {"reason": result.reason} | ({"detail": result.detail} if result.detail else {})
                reject(_line({"id": result.context.id, "image": result.context.image, **why}))
    return Counts(count, dict(verdicts.most_common()))


def read_results(ledger: Ledger, limit: int | None = None) -> Iterator[Result]:
    """The results of those of the first `limit` contexts that have a verdict, in order."""
    for context in contexts.read(ledger.db, limit):
        if found := ledger.result(context.id):
            reason, value = found
            good = reason in GOOD
            yield Result(context, reason, tuple(map(tuple, value)) if good else (), "" if good else value)


def find_duplicates(ledger: Ledger, limit: int | None) -> None:
    """Rejects near-duplicates of the samples of earlier contexts, and accepts those that are none any more."""

    def read_good() -> Iterator[Result]:
        return (result for result in read_results(ledger, limit) if result.reason in GOOD)

    good = [(result.context.id, result.reason) for result in read_good()]
    texts = (" ".join(itertools.chain(*result.turns)) for result in read_good())
    duplicates = near_duplicates(track(texts, "looking for near-duplicates", len(good)))
    ledger.revise(
        (task, wanted)
        for i, (task, reason) in enumerate(good)
        if (wanted := NEAR_DUPLICATE if i in duplicates else ACCEPTED) != reason
    )


def sample(context: Context, turns: Turns, seed: int) -> dict[str, Any]:
    """A LLaVA sample. The image is before or after the first question, by seed and id."""
    (question, answer), *others = turns
    turns = [(with_image(question, seed, context.id), answer), *others]
    spoken = [said for turn in turns for said in zip(("user", "assistant"), turn, strict=True)]
    return {"id": context.id, "image": context.image, "conversations": conversation(spoken)}


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
