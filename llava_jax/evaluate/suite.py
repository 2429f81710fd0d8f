"""Answers and scores the benchmarks of a table with one command, and writes the table and a model card.

A benchmark has a folder of its own in --data, named as below, with the files that people download. Each is answered by
`predict`, in a process of its own, and scored by the rule of every toolkit that has one. The same command resumes.
"""

import argparse
import csv
import fnmatch
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from llava_jax.cli import Parser, UserError, printable, say, time_left, warn
from llava_jax.evaluate.benchmark import ScoreCommand
from llava_jax.evaluate.benchmarks import find
from llava_jax.evaluate.outcomes import SUFFIX, write_outcomes
from llava_jax.evaluate.report_page import TEMPLATES
from llava_jax.evaluate.score import read
from llava_jax.evaluate.tables import aligned
from llava_jax.files.writing import atomic_file

PARQUET = ("*.tsv", "*.parquet", "*/*.parquet", "*.json")


class Entry(NamedTuple):
    """A benchmark of a table, and the names of its files below its folder. Of several patterns the first one that any
    file has counts.

    Attributes:
      labels: () for those of `questions`; None: its server or a judge scores the answers.
      images: the folder of images.
      headline: the score in the table.
      options: of its `score` command, if that has options of its own: option -> pattern.
    """

    benchmark: str
    questions: Sequence[str] = PARQUET
    labels: Sequence[str] | None = ()
    images: str = "."
    headline: str = "score"
    options: dict[str, str] = {}
    folder: str = ""


SUITES = {
    "v1.5": (
        Entry("vqav2", ("llava_vqav2_*test-dev2015.jsonl", "llava_vqav2_*.jsonl"), None, "test2015"),
        Entry("gqa", ("llava_gqa_*.jsonl",), ("**/testdev_balanced_questions.json",), "data/images", "accuracy"),
        Entry("vizwiz", ("llava_test.jsonl",), None, "test"),
        Entry("scienceqa", ("llava_test_CQM-A.json",), None, "images/test", "IMG",
              {"--problems": "problems.json", "--splits": "pid_splits.json"}),
        Entry("textvqa", ("llava_textvqa_*.jsonl",), ("TextVQA_*_val.json",), "train_images", "accuracy"),
        Entry("pope", ("llava_pope_test.jsonl",), ("coco_pope_*.json", "coco/coco_pope_*.json"), "val2014", "f1"),
        Entry("mme", ("llava_mme.jsonl",), ("MME_Benchmark_release_version",), "MME_Benchmark_release_version",
              "perception", folder="MME"),
        Entry("mmbench", ("mmbench_dev_*.tsv",), headline="circular"),
        Entry("mmbench-cn", ("mmbench_dev_cn_*.tsv",), headline="circular", folder="mmbench_cn"),
        Entry("seed", ("llava-seed-bench.jsonl",), ("SEED-Bench.json",), headline="accuracy", folder="seed_bench"),
        Entry("llava-bench", ("questions.jsonl",), None, "images", folder="llava-bench-in-the-wild"),
        Entry("mm-vet", ("llava-mm-vet.jsonl",), None, "images"),
    ),
    "2026": (
        Entry("mmmu", ("*.tsv", "*/validation-*.parquet", "validation-*.parquet")), Entry("mmmu-pro"), Entry("mmstar"),
        Entry("ai2d"), Entry("chartqa", ("*.tsv", "*.parquet", "*/*.parquet", "test_*.json"), images="png"),
        Entry("docvqa", ("*.tsv", "validation-*.parquet", "DocVQA/validation-*.parquet", "val_*.json")),
        Entry("infovqa", ("*.tsv", "validation-*.parquet", "InfographicVQA/validation-*.parquet", "*val*.json")),
        Entry("ocrbench"),
        Entry("mathvista", ("*.tsv", "testmini-*.parquet", "*/testmini-*.parquet", "testmini.json")),
        Entry("realworldqa"), Entry("hallusionbench"), Entry("wilder", labels=None), Entry("pope", (
            "llava_pope_test.jsonl",), ("coco_pope_*.json", "coco/coco_pope_*.json"), "val2014", "f1"),
        Entry("mme", ("llava_mme.jsonl",), ("MME_Benchmark_release_version",), "MME_Benchmark_release_version",
              "perception", folder="MME"),
    ),
}  # fmt: skip


class Found(NamedTuple):
    """A benchmark whose files are there, or `missing`: what is not."""

    entry: Entry
    folder: Path
    questions: list[str]
    labels: list[str]
    missing: str = ""


