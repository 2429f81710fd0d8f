"""Conversions at full size beside `cp`: how long, and in how much memory.

Writes a LLaVA of Hugging Face's layout with random bfloat16 weights in files of 5 GB, copies it, imports it, exports
it, and compares every tensor that comes back bit for bit. Each command is a process of its own; its time includes the
disk's (`sync`). Run as root, it makes the system forget before each what was read before. Memory is the largest that
the system counts as the process's (resident set), pages of mapped files included, and the largest of its own
(anonymous) pages, which no system can take away from it. Needs twice the model's size of disk: 28 GB for 7B, 54 GB for
13B; what is no longer needed is deleted at once. With --base-dtype the import quantizes the linear layers of the
decoder, which come back dequantized.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava_jax import cli
from llava_jax.convert.hf_text import write_text
from llava_jax.convert.layouts import EXPORT_PREFIXES
from llava_jax.convert.names import entries_of
from llava_jax.convert.outgoing import Tensor, write_shards
from llava_jax.convert.tensors import open_directory
from llava_jax.models.config import PRESETS, LlavaConfig
from llava_jax.models.llava import abstract_params
from llava_jax.models.quantized import PARTS

BLOCK = np.random.default_rng(0).integers(0, 2**16, 2**24 + 11, np.uint16)  # random numbers, taken again and again
TICK = 0.05  # seconds between looks at a process's memory


class Run(NamedTuple):
    """Of a command."""

    seconds: float
    resident: int  # bytes
    anonymous: int  # bytes


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where a command fails, or where tensors come back otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/convert.py --directory /scratch --model llava-v1.5-7b",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--directory", type=Path, required=True, help="scratch space; what is written there is removed")
    parser.add_argument("--model", choices=PRESETS, default="llava-v1.5-7b")
    parser.add_argument("--layers", type=int, help="of the decoder, fewer than it has: shows that the benchmark runs")
    parser.add_argument("--base-dtype", choices=list(PARTS), default="", help="of the import")
    args = parser.parse_args(argv)

    scratch = args.directory / f"convert-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        return compare(scratch, preset(args.model, args.layers), args.base_dtype)
    finally:
        shutil.rmtree(scratch)


def preset(name: str, layers: int | None) -> LlavaConfig:
    values = PRESETS[name].to_dict()
    values["text"]["num_layers"] = layers or values["text"]["num_layers"]
    return LlavaConfig.from_dict(values)


def compare(scratch: Path, config: LlavaConfig, base_dtype: str) -> int:
    source, copy, checkpoint, exported = (scratch / name for name in ("hf", "copy", "checkpoint", "exported"))
    write_model(config, source)
    size = bytes_of(source)
    convert = [sys.executable, "-m", "llava_jax.convert"]
    print(f"{size / 1e9:.1f} GB, {os.cpu_count()} cores, cache {'dropped' if forget() else 'kept'}", flush=True)
    runs = {"cp": measure(["cp", "-r", str(source), str(copy)])}
    shutil.rmtree(copy)
    command = ["import", "--llava", str(source), "--aspect", "pad", "--output", str(checkpoint)]
    runs["import"] = measure(convert + command + (["--base-dtype", base_dtype] if base_dtype else []))
    shutil.rmtree(source)
    imported = bytes_of(checkpoint)
    runs["export"] = measure([*convert, "export", "--checkpoint", str(checkpoint), "--output", str(exported)])
    print("| command | seconds | of cp | resident GiB | anonymous GiB |\n|---|---|---|---|---|")
    for name, run in runs.items():
        ratio, memory = run.seconds / runs["cp"].seconds, [run.resident / 2**30, run.anonymous / 2**30]
        print(f"| {name} | {run.seconds:.0f} | {ratio:.2f} | {memory[0]:.2f} | {memory[1]:.2f} |")
    print(f"the checkpoint has {imported / 1e9:.2f} GB")
    tensors = tensors_of(config)
    wrong, kept = differing(tensors, exported), abstract_params(dataclasses.replace(config, base_dtype=base_dtype))
    quantized = {tensor.name for tensor in tensors_of(config, set(abstract_params(config)) - set(kept))}
    print(
        f"{len(tensors)} tensors came back, {len(wrong)} of them other than they went; {len(quantized)} were quantized"
    )
    return 0 if quantized == set(wrong) else 1


def bytes_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def tensors_of(config: LlavaConfig, chosen: set[str] | None = None) -> list[Tensor]:
    """A whole LLaVA by Hugging Face's names, or the chosen ones of our parameters, made when they are read."""
    shapes = abstract_params(config)
    tensors = []
    for part, entries in entries_of(config).items():
        for entry in (entry for entry in entries if chosen is None or entry.name in chosen):
            shape = entry.hf_shape(shapes[entry.name].shape)
            names = [EXPORT_PREFIXES[part] + leaf for leaf in entry.leaves()]
            tensors += [
                Tensor(name, shape, jnp.dtype(jnp.bfloat16), functools.partial(random, name, shape)) for name in names
            ]
    return tensors


def write_model(config: LlavaConfig, directory: Path) -> None:
    """A LLaVA as transformers 4 saves it."""
    directory.mkdir()
    write_shards(directory, tensors_of(config))
    image = config.text.vocab_size - 1
    settings = {
        "model_type": "llava",
        "image_token_index": image,
        "text_config": write_text(config.text, {}, "bfloat16"),
    }
    (directory / "config.json").write_text(json.dumps(settings))
    write_tokenizer(directory)


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between 1/128 and 1/64, of either sign, always the same for a name."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "little") % len(BLOCK)
    bits = np.resize(np.roll(BLOCK, -start), shape)  # repeats it
    return ((bits & 0x807F) | 0x3C00).view(jnp.bfloat16)


def write_tokenizer(directory: Path) -> None:
    """Of bytes; what it says does not matter here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(directory)


def measure(command: list[str]) -> Run:
    """Runs it, and waits until all that it wrote is on disk. Raises CalledProcessError where it fails."""
    forget()
    start = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    resident = anonymous = 0
    while process.poll() is None:
        status = memory(process.pid)
        resident, anonymous = max(resident, status.get("VmHWM", 0)), max(anonymous, status.get("RssAnon", 0))
        time.sleep(TICK)
    os.sync()
    seconds = time.monotonic() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Run(seconds, resident, anonymous)


def memory(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if field[-1] == "kB"}


def forget() -> bool:
    """Makes the system read from disk what it would have in its cache, where it lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def differing(tensors: list[Tensor], exported: Path) -> list[str]:
    before, after = {tensor.name: tensor for tensor in tensors}, open_directory(exported)
    return [
        name
        for name in sorted({*before, *after})
        if name not in before or name not in after or not same(before[name].read(), after[name].read())
    ]


def same(before: np.ndarray, after: np.ndarray) -> bool:
    """Bit for bit. An export may append rows of tokens to the embeddings and to the head."""
    return before.shape[1:] == after.shape[1:] and np.array_equal(
        before.view(np.uint16), after[: len(before)].view(np.uint16)
    )


if __name__ == "__main__":
    cli.run(main)
