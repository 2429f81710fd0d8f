"""Finds every problem of a data set before step 0: in its structure, pictures, ids, texts and lengths."""

import argparse
import collections
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from etils import epath
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError, run, track
from llava_jax.data.conversation import IMAGE_TOKEN, Template, get_template
from llava_jax.data.images import load_image
from llava_jax.data.records import Record, local_data, scan
from llava_jax.data.sources import (
    ROLES,
    Fault,
    Sample,
    find_faults,
    parse_sample,
    record_value,
    sample_id,
)
from llava_jax.data.tokenization import IMAGE_TOKEN_INDEX, encode_sample, load_tokenizer

EPILOG = """example:
  python -m llava_jax.data.check --json data.json --images images \\
      --tokenizer vicuna-7b-v1.5 --template v1 --max-length 2048
"""
LLAMA_SPECIAL_TOKENS = ("<s>", "</s>")


class Problem(NamedTuple):
    """A line of the report. Kind `special-token` is a warning: it is tokenized as published, but seldom meant."""

    kind: str
    id: str
    detail: str

    def __str__(self) -> str:
        line = " ".join(f"{self.kind}, {self.id}, {self.detail}".split())
        return line.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Lengths:
    """How to measure a sample: in tokens of `template`, `image_tokens` for each image."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int
    maximum: int | None


def find_problems(
    json: epath.PathLike,
    images: epath.PathLike,
    special_tokens: Iterable[str] = LLAMA_SPECIAL_TOKENS,
    lengths: Lengths | None = None,
) -> Iterator[Problem]:
    """All problems of the samples in file `json`, whose pictures are in folder `images`."""
    samples = []
    seen: dict[str, Record] = {}
    for record in track(scan(local_data(json), json), "reading samples"):
        try:
            value = record_value(record)
        except UserError as error:
            yield Problem("structure", str(record.index), str(error))
            continue
        ident = sample_id(record, value)
        first = seen.setdefault(ident, record)
        if first is not record:
            yield Problem("duplicate-id", ident, f"{record.where} has the id of {first.where}")
        faults = list(find_faults(value))
        for fault in faults:
            yield Problem(fault.kind, ident, f"{record.where}: {fault.detail}")
        if not faults:
            sample = parse_sample(record)
            samples.append(sample)
            yield from _order_problems(sample, value)
            yield from _text_problems(sample, special_tokens)
    yield from _picture_problems(samples, epath.Path(images))
    if lengths:
        for sample in track(samples, "measuring lengths"):
            yield from _length_problems(sample, lengths)


def _order_problems(sample: Sample, value: dict) -> Iterator[Problem]:
    if ROLES[value["conversations"][0]["from"]] != "user":
        yield Problem("order", sample.id, "begins with an answer, which training drops")
    if len(sample.turns) % 2:
        yield Problem("order", sample.id, "ends with a question that has no answer")


def _text_problems(sample: Sample, special_tokens: Iterable[str]) -> Iterator[Problem]:
    for i, (role, text) in enumerate(sample.turns, 1):
        if role == "assistant" and not text.strip():
            yield Problem("empty-answer", sample.id, f"the answer to question {i // 2} is empty")
        for token in special_tokens:
            if token in text:
                yield Problem("special-token", sample.id, f"warning: the text of a {role} holds {token}")
    if not any(role == "assistant" for role, _ in sample.turns):
        yield Problem("nothing-learned", sample.id, "has no answer to learn from")


def _picture_problems(samples: list[Sample], folder: epath.Path) -> Iterator[Problem]:
    users = collections.defaultdict(list)
    for sample in samples:
        for name in dict.fromkeys(sample.images):
            users[name].append(sample.id)
    faults = _picture_faults([folder / name for name in users])
    for ids, fault in zip(users.values(), track(faults, "reading pictures", len(users)), strict=True):
        if fault:
            yield from (Problem(fault.kind, ident, fault.detail) for ident in ids)


def _picture_faults(paths: list[epath.Path], at_once: int = 256) -> Iterator[Fault | None]:
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        for start in range(0, len(paths), at_once):
            yield from pool.map(_picture_fault, paths[start : start + at_once])


def _picture_fault(path: epath.Path) -> Fault | None:
    if not path.exists():
        return Fault("missing-image", f"{path} does not exist")
    try:
        load_image(path)
    except UserError as error:
        return Fault("bad-image", str(error))
    return None


def _length_problems(sample: Sample, lengths: Lengths) -> Iterator[Problem]:
    try:
        ids = encode_sample(sample, lengths.template, lengths.tokenizer).input_ids
    except UserError:  # nothing to learn: already told
        return
    images = int((ids == IMAGE_TOKEN_INDEX).sum())
    length = len(ids) + images * (lengths.image_tokens - 1)
    if lengths.maximum is not None and length > lengths.maximum:
        parts = f"{len(ids) - images} of text, {images} images of {lengths.image_tokens}"
        yield Problem("too-long", sample.id, f"{length} tokens ({parts}) will be cut to {lengths.maximum}")


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if not epath.Path(args.images).is_dir():
        raise UserError(f"{args.images}: no such folder of pictures")
    lengths, special_tokens = None, LLAMA_SPECIAL_TOKENS
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
        special_tokens = [token for token in tokenizer.all_special_tokens if token != IMAGE_TOKEN]
        if args.template:
            lengths = Lengths(get_template(args.template), tokenizer, args.image_tokens, args.max_length)
    console = Console()
    kinds: collections.Counter[str] = collections.Counter()
    for problem in find_problems(args.json, args.images, special_tokens, lengths):
        kinds[problem.kind] += 1
        _report(problem, console)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{kinds.total()} problems: {counts}" if kinds else "no problems", file=sys.stderr)
    return 1 if kinds else 0


def _report(problem: Problem, console: Console) -> None:
    if console.is_terminal:
        kind, rest = str(problem).split(",", 1)
        console.print(Text.assemble((kind, "bold red"), f",{rest}"), soft_wrap=True)
    else:
        print(problem)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava_jax.data.check",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", required=True, metavar="F", help="LLaVA JSON or JSONL")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of its pictures")
    parser.add_argument("--tokenizer", metavar="DIR", help="a Hugging Face tokenizer directory, to measure lengths")
    parser.add_argument("--template", help="conversation template, such as v1")
    parser.add_argument("--max-length", type=int, metavar="N", help="report what is longer, in tokens")
    parser.add_argument("--image-tokens", type=int, default=576, metavar="P", help="tokens an image takes (576)")
    args = parser.parse_args(argv)
    if args.max_length is not None and not (args.tokenizer and args.template):
        parser.error("--max-length needs --tokenizer and --template")
    return args


if __name__ == "__main__":
    run(main)