def look(entry: Entry, data: Path) -> Found:
    folder = data / (entry.folder or entry.benchmark)
    questions = _files(folder, entry.questions)
    patterns = [*entry.options.values()] if entry.options else entry.labels or ()
    labels = questions if entry.labels == () else _files(folder, patterns)
    lacking = [] if questions else [" or ".join(entry.questions)]
    lacking += [] if labels or not patterns else [" or ".join(patterns)]
    if questions and PurePath(questions[0]).suffix in (".json", ".jsonl") and not (folder / entry.images).is_dir():
        lacking.append(f"folder {entry.images} of images")
    return Found(entry, folder, questions, labels, ", ".join(lacking) and f"{folder}: has no {', '.join(lacking)}")


def _files(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files of the first pattern that has any; of sheets that VLMEvalKit made smaller, the original ones."""
    for pattern in patterns:
        if found := sorted(map(str, folder.glob(pattern))):
            return [path for path in found if not fnmatch.fnmatch(path, "*_local.tsv")]
    return []


def scores_of(found: Found, answers: Path, outcomes: Path, partial: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a benchmark: its score by each rule, or why there is none. `partial` scores an incomplete set."""
    entry, benchmark = found.entry, find(found.entry.benchmark, "what")
    if entry.options:
        command: ScoreCommand = benchmark.score_commands[0]
        parser = Parser(prog="score")
        command.add_arguments(parser)
        named = [part for name, pattern in entry.options.items() for part in (name, str(found.folder / pattern))]
        named += ["--partial"] if partial else []
        scores, results = command.score(parser.parse_args(["--answers", str(answers), *named]))
        write_outcomes(outcomes / f"{benchmark.name}{SUFFIX}", results)
        yield _row(entry, "official", scores, scores.get(entry.headline))
        return
    if entry.labels is None:
        who = f"judge {benchmark.name}" if benchmark.judge else f"submission {benchmark.name}"
        yield {"benchmark": benchmark.name, "rule": "", "score": None, "note": f"answered; next: {who}"}
        return
    asked = found.questions if entry.labels else []  # they have images' names for outcomes, and other ids
    answered = None
    for rule in benchmark.rules or ("",):
        try:
            answered = answered or read(benchmark.name, str(answers), found.labels, asked, partial)
            scores, results = answered.score(rule or None)
        except UserError as error:  # such as a rule that needs another form of the labels
            yield {"benchmark": benchmark.name, "rule": rule, "score": None, "note": str(error)}
            continue
        if rule in ("", *list(benchmark.rules)[:1]):
            write_outcomes(outcomes / f"{benchmark.name}{SUFFIX}", results)
        yield _row(entry, rule or "official", scores, scores.get("score" if rule else entry.headline))


def _row(entry: Entry, rule: str, scores: dict[str, Any], value: Any) -> dict[str, Any]:
    counts = {name: scores.get(name) for name in ("interval", "total", "failed", "unparsed")}
    return {"benchmark": entry.benchmark, "rule": rule, "score": value, **counts, "note": scores.get("rule", ""),
            "scores": scores}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- tables

COLUMNS = ("benchmark", "rule", "score", "low", "high", "total", "failed", "unparsed", "note")


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    def cell(row: dict[str, Any], name: str) -> str:
        low_high = row.get("interval") or (None, None)
        value = {"low": low_high[0], "high": low_high[1]}.get(name, row.get(name))
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    return [list(COLUMNS), *([cell(row, name) for name in COLUMNS] for row in rows)]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    head, *body = ([text.replace("|", "\\|").replace("\n", " ") for text in row] for row in cells(rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)) + "\n"


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows(cells(rows))
    return content.getvalue()


def as_html(title: str, rows: Sequence[dict[str, Any]]) -> str:
    head, *lines = cells(rows)
    return TEMPLATES.get_template("suite.html").render(title=title, head=head, rows=lines)


def model_card(name: str, suite: str, rows: Sequence[dict[str, Any]]) -> str:
    """`README.md` of a model on the Hub, whose metadata has the scores (`model-index`)."""
    results = [
        {"task": {"type": "image-text-to-text"}, "dataset": {"name": row["benchmark"], "type": row["benchmark"]},
         "metrics": [{"type": "score", "name": f"{row['rule']} rule", "value": row["score"], "verified": False}]}
        for row in rows if row["score"] is not None
    ]  # fmt: skip
    metadata = {"pipeline_tag": "image-text-to-text", "model-index": [{"name": name, "results": results}]}
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {name}\n\nScores on the benchmarks of the table "
        f"{suite}, by the rules of several toolkits, with 95% intervals.\n\n{markdown(rows)}"
    )


