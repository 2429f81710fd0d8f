"""Does an answer depend on what else is asked? Ragged prompts with and without pictures, all at once and one by one.

The language model is SmolLM2-135M with its real weights, the tower and the projector are random. All prompts are asked
at the same time, of which eight are answered at a time; then each alone, of an engine that remembers nothing. The
greedy texts are compared, in every type that the engine computes in.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from serve import CONFIG, encoder, smollm2_parameters

from llava_jax import cli

ENGINES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
}
CONTEXT = 1024
TOKENS = 16  # of an answer
PICTURES = 8
WORDS = ["what", "is", "the", "colour", "of", "a", "red", "house", "why", "tree", "?", "42", "Hello", "describe", "\n"]


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where a text in float32 is another one."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/company.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    args = parser.parse_args(argv)
    requests, same = ragged(args.prompts), {}
    print("| | same text | tokens until the first other one |\n|---|---|---|", flush=True)
    for name in args.engines:
        together, alone = answers(requests, **ENGINES[name])
        same[name] = sum(a == b for a, b in zip(together, alone, strict=True))
        parted = [common(a, b) for a, b in zip(together, alone, strict=True) if a != b]
        print(f"| {name} | {same[name]} of {len(requests)} | {sorted(parted) or ''} |", flush=True)
    return int(same.get("float32", len(requests)) < len(requests))


def ragged(count: int) -> list[Any]:
    """Prompts of 1 to 100 words, about no, one or two pictures, half of them after an answer."""
    from llava_jax.inference.requests import Request

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(pixels) for pixels in rng.integers(0, 256, (PICTURES, 224, 224, 3), np.uint8)]
    requests = []
    for _ in range(count):
        images = [pictures[i] for i in rng.choice(PICTURES, rng.choice(3, p=(0.5, 0.4, 0.1)))]
        turns = [("user", "<image>\n" * len(images) + " ".join(rng.choice(WORDS, rng.integers(1, 101))))]
        if rng.random() < 0.5:
            turns += [("assistant", "Nobody knows."), ("user", " ".join(rng.choice(WORDS, rng.integers(1, 11))))]
        requests.append(Request(turns, images))
    return requests


def answers(requests: Sequence[Any], dtype: str, **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the answers given at the same time, and one by one."""
    import jax.numpy as jnp

    from llava_jax.cli import track
    from llava_jax.inference.engine import Engine
    from llava_jax.inference.requests import Sampling
    from llava_jax.models.llava import build

    model = build(CONFIG, {name: jnp.array(x, dtype) for name, x in smollm2_parameters().items()}, jnp.dtype(dtype))
    engine = Engine(model, encoder(CONFIG), context=CONTEXT, queue=len(requests), **options)
    sampling = Sampling(max_new_tokens=TOKENS)

    def finished(answer: Any) -> list[int]:
        list(answer)
        return answer.tokens

    submitted = [engine.submit(request, sampling) for request in requests]
    together = [finished(answer) for answer in track(submitted, "at once")]
    alone = []
    for request in track(requests, "one by one"):
        engine.clear_caches()
        alone.append(finished(engine.submit(request, sampling)))
    engine.close()
    return together, alone


def common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


if __name__ == "__main__":
    cli.run(main)
