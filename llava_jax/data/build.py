"""Converts LLaVA JSON and a folder of images to shards of ArrayRecord, which TFDS and training read.

Image files are stored byte for byte. After an interruption the same command continues with the next shard and ends with
the same bytes. All paths may be on an object store (gs://...).
"""

import argparse
import collections
import io
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
from etils import epath

from llava_jax.cli import Parser, UserError, one_line, positive, run, say, short, track
from llava_jax.data.builder import describe, write_in_threads, write_on_beam
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.image_folder import image_path
from llava_jax.data.images import in_any_spelling
from llava_jax.data.options import add_options, open_image_folder, read_model, require_images, text_encoder
from llava_jax.data.parquet import ImageSource, ParquetImages
from llava_jax.data.published import PUBLISHED, Published, explain_missing, problems
from llava_jax.data.selection import images_of, open_json
from llava_jax.data.shards import MANIFEST, OFFSETS, TEXT, BadImage, Shard, line_of, read_manifest
from llava_jax.data.sources import Source
from llava_jax.files.lock import entries, hold
from llava_jax.files.writing import atomic_file, atomic_path

EPILOG = """example:
  python -m llava_jax.data.build --json llava_v1_5_mix665k.json --images playground/data \\
      --output mix665k --dataset mix665k
"""
SHARD_BYTES = 256 * 2**20
MAX_SHARDS = 512  # by default: each is an open file of every reading process
STAT_THREADS = 64  # they mostly wait
STATS_AT_ONCE = 1000


def build(
    source: Source,
    images: ImageSource,
    output: str,
    *,
    shards: int = 0,
    workers: int = 0,
    decode: bool = True,
    published: Published | None = None,
    encode: TextEncoder | None = None,
    beam: Any = None,
) -> None:
    """Builds a data set, or continues to.

    Args:
      images: the folder of images, see `image_folder.ImageFolder`.
      shards: the number of files; 0 makes files of about `SHARD_BYTES`, but at most `MAX_SHARDS`.
      workers: threads; 0 for one a core.
      decode: whether to decode all images, to find damaged ones.
      published: the published data set that `source` has to equal.
      encode: how training encodes samples; if given, their lengths are stored, too.
      beam: `PipelineOptions` to run it on Apache Beam.

    Raises:
      UserError: images are missing, damaged or outside the folder, the source isn't `published`, `output` holds
        something else, or another process builds it.
    """
    directory = epath.Path(output)
    with hold(directory):
        manifest = _read_manifest(directory, source.digest, shards)
        if manifest is None:
            manifest = _begin(directory, source, images, shards, published)
        if encode:
            _write_lengths(directory, source, encode)
        planned = _shards(manifest, output, images, decode)
        bad = write_on_beam(planned, beam) if beam else write_in_threads(planned, workers)
        if not bad:
            describe(planned, published.name if published else "custom")
    if bad:
        _refuse(bad)


def _read_manifest(directory: epath.Path, digest: str, shards: int) -> dict[str, Any] | None:
    """The plan of an earlier start; None without one."""
    file = directory / MANIFEST
    if not file.exists():
        if entries(directory):
            raise UserError(f"{directory}: exists and holds no built data set; choose another")
        return None
    manifest = read_manifest(file)
    if manifest["digest"] != digest:
        raise UserError(f"{directory}: is built from other samples; remove it or choose another")
    if shards and min(shards, manifest["samples"]) != manifest["shards"]:
        raise UserError(f"{directory}: has {manifest['shards']} shards, not {shards}; remove it or choose another")
    for leftover in directory.glob("*.partial"):
        leftover.unlink(missing_ok=True)
    return manifest


