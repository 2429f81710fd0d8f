"""How far two judges agree about the same answers: a local model and the one of published reviews, for instance.

Files are what `judge` writes, or reviews in the original's form. Judgements are grades (`grade`), pairs of scores
(`tuple`: the model's in percent of the reference's), or words (`content`), such as a verdict or a letter.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_jax.cli import Parser, UserError, say, warn
from llava_jax.evaluate.answers import answer_lines, question_id
from llava_jax.evaluate.benchmarks.llava_bench_reviews import parse_scores
from llava_jax.evaluate.lines import Line
from llava_jax.llm_api.thinking import after_thinking

EPILOG = """example:
  python -m llava_jax.evaluate agreement reviews.gpt-4-0314.jsonl reviews.llama-3.jsonl

`same` is the share of equal judgements in percent, and `kappa` (Cohen's) the same beyond chance. For numbers: `pearson`
and `spearman`, their correlation and that of their ranks; `difference` is the second mean less the first."""


def judgement(line: Line) -> float | str | None:
    """The number or the word of a judgement; None if it failed."""
    value = line.value
    content = after_thinking(str(value.get("content", ""))) or ""
    scores = value.get("tuple") or parse_scores(content)
    if scores:
        reference, model = scores
        return 100 * model / reference if reference > 0 and model >= 0 else None
    if "grade" in value:
        return float(value["grade"]) if float(value["grade"]) >= 0 else None
    return content.strip().strip(".").lower() or None


def agreement(first: Sequence[Any], second: Sequence[Any]) -> dict[str, Any]:
    """The measures for judgements of the same answers, all numbers or all words."""
    same = float(np.mean([a == b for a, b in zip(first, second, strict=True)]))
    counts = [Counter(first), Counter(second)]
    chance = sum(counts[0][value] * counts[1][value] for value in counts[0]) / len(first) ** 2
    found = {"total": len(first), "same": round(100 * same, 2),
             "kappa": round((same - chance) / (1 - chance), 4) if chance < 1 else None}  # fmt: skip
    if all(isinstance(value, float) for value in (*first, *second)):
        from scipy.stats import rankdata

        def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
            return round(float(np.corrcoef(a, b)[0, 1]), 4) if a.std() and b.std() else None

        a, b = np.array(first), np.array(second)
        found |= {"pearson": correlation(a, b), "spearman": correlation(rankdata(a), rankdata(b)),
                  "difference": round(float((b - a).mean()), 4)}  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    files = [{_key(line): judgement(line) for line in answer_lines(path)} for path in args.files]
    shared = [key for key in files[0] if key in files[1]]
    known = [key for key in shared if None not in (files[0][key], files[1][key])]
    if not known:
        raise UserError(f"{args.files[1]}: has no judgement of an answer that {args.files[0]} judges")
    if lacking := len(files[0].keys() | files[1].keys()) - len(known):
        warn(f"{lacking} answers have no judgement in one of the files; they are left out")
    found = agreement([files[0][key] for key in known], [files[1][key] for key in known])
    say(json.dumps(found) if args.json else "\n".join(f"{name:<12}{value}" for name, value in found.items()))


def _key(line: Line) -> tuple[str, ...]:
    return question_id(line), *(str(line.value.get(name, "")) for name in ("category", "swapped", "round_id"))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate agreement", description=__doc__, epilog=EPILOG)
    parser.add_argument("files", nargs=2, metavar="F", help="judgements of the same answers by two judges")
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    return parser.parse_args(argv)
