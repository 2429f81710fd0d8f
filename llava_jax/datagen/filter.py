"""Selects captions so that concepts are balanced, as the paper filtered CC3M for stage 1: 595K of 3M.

The captions of each noun phrase are counted. Phrases in fewer than --least captions are dropped. For each other phrase,
from the rarest on, all its captions are added, or a random sample of --most if it has more.
The same file, options and seed give the same output. Records are copied; COCO's become {id, image, caption}.
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
    """The captions of each of U phrases, from the rarest on.

    64 bits of its hash stand for a phrase: one in 10^7 indices of a million phrases takes two phrases for one.
    """

    phrases: np.ndarray  # uint64[U]
    counts: np.ndarray  # int64[U], number of captions
    starts: np.ndarray  # int64[U], index of the first caption in `owners`
    owners: np.ndarray  # int32[occurrences], the captions of each phrase in ascending order
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
    owners = np.repeat(np.arange(len(each), dtype=np.int32), np.array(each))
    keys = np.array(keys)
    order = np.argsort(keys, kind="stable")
    unique, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    rarest_first = np.lexsort((unique, counts))
    return Index(unique[rarest_first], counts[rarest_first], starts[rarest_first], owners[order], len(each))


def select(index: Index, least: int, most: int, seed: int) -> np.ndarray:
    """The selected captions, bool[captions].

    As in the paper, a common phrase samples from all its captions, whichever rarer phrases have added already.
    """
    selected = np.zeros(index.captions, bool)
    for phrase in range(int(np.searchsorted(index.counts, least)), len(index.counts)):
        captions = index.captions_of(phrase)
        if len(captions) > most:
            captions = captions[permutation(len(captions), "filter", seed, int(index.phrases[phrase]))[:most]]
        selected[captions] = True
    return selected


def count_after(index: Index, selected: np.ndarray) -> np.ndarray:
    """The number of selected captions of each phrase, int64[U]."""
    until = np.r_[0, np.cumsum(selected[index.owners])]
    return until[index.starts + index.counts] - until[index.starts]


def coverage(index: Index, selected: np.ndarray, least: int) -> dict[str, Any]:
    """The numbers of captions and phrases before and after."""
    after = count_after(index, selected)
    return {
        "captions": {"before": index.captions, "after": int(selected.sum())},
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
    """The number of phrases by their number of captions."""
    bounds = [1, 3, 10, 30, 100, 300, 1000, 10_000, 100_000, np.inf]
    bins = zip(itertools.pairwise(bounds), np.histogram(counts, bounds)[0].tolist(), strict=True)
    return {f"{low} to {high - 1}" if high < np.inf else f"{low} and more": count for (low, high), count in bins}


def summary(report: dict[str, Any]) -> Iterator[str]:
    """The lines of a report."""
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
    captions = read_captions(args.captions, args.keys, args.skip_bad, show="counting noun phrases")
    index = build_index(extract(caption.text for caption in captions))
    selected = select(index, args.least, args.most, args.seed)
    if not selected.any():
        raise UserError(f"{args.captions}: no noun phrase is in {args.least} captions or more: lower --least")
    settings = {name: getattr(args, name) for name in ("captions", "output", "least", "most", "seed")}
    report = {"method": method, "settings": settings, **coverage(index, selected, args.least)}
    report["most common phrases"] = _write(args, index, selected, extract)
    if args.report:
        write_json(args.report, report, ensure_ascii=False)
    say(*summary(report), f"{args.output}: {report['captions']['after']} captions", sep="\n", file=sys.stderr)


def _write(args: argparse.Namespace, index: Index, selected: np.ndarray, extract: Extract) -> list[dict[str, Any]]:
    """Writes the selected captions. Returns the most common phrases, found in the first caption of each."""
    common = range(len(index.counts))[: -EXAMPLES - 1 : -1]
    after = count_after(index, selected)
    first_in = {int(index.captions_of(phrase)[0]) for phrase in common}
    names = {}
    captions = read_captions(args.captions, args.keys, skip_bad=True, quiet=True)
    with atomic_list(args.output, lines=args.output.endswith(".jsonl")) as add:
        for number, caption in enumerate(track(captions, f"writing {args.output}", index.captions)):
            if number in first_in:
                names |= {key_of(phrase): phrase for phrase in next(extract([caption.text]))}
            if selected[number]:
                add(caption.record)
    return [
        {"phrase": names[int(index.phrases[phrase])], "before": int(index.counts[phrase]), "after": int(after[phrase])}
        for phrase in common
    ]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.datagen filter", description=__doc__, epilog=EPILOG)
    add_caption_arguments(parser)
    add = parser.add_argument
    add("--report", metavar="OUT", help="write the numbers of captions and phrases before and after to OUT, as JSON")
    add("--least", type=positive, default=3, metavar="N", help="drop phrases in fewer captions (3)")
    add("--most", type=positive, default=100, metavar="N", help="captions to add for a phrase (100)")
    add("--phrases", default="auto", metavar="|".join((*METHODS, "MODEL")), help="noun phrases by a rule of stop-words "
        f"or by a model of spaCy (default: {SPACY_MODEL} if it is installed, else words)")  # fmt: skip
    add("--workers", type=positive, default=1, metavar="N", help="processes of spaCy (1)")
    return parser.parse_args(argv)
