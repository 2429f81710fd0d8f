"""How fast, and in how much memory, instruction data is asked for: the command against a scripted server.

The server is a process of its own, answers after --latency seconds and takes what comes, or so many requests a minute.
Contexts are COCO's files, made here: 5 captions and 7 boxes with outlines a picture.

  rate    answers a second from the first request to the last answer, beside concurrency / latency, which is ideal;
          with --requests-a-minute answers in --minutes, beside what the server takes in that time
  afterwards  seconds from the last answer to the end: near-duplicates, samples, rejects and the report
  memory  the most that the command had in memory (resident), reading the files and writing all that it writes included
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(os.fspath(ROOT / "tests" / "support"))

from scripted_llm import ScriptedLLM  # noqa: E402, the server that the tests ask: its folder has to be on the path first

THINGS = ("person", "dog", "cat", "bus", "kite", "bench", "cup", "umbrella")
PLACES = ("street", "beach", "park", "kitchen", "field", "station")
WORDS = (
    "the a man woman dog looks at stands near with his her red old large small train table window light behind and "
    "because it is likely that they wait for someone who carries bag under tree while children play"
)
ANSWER_WORDS = 150


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/datagen.py --contexts 20000\n"
        "         python benchmarks/datagen.py --contexts 5000 --requests-a-minute 600 --window sliding --minutes 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--contexts", type=int, default=10_000)
    add("--concurrency", type=int, default=64)
    add("--latency", type=float, default=0.2, help="of the server, in seconds (default: %(default)s)")
    add("--requests-a-minute", type=float, default=0, help="that the server takes (default: all)")
    add("--window", choices=("bucket", "fixed", "sliding"), default="bucket", help="how the server counts them")
    add("--minutes", type=float, default=3, help="measured with --requests-a-minute (default: %(default)s)")
    add("--folder", type=Path, help="where files are made and kept (default: a temporary one)")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return asyncio.run(serve(args))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_contexts(folder, args.contexts)
        return measure(folder, args)


def measure(folder: Path, args: argparse.Namespace) -> int:
    serving = subprocess.Popen([sys.executable, *sys.argv, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(serving.stdout.readline())
        output = Path(tempfile.mkdtemp(dir=folder, prefix="out-"))
        command = [
            sys.executable, "-m", "llava_jax.datagen", "reasoning", "--captions", folder / "captions.json",
            "--instances", folder / "instances.json", "--images", folder / "images", "--output", output,
            "--base-url", f"http://127.0.0.1:{port}/v1", "--model", "m", "--concurrency", args.concurrency,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": os.fspath(ROOT)}
        process = subprocess.Popen(list(map(str, command)), env=environment)
        if args.requests_a_minute:
            stop_after(process, output / "ledger.sqlite", 60 * args.minutes)
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.time()
    finally:
        serving.terminate()
    db = sqlite3.connect(output / "ledger.sqlite")
    begin, end, answers, seconds = db.execute(
        "SELECT MIN(sent), MAX(finished), SUM(state = 'answered'), TOTAL(finished - sent) FROM requests"
    ).fetchone()
    if args.requests_a_minute:
        taken = db.execute(
            "SELECT COUNT(*) FROM requests WHERE state = 'answered' AND finished < ?", [begin + 60 * args.minutes]
        ).fetchone()[0]
        possible = args.requests_a_minute * args.minutes
        refused = db.execute("SELECT COUNT(*) FROM requests WHERE state = 'failed'").fetchone()[0]
        print(f"rate: {taken} answers in {args.minutes:g} minutes, {taken / possible:.1%} of {possible:g}; "
              f"{refused} refusals")  # fmt: skip
    else:
        ideal = args.concurrency / args.latency
        print(f"rate: {answers} answers in {end - begin:.1f} s, {answers / (end - begin):.0f} a second, "
              f"{answers / (end - begin) / ideal:.1%} of {ideal:.0f}; {seconds / answers:.3f} s an answer")  # fmt: skip
    print(f"afterwards: {ended - end:.0f} s for near-duplicates, the files, and the report unless it was stopped")
    print(f"memory: {usage.ru_maxrss / 1024:.0f} MiB; CPU: {usage.ru_utime + usage.ru_stime:.0f} s")
    return 0 if args.requests_a_minute else os.waitstatus_to_exitcode(status)


def stop_after(process: subprocess.Popen, ledger: Path, seconds: float) -> None:
    """Sends SIGTERM so many seconds after the first answer."""
    answered = False
    while process.poll() is None and not answered:
        time.sleep(0.1)
        if ledger.exists():
            try:
                answered = bool(sqlite3.connect(ledger).execute("SELECT MAX(finished) FROM requests").fetchone()[0])
            except sqlite3.OperationalError:  # no tables yet, or it is being filled
                continue
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)


# ------------------------------------------------------------------------------------------------------------ server


def reply(body: dict[str, Any]) -> str:
    """Words that depend on the prompt, in the form of a reasoning."""
    words = random.Random(body["messages"][-1]["content"]).choices(WORDS.split(), k=ANSWER_WORDS)
    return f"Question:\nWhy does the person wait?\n===\nAnswer:\nThe person {' '.join(words)}."


async def serve(args: argparse.Namespace) -> int:
    server = ScriptedLLM(
        reply=reply, latency=args.latency, requests_a_minute=args.requests_a_minute, window=args.window
    )
    listening = await server.listen()
    print(server.port, flush=True)
    await listening.serve_forever()
    return 0


# ---------------------------------------------------------------------------------------------------------- contexts


def make_contexts(folder: Path, count: int) -> None:
    """COCO's two files of `count` pictures, and the pictures, which are one and the same, in `folder`."""
    if (folder / "instances.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 480)).save(folder / "images" / name(0))
    for i in range(1, count):
        (folder / "images" / name(i)).symlink_to(name(0))
    categories = [{"id": i, "name": thing} for i, thing in enumerate(THINGS)]
    write(folder / "captions.json", {"images": pictures(count), "annotations": captions(count)})
    write(folder / "instances.json", {"annotations": boxes(count), "categories": categories})


def name(i: int) -> str:
    return f"{i:012}.jpg"


def pictures(count: int) -> Iterator[dict[str, Any]]:
    for i in range(count):
        yield {"id": i, "file_name": name(i), "width": 640, "height": 480}


def captions(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for i in range(5 * count):
        caption = f"A {rng.choice(THINGS)} and a {rng.choice(THINGS)} in a {rng.choice(PLACES)} on day {i % count}."
        yield {"id": i, "image_id": i % count, "caption": caption}


def boxes(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(1)
    for i in range(7 * count):
        box = [round(rng.uniform(0, 300), 2) for _ in range(4)]
        outline = [round(rng.uniform(0, 480), 2) for _ in range(50)]
        yield {"id": i, "image_id": i % count, "category_id": i % len(THINGS), "bbox": box, "segmentation": [outline]}


def write(path: Path, lists: dict[str, Any]) -> None:
    with path.open("w") as file:
        file.write('{"info": {"year": 2026}')
        for key, values in lists.items():
            file.write(f', "{key}": [')
            for i, value in enumerate(values):
                file.write((", " if i else "") + json.dumps(value))
            file.write("]")
        file.write("}")


if __name__ == "__main__":
    sys.exit(main())
