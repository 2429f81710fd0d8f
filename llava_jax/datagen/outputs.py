"""What a ledger gives: the samples and the rejects, in the order of the contexts, whatever order answers came in."""

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import track
from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.duplicates import near_duplicates
from llava_jax.datagen.instructions import with_image
from llava_jax.datagen.parsing import Turns
from llava_jax.files.writing import atomic_list
from llava_jax.llm_api.ledger import ACCEPTED, Ledger

SAMPLES, REJECTS = "llava.json", "rejects.jsonl"
NEAR_DUPLICATE = "near-duplicate"
JUDGED = (ACCEPTED, NEAR_DUPLICATE)  # the verdicts of answers that are good by themselves


class Result(NamedTuple):
    """How a context ended: with questions and answers, or rejected for a reason, of which `detail` tells more."""

    context: Context
    reason: str  # ACCEPTED, or why not
    turns: Turns
    detail: str


class Counts(NamedTuple):
    contexts: int
    verdicts: dict[str, int]  # ACCEPTED and the reasons of rejections: how many

    @property
    def missing(self) -> int:
        """Contexts without a verdict."""
        return self.contexts - sum(self.verdicts.values())


def write_outputs(ledger: Ledger, directory: Path, limit: int | None, seed: int) -> Counts:
    """Writes the samples and the rejects among the first `limit` contexts, of those that have a verdict."""
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
    """Of the first `limit` contexts, in their order, those that have a verdict."""
    for context in contexts.read(ledger.db, limit):
        if found := ledger.result(context.id):
            reason, value = found
            good = reason in JUDGED
            yield Result(context, reason, tuple(map(tuple, value)) if good else (), "" if good else value)


def find_duplicates(ledger: Ledger, limit: int | None) -> None:
    """Rejects what says nearly the same as the sample of an earlier context; undone by itself where that is none."""
    judged = [(result.context.id, result.reason) for result in read_results(ledger, limit) if result.reason in JUDGED]
    texts = (
        " ".join(text for turn in result.turns for text in turn)
        for result in read_results(ledger, limit)
        if result.reason in JUDGED
    )
    duplicates = near_duplicates(track(texts, "looking for near-duplicates", len(judged)))
    ledger.revise(
        (task, wanted)
        for i, (task, reason) in enumerate(judged)
        if (wanted := NEAR_DUPLICATE if i in duplicates else ACCEPTED) != reason
    )


def sample(context: Context, turns: Turns, seed: int) -> dict[str, Any]:
    """LLaVA's: the picture stands before or after the first question, by seed and id."""
    values = [text for turn in turns for text in turn]
    values[0] = with_image(values[0], seed, context.id)
    roles = ("human", "gpt")
    conversation = [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": context.id, "image": context.image, "conversations": conversation}


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
