"""Chooses captions so that concepts are balanced, as CC3M was filtered for stage 1: 595K of 3M.

Noun phrases are counted, by the captions that they are in. Those of fewer than --least captions are dropped. Of each
other, from the rarest on, all captions are added, but of one that is in more than --most a random sample of these.
The same file, options and seed give the same output. Records are kept as they are; COCO's become {id, image, caption}.
"""

import argparse
import array
import itertools
import sys
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from llava_jax.cli import Parser, UserError, positive, say, track
from llava_jax.data.plan import permutation
from llava_jax.datagen.caption_files import read_captions
from llava_jax.datagen.captions import add_caption_arguments
from llava_jax.datagen.phrases import METHODS, SPACY_MODEL, Extract, extractor
from llava_jax.files.writing import atomic_list, write_json

EPILOG = """example:
  python -m llava_jax.datagen filter --captions cc3m.jsonl --output cc3m_balanced.jsonl --report coverage.json
"""
EXAMPLES = 20  # phrases in the report


class Index(NamedTuple):
    """Which phrases are in which captions: U phrases, from the rarest on, each with a run of captions.

    A phrase goes by 64 bits of its hash: one in 10^7 indices of a million phrases takes two for the same.
    """

    phrases: np.ndarray  # uint64[U]
    counts: np.ndarray  # int64[U], captions of each
    starts: np.ndarray  # int64[U], where its captions begin
    owners: np.ndarray  # int32[occurrences], captions in ascending order for each phrase
    captions: int

    def captions_of(self, phrase: int) -> np.ndarray:
        start = self.starts[phrase]
        return self.owners[start : start + self.counts[phrase]]


def key_of(phrase: str) -> int:
    return int.from_bytes(blake2b(phrase.encode(errors="surrogatepass"), digest_size=8).digest())


def build_index(phrases: Iterator[list[str]]) -> Index:
    """The index of the phrases of all captions."""
    keys, each = array.array("Q"), array.array("H")
    for found in phrases:
        keys.extend(map(key_of, found))
        each.append(len(found))
    owners = np.repeat(np.arange(len(each), dtype=np.int32), np.frombuffer(each, np.uint16) if each else 0)
    keys = np.frombuffer(keys, np.uint64) if keys else np.zeros(0, np.uint64)
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    del order
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(keys)])
    rarest_first = np.lexsort((keys[starts], counts))
    starts = starts[rarest_first]
    return Index(keys[starts], counts[rarest_first], starts, owners, len(each))


def choose(index: Index, least: int, most: int, seed: int) -> np.ndarray:
    """The captions that are added, bool[captions].

    As in the paper, the sample of a common phrase is one of all its captions, of which rarer phrases may have added
    some, or more than `most`.
    """
    chosen = np.zeros(index.captions, bool)
    for phrase in range(int(np.searchsorted(index.counts, least)), len(index.counts)):
        captions = index.captions_of(phrase)
        if len(captions) > most:
            captions = captions[permutation(len(captions), "filter", seed, int(index.phrases[phrase]))[:most]]
        chosen[captions] = True
    return chosen


def count_after(index: Index, chosen: np.ndarray) -> np.ndarray:
    """The chosen captions of each phrase, int64[U]."""
    until = np.r_[0, np.cumsum(chosen[index.owners])]
    return until[index.starts + index.counts] - until[index.starts]


def coverage(index: Index, chosen: np.ndarray, least: int) -> dict[str, Any]:
    """How many captions and phrases there were and are."""
    after = count_after(index, chosen)
    return {
        "captions": {"before": index.captions, "after": int(chosen.sum())},
        "unique phrases": {"before": len(index.counts), "after": int((after > 0).sum())},
        f"unique phrases in {least} captions or more": {
            "before": int((index.counts >= least).sum()),
            "after": int((after >= least).sum()),
        },
        "occurrences of phrases": {"before": len(index.owners), "after": int(after.sum())},
        "captions without a phrase": index.captions - len(np.unique(index.owners)),
        "phrases by captions": {"before": _histogram(index.counts), "after": _histogram(after)},
    }


def _histogram(counts: np.ndarray) -> dict[str, int]:
    """Phrases by how many captions they are in."""
    bounds = [1, 3, 10, 30, 100, 300, 1000, 10_000, 100_000, np.inf]
    bins = zip(itertools.pairwise(bounds), np.histogram(counts, bounds)[0].tolist(), strict=True)
    return {f"{low} to {high - 1}" if high < np.inf else f"{low} and more": count for (low, high), count in bins}


def summary(report: dict[str, Any]) -> Iterator[str]:
    """What a report says, for people."""
    yield f"noun phrases by {report['method']}"
    width = max(map(len, report))
    for name, value in report.items():
        if isinstance(value, int):
            yield f"{name:<{width}} {value:>10,}"
        elif isinstance(value, dict) and isinstance(value.get("after"), int):
            yield f"{name:<{width}} {value['before']:>10,} -> {value['after']:>10,}"


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    method, extract = extractor(args.phrases, args.workers)
    captions = track(read_captions(args.captions, args.keys, args.skip_bad), "counting noun phrases")
    index = build_index(extract(caption.text for caption in captions))
    chosen = choose(index, args.least, args.most, args.seed)
    if not chosen.any():
        raise UserError(f"{args.captions}: no noun phrase is in {args.least} captions or more: lower --least")
    settings = {name: getattr(args, name) for name in ("captions", "output", "least", "most", "seed")}
    report = {"method": method, "settings": settings, **coverage(index, chosen, args.least)}
    report["most common phrases"] = _write(args, index, chosen, extract)
    if args.report:
        write_json(args.report, report, ensure_ascii=False)
    say(*summary(report), f"{args.output}: {report['captions']['after']} captions", sep="\n", file=sys.stderr)


def _write(args: argparse.Namespace, index: Index, chosen: np.ndarray, extract: Extract) -> list[dict[str, Any]]:
    """Writes the chosen captions. Returns the most common phrases, which it finds in the first caption of each."""
    common = range(len(index.counts))[: -EXAMPLES - 1 : -1]
    after = count_after(index, chosen)
    first_in = {int(index.captions_of(phrase)[0]) for phrase in common}
    names = {}
    captions = read_captions(args.captions, args.keys, skip_bad=True, quiet=True)
    with atomic_list(args.output, lines=args.output.endswith(".jsonl")) as add:
        for number, caption in enumerate(track(captions, f"writing {args.output}", index.captions)):
            if number in first_in:
                names |= {key_of(phrase): phrase for phrase in next(extract([caption.text]))}
            if chosen[number]:
                add(caption.record)
    return [
        {
            "phrase": names[int(index.phrases[phrase])],
            "before": int(index.counts[phrase]),
            "after": int(after[phrase]),
        }
        for phrase in common
    ]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.datagen filter", description=__doc__, epilog=EPILOG)
    add_caption_arguments(parser)
    add = parser.add_argument
    add("--report", metavar="OUT", help="write how many captions and phrases there were and are to OUT, as JSON")
    add("--least", type=positive, default=3, metavar="N", help="captions that a phrase has to be in (3)")
    add("--most", type=positive, default=100, metavar="N", help="captions that are added for a phrase (100)")
    add("--phrases", default="auto", metavar="|".join((*METHODS, "MODEL")), help="noun phrases by a rule of stop-words "
        f"or by a model of spaCy (default: {SPACY_MODEL} if it is installed, else words)")  # fmt: skip
    add("--workers", type=positive, default=1, metavar="N", help="processes of spaCy (1)")
    return parser.parse_args(argv)