def write(output: Path, name: str, suite: str, rows: Sequence[dict[str, Any]]) -> None:
    contents = {
        "results.json": json.dumps({"model": name, "suite": suite, "rows": rows}, indent=1) + "\n",
        "results.csv": as_csv(rows),
        "results.md": markdown(rows),
        "results.html": as_html(f"{name}: {suite}", rows),
        "README.md": model_card(name, suite, rows),
    }
    for file, content in contents.items():
        with atomic_file(output / file) as target:
            target.write(content.encode())


# -------------------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> None:
    args, of_predict = _parse(argv)
    entries = {entry.benchmark: entry for entry in SUITES[args.suite]}
    if unknown := set(args.benchmarks or ()) - entries.keys():
        known = ", ".join(entries)
        raise UserError(f"--benchmarks {min(unknown)}: is not in the table {args.suite}, which has {known}")
    found = [look(entry, Path(args.data)) for name, entry in entries.items() if name in (args.benchmarks or entries)]
    there = [one for one in found if not one.missing]
    for one in found:
        if one.missing:
            warn(f"{one.missing}; it is left out")
    if not there:
        raise UserError(f"{args.data}: has none of the benchmarks of {args.suite}; {found[0].missing}")
    if args.dry_run:
        say("\n".join(f"{one.entry.benchmark}: {', '.join(one.questions)}" for one in there))
        return
    for one in there if args.prompt else ():
        find(one.entry.benchmark, "what").asked_as(args.prompt)  # before the first is asked
    output, rows = Path(args.output), []
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for done, one in enumerate(there):  # the bar of each `predict` has the terminal
        left = f", {time_left((time.monotonic() - begun) / done * (len(there) - done))} left" if done else ""
        say(f"{done + 1}/{len(there)}{left}: {one.entry.benchmark}", file=sys.stderr)
        answers = output / f"{one.entry.benchmark}.jsonl"
        _predict(one, answers, of_predict)
        if answers.exists():  # on other hosts than the first it may not be
            rows += scores_of(one, answers, output / "outcomes", args.partial)
            write(output, args.name, args.suite, rows)
    if rows:
        print(printable(aligned([row[:-1] for row in cells(rows)], left=2)))
        for row in rows:
            if row["score"] is None:
                say(f"{row['benchmark']} {row['rule']}".rstrip() + f": {row['note']}")
        say(f"{output / 'README.md'}: {len(rows)} scores", file=sys.stderr)


def _predict(found: Found, answers: Path, options: Sequence[str]) -> None:
    images = found.folder / found.entry.images
    images = images if images.is_dir() else found.folder
    command = [sys.executable, "-m", "llava_jax.evaluate", "predict", found.entry.benchmark, f"--output={answers}",
               f"--images={images}", *options, "--questions", *found.questions]  # fmt: skip
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"{found.entry.benchmark}: predict ended with status {code}; the same command resumes")


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    tables = "\n".join(
        f"{suite}:\n"
        + "\n".join(f"  {e.folder or e.benchmark:<26}{', '.join([*e.questions, *(e.labels or ())])}" for e in entries)
        for suite, entries in SUITES.items()
    )
    epilog = f"""example:
  python -m llava_jax.evaluate suite 2026 --data benchmarks --checkpoint runs/finetune --output runs/finetune/suite

All other options, such as --checkpoint or --endpoint and --model, are those of predict.

Folders in --data and their files:
{tables}"""
    parser = Parser(prog="python -m llava_jax.evaluate suite", description=__doc__, epilog=epilog)
    add = parser.add_argument
    add("suite", choices=tuple(SUITES), help="a table of benchmarks")
    add("--data", required=True, metavar="DIR", help="the folder with one of each benchmark")
    add("--output", required=True, metavar="DIR", help="answers, outcomes for report, results.md, .csv, .json, .html "
        "and README.md, a model card")  # fmt: skip
    add("--benchmarks", nargs="+", metavar="BENCH", help="only these")
    add("--name", metavar="NAME", help="of the model in the table (default: the checkpoint's folder, or --model)")
    add("--dry-run", action="store_true", help="only report which files are there")
    args, of_predict = parser.parse_known_args(argv)
    args.partial = any(option.partition("=")[0] == "--limit" for option in of_predict)
    given = dict(zip(of_predict, of_predict[1:], strict=False))
    given |= dict(option.split("=", 1) for option in of_predict if option.startswith("--") and "=" in option)
    args.prompt = given.get("--prompt")
    args.name = args.name or given.get("--model") or PurePath(given.get("--checkpoint", "model").rstrip("/")).name
    return args, of_predict