def _begin(
    directory: epath.Path, source: Source, images: ImageSource, shards: int, published: Published | None
) -> dict[str, Any]:
    """Checks that all images exist, and writes the texts and the manifest. From then on a build can be resumed."""
    uses: collections.Counter[str] = collections.Counter()
    users: dict[str, str] = {}  # the id of the first sample with each image
    text_only = 0
    for sample in track(source, "reading samples"):
        uses.update(sample.images)
        for name in sample.images:
            users.setdefault(name, sample.id)
        text_only += not sample.images
    if published and (found := "; ".join(problems(published, epath.Path(images), len(source), text_only))):
        raise UserError(f"not {published.name} as published (without --dataset any is built): {found}")
    size = _total_bytes(images, uses, users)
    manifest = {
        "digest": source.digest,
        "samples": len(source),
        "samples_without_images": text_only,
        "images": uses.total(),
        "shards": min(shards or min(-(-size // SHARD_BYTES) or 1, MAX_SHARDS), len(source)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write_texts(directory, source)
    with atomic_file(directory / MANIFEST) as file:
        file.write(json.dumps(manifest).encode())  # as TFDS writes it
    return manifest


def _total_bytes(images: ImageSource, uses: collections.Counter[str], users: Mapping[str, str]) -> int:
    """The bytes of the images, each as often as it is used. Raises `UserError` if any is missing."""
    if isinstance(images, ParquetImages):
        return sum(file.stat().st_size for file in images.files.values())
    _refuse_names(images, users)
    sizes = _sizes(images, list(uses))
    if missing := {name: users[name] for name, size in sizes.items() if size is None}:
        raise UserError(
            f"{'; '.join(explain_missing(epath.Path(images), missing))}. Put them there, or let "
            "llava_jax.data.check --fix write the good samples, and build from these"
        )
    return sum(sizes[name] * count for name, count in uses.items())


def _refuse_names(images: epath.PathLike, users: Mapping[str, str]) -> None:
    """Raises `UserError` if image names, with the ids of samples that use them, leave their folder."""
    faults = []
    for name, user in users.items():
        try:
            image_path(images, name)
        except UserError as error:
            faults.append(f"sample {short(user)}: {error}")
    if faults:
        more = f" ({len(faults) - 1:,} other names have such faults)" if faults[1:] else ""
        raise UserError(f"{faults[0]}{more}")


def _sizes(images: epath.PathLike, names: Sequence[str]) -> dict[str, int | None]:
    """The bytes of each image; None if it does not exist."""

    def sizes(start: int) -> list[int | None]:
        return [_size(image_path(images, name)) for name in names[start : start + STATS_AT_ONCE]]

    starts = range(0, len(names), STATS_AT_ONCE)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        found = track(pool.map(sizes, starts), f"looking for images, {STATS_AT_ONCE} at once", len(starts))
        return dict(zip(names, itertools.chain.from_iterable(found), strict=True))


def _size(path: epath.Path) -> int | None:
    try:
        return in_any_spelling(lambda file: file.stat().length, path)
    except (OSError, ValueError):  # ValueError where the name holds a null byte
        return None


def _write_texts(directory: epath.Path, source: Source) -> None:
    with atomic_path(directory / TEXT) as texts, atomic_path(directory / OFFSETS) as offsets:
        ends = [0]
        with open(texts, "wb") as file:
            for sample in track(source, "writing texts"):
                file.write(line_of(sample))
                ends.append(file.tell())
        with open(offsets, "wb") as file:
            np.save(file, np.array(ends, np.int64))


def _write_lengths(directory: epath.Path, source: Source, encode: TextEncoder) -> None:
    """Measures all samples and writes the lengths as the cache has them: opening the data set adopts them."""
    from llava_jax.data.lengths import lengths_name, measure_once, stored

    encoded = EncodedSource(source, encode)
    path = directory / f"{lengths_name(encoded)}.npz"
    if path.exists():
        return
    lengths = measure_once(encoded)
    with atomic_path(path) as file, open(file, "wb") as target:
        np.savez(target, lengths=stored(encoded, lengths))


def _shards(manifest: dict[str, Any], output: str, images: ImageSource, decode: bool) -> list[Shard]:
    """The shards of a manifest, with equal numbers of samples."""
    with (epath.Path(output) / OFFSETS).open("rb") as file:
        offsets = np.load(io.BytesIO(file.read()))
    count = manifest["shards"]
    bounds = [len(offsets[:-1]) * index // count for index in range(count + 1)]
    return [
        Shard(output, images, index, count, int(offsets[start]), int(offsets[stop]), stop - start, decode)
        for index, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _refuse(bad: list[BadImage]) -> NoReturn:
    for ident, detail in sorted(bad):
        say(one_line(f"bad-image, {short(ident)}, {detail}"))
    raise UserError(
        f"{len(bad)} images cannot be read (listed above); the other shards are kept: replace the images and run "
        "the same command, or let llava_jax.data.check --fix write the good samples, and build from these"
    )


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    folder = open_image_folder(args)
    source = open_json(args.json, folder)
    images = images_of(source, folder)
    if args.dataset and isinstance(images, ParquetImages):
        raise UserError(f"--dataset {args.dataset} is published as JSON and a folder, not as Parquet: leave it out")
    settings = {"max_length": args.max_length, "image_position": args.image_position}
    build(
        source,
        images,
        args.output.rstrip("/"),
        shards=args.shards,
        workers=args.workers,
        decode=not args.no_decode,
        published=next((known for known in PUBLISHED if known.name == args.dataset), None),
        encode=text_encoder(args, **settings) if args.tokenizer else None,
        beam=_beam_options(args.beam) if args.beam else None,
    )
    say(f"{args.output}: built; train on it with --config.data.built={args.output}", file=sys.stderr)


def _beam_options(options: str) -> Any:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("--beam needs Apache Beam: pip install 'llava_jax[beam]'") from None
    return PipelineOptions([f"--{word}" for word in options.split(",")])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.data.build", description=__doc__, epilog=EPILOG)
    add_options(parser, json={}, images={"required": False})
    add = parser.add_argument
    add("--output", required=True, metavar="D",
        help="directory of the data set: a new one, or one whose build is continued")  # fmt: skip
    add("--dataset", choices=[known.name for known in PUBLISHED],
        help="check that the data is the complete published data set")  # fmt: skip
    add("--shards", type=positive, default=0, metavar="N",
        help="default: one for each 256 MiB of images, at most 512")  # fmt: skip
    add("--workers", type=positive, default=0, metavar="N", help="threads (default: one a core)")
    add("--no-decode", action="store_true",
        help="do not decode images to find damaged ones (data.check does that, too)")  # fmt: skip
    tokenizer = {"help": "store lengths: training with this tokenizer and the settings below does not measure them"}
    add_options(parser, checkpoint={}, tokenizer=tokenizer, template={}, max_length={}, image_position={})
    add_options(parser, image_tokens={}, image_size={}, anyres={})
    add("--beam", metavar="OPTIONS",
        help="options to write on Apache Beam, such as runner=DataflowRunner,project=P,region=R")  # fmt: skip
    args = parser.parse_args(argv)
    require_images(parser, args)
    read_model(args)
    if args.template and not args.tokenizer:
        parser.error("--template needs --tokenizer")
    return args


if __name__ == "__main__":
    run(main)
