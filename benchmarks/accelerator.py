"""What one accelerator does: attention, training steps, prefill and decoding, beside the limits of the machine.

    python benchmarks/accelerator.py --output accelerator.json

Each part is a process of its own, so that its peak memory is its own and one that fails stops no other. It prints its
lines as it ends, and --output has the results of all parts that have ended. Weights and batches are random. All parts
together are meant to take less than ten minutes on one H100 or one chip of a TPU.

It needs jax, flax, optax, orbax-checkpoint, transformers, numpy and pillow, and these small wheels, if they are
missing: pip install --no-deps ml-collections grain array-record.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # works without an install

GiB = 2**30
MARGIN = 0.9  # of the memory of a GPU, as launch/train.sh sets it
NANOVLM = 79  # samples/s in all of nanoVLM on one H100: 1.7M samples in 6 hours (huggingface/nanoVLM, README)
NEEDED = ("jax", "flax", "optax", "orbax.checkpoint", "transformers", "PIL", "ml_collections", "grain", "array_record")
Result = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="accelerator.json", help="file of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="by default all")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that the benchmark runs, on CPUs too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args(argv)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]:
        print(f"error: needs {', '.join(missing)}: pip install --no-deps NAME", file=sys.stderr)
        return 2
    if args.here:
        (name,) = args.parts
        report = {"device": device(), **PARTS[name](args.tiny)}
        Path(args.output).write_text(json.dumps(report))
        return 0
    results: Result = {"machine": machine(), "parts": {}}
    for name in args.parts:
        results["parts"][name] = run(name, args)
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    failed = [name for name, result in results["parts"].items() if "error" in result]
    print(f"all numbers: {args.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def run(name: str, args: argparse.Namespace) -> Result:
    """A part in a process of its own, which prints its lines."""
    file, began = Path(f"{args.output}.{name}"), time.monotonic()
    command = [sys.executable, __file__, "--here", "--parts", name, "--output", file, *["--tiny"] * args.tiny]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(MARGIN), "TF_CPP_MIN_LOG_LEVEL": "3"} | os.environ
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    seconds = time.monotonic() - began
    if done.returncode or not file.exists():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(f"{name}: failed after {seconds:.0f} s: {lines[-1]}", flush=True)
        return {"error": "\n".join(lines[-20:]), "seconds": seconds}
    result = json.loads(file.read_text())
    file.unlink()
    return result | {"seconds": seconds}


def machine() -> Result:
    import importlib.metadata

    names = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if _installed(name)}
    return {"python": platform.python_version(), "cpu": platform.processor(), "versions": versions}


def _installed(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def device() -> Result:
    import jax

    (first, *_), stats = jax.local_devices(), jax.local_devices()[0].memory_stats() or {}
    return {"kind": first.device_kind, "platform": first.platform, "memory": stats.get("bytes_limit")}


def say(line: str) -> None:
    print(line, flush=True)


def timed(call: Callable[[], Any], repeats: int = 10) -> dict[str, float]:
    """Seconds of a call, which is made once before: median and best."""
    import jax

    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - before)
    return {"median": statistics.median(seconds), "best": min(seconds)}


def peak_memory() -> int | None:
    """Bytes of the device that this process has used at most; None on CPUs."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# ---------------------------------------------------------------------------------------------------------- the limits


def limits(tiny: bool = False) -> Result:
    """The rate of a large matmul and of a copy: what the other parts are compared with."""
    import jax
    import jax.numpy as jnp

    size, length = (256, 2**20) if tiny else (8192, 2**30)
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    matmul = timed(functools.partial(jax.jit(jnp.matmul), left, right))
    buffer = jnp.ones(length, jnp.bfloat16)
    copy = timed(functools.partial(jax.jit(lambda x: x + 1), buffer))
    result = {"flops": 2 * size**3 / matmul["best"], "bytes": 2 * buffer.nbytes / copy["best"]}
    say(
        f"limits: {result['flops'] / 1e12:.1f} TFLOP/s in bfloat16 matmuls of {size}, {result['bytes'] / 1e9:.0f} GB/s "
        "copied (read and written), the best of ten"
    )
    return result


# ----------------------------------------------------------------------------------------------------------- attention


def attention(tiny: bool) -> Result:
    """Backends against float64 and each other: errors of outputs and gradients, and times."""
    import jax

    here, results = jax.default_backend(), []
    length = 256 if tiny else 2048
    # (kind, rows, tokens, heads, key and value heads, head width, packed); None: a tower without a mask
    shapes = [
        ("decoder, packed", 2, length, 32, 32, 128, True),
        ("decoder, unpacked", 2, length, 32, 32, 128, False),
        ("decoder, grouped queries, unpacked", 2, length, 32, 8, 128, False),
        ("tower", 4, 577, 16, 16, 64, None),
    ]
    for kind, rows, tokens, heads, kv_heads, width, packed in shapes:
        if tiny:
            rows, heads, kv_heads = 1, 4, max(kv_heads // 8, 1)
        found = {}
        for backend in ("xla", "chunked", {"tpu": "splash", "gpu": "cudnn"}.get(here)):
            if backend is None or (backend == "cudnn" and packed):
                continue
            small, large = ((min(rows, 1), min(tokens, 577), min(heads, 8)), (rows, tokens, heads))
            try:
                errors = _attention_errors(backend, *small, max(kv_heads * small[2] // heads, 1), width, packed)
                forward, both = _attention_times(backend, *large, kv_heads, width, packed)
            except Exception as error:  # the other backends are still of interest
                found[backend] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                say(f"attention, {kind}: {backend} failed: {found[backend]['error']}")
                continue
            pairs = tokens * tokens * (0.5 if packed is not None else 1)
            flops = 4 * rows * heads * width * pairs
            found[backend] = {"errors": errors, "forward": forward, "forward_backward": both, "flops": flops}
            say(
                f"attention, {kind} [{rows}, {tokens}, {heads}/{kv_heads}, {width}]: {backend} "
                f"{1e3 * forward['median']:.2f} ms forward ({flops / forward['median'] / 1e12:.1f} TFLOP/s), "
                f"{1e3 * both['median']:.2f} ms with backward; off float64 by {errors['output']:.1e} (output), "
                f"{errors['gradients']:.1e} (gradients)"
            )
        results.append({"kind": kind, "shape": [rows, tokens, heads, kv_heads, width], "backends": found})
    failed = [name for case in results for name, result in case["backends"].items() if "error" in result]
    return {"cases": results} | ({"error": f"failed: {', '.join(failed)}"} if failed else {})


def _attention_inputs(rows: int, tokens: int, heads: int, kv_heads: int, width: int, packed: bool | None) -> tuple:
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((rows, tokens, count, width), np.float32) for count in (heads, kv_heads, kv_heads, heads)
    ]
    if packed is None:
        return arrays, None, np.ones((rows, tokens), bool)
    segments = np.ones((rows, tokens), np.int32)
    if packed:
        segments[:, tokens // 3 :], segments[:, 2 * tokens // 3 :] = 2, 3
    segments[:, tokens - tokens // 8 :] = 0  # padding
    return arrays, segments, segments > 0


def _attended(backend: str, packed: bool | None, segments: Any, counted: Any) -> Callable:
    """(q, k, v, output gradient) -> output, and its gradients of q, k and v; padding is not used."""
    import jax

    from llava_jax.models.attention import attention as attend

    def compute(q, k, v, gradient) -> tuple:
        def output(q, k, v):
            out = attend(q, k, v, segments, backend=backend, packed=bool(packed))
            return jax.numpy.where(counted[:, :, None, None], out, 0)

        value, pullback = jax.vjp(output, q, k, v)
        return value, pullback(gradient.astype(value.dtype))

    return compute


def _attention_errors(backend: str, *shape_and_packed: Any) -> dict[str, float]:
    """Largest differences from float64 on the same bfloat16 values, relative to the largest value."""
    import jax
    import jax.numpy as jnp

    *shape, packed = shape_and_packed
    arrays, segments, counted = _attention_inputs(*shape, packed)
    inputs = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    ours = jax.jit(_attended(backend, packed, segments, counted))(*inputs)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        exact = [jnp.asarray(np.asarray(array, np.float32), jnp.float64) for array in inputs]
        reference = jax.jit(functools.partial(_exact_attention, segments, counted))(*exact)
        reference = jax.tree.map(np.asarray, reference)

    def error(ours, exact) -> float:
        return float(np.abs(np.asarray(ours, np.float64) - exact).max() / np.abs(exact).max())

    return {"output": error(ours[0], reference[0]), "gradients": max(map(error, ours[1], reference[1]))}


def _exact_attention(segments: Any, counted: Any, q, k, v, gradient) -> tuple:
    """softmax(q k^T / sqrt(H)) v by its definition, in the type of its arguments."""
    import jax
    import jax.numpy as jnp

    groups = q.shape[2] // k.shape[2]

    def output(q, k, v):
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
        if segments is not None:
            seen = np.tril(np.ones((q.shape[1], q.shape[1]), bool)) & (segments[:, :, None] == segments[:, None])
            scores = jnp.where(seen[:, None], scores, -jnp.inf)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        return jnp.where(counted[:, :, None, None], out, 0)

    value, pullback = jax.vjp(output, q, k, v)
    return value, pullback(gradient)


def _attention_times(backend: str, *shape_and_packed: Any) -> tuple[dict[str, float], dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from llava_jax.models.attention import attention as attend

    *shape, packed = shape_and_packed
    arrays, segments, counted = _attention_inputs(*shape, packed)
    q, k, v, gradient = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    forward = jax.jit(lambda q, k, v: attend(q, k, v, segments, backend=backend, packed=bool(packed)))
    both = jax.jit(_attended(backend, packed, segments, counted))
    return timed(lambda: forward(q, k, v)), timed(lambda: both(q, k, v, gradient))


# ------------------------------------------------------------------------------------------------------ training steps


def small_step(tiny: bool) -> Result:
    """SigLIP-B/16 and SmolLM2-135M's shapes, everything trained, 32 samples a step."""
    from llava_jax.models.config import LlavaConfig, TextConfig, VisionConfig

    vision = VisionConfig(768, 3072, 12, 12, 224, 16, 1e-6, "gelu_pytorch_tanh", kind="siglip")
    text = TextConfig(49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_word_embeddings=True)
    model = LlavaConfig(vision, text, "mlp2x_gelu")
    if tiny:
        model = _narrow(model)
    overrides = {"batch_rows": 4 if tiny else 32, "max_length": 256 if tiny else 324, "vision_learning_rate": 1e-5}
    trainable = ((r"projector\.", "projector"), (r"llm\.", "llm"), (r"vision\.", "vision"))
    result = _train("train, SigLIP-B + 135M", model, "finetune", overrides | {"remat": "none", "trainable": trainable})
    if not tiny:
        say(f"  {result['samples_per_second']:.1f} samples/s; nanoVLM reports {NANOVLM} on one H100")
    return result


def large_step(recipe: str, tiny: bool) -> Result:
    """LLaVA-1.5-7B's widths, with as many layers of the decoder as fit."""
    import dataclasses

    from llava_jax.models.config import PRESETS

    complete = _narrow(PRESETS["llava-v1.5-7b"]) if tiny else PRESETS["llava-v1.5-7b"]
    rows = 2 if tiny else 1
    length = complete.image_tokens + 32 if tiny else 2048
    overrides = {"batch_rows": rows, "max_length": length, "clip_norm": 1.0}
    if tiny and recipe == "finetune_lora":
        overrides["lora.rank"] = 8
    layers = complete.text.num_layers
    while layers:
        model = dataclasses.replace(complete, text=dataclasses.replace(complete.text, num_layers=layers))
        try:
            return _train(f"train, 7B's widths, {recipe}, {layers} layers", model, recipe, overrides)
        except MemoryError as error:
            say(f"  {layers} layers: {error}")
            layers -= max(1, complete.text.num_layers // 8)
    raise SystemExit("not even one layer fits")


def _narrow(model: Any) -> Any:
    import dataclasses

    vision = dataclasses.replace(model.vision, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4)
    vision = dataclasses.replace(vision, image_size=8 * vision.patch_size)
    text = dataclasses.replace(
        model.text, vocab_size=512, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16,
    )  # fmt: skip
    return dataclasses.replace(model, vision=vision, text=text)


def _train(what: str, model: Any, recipe: str, overrides: dict[str, Any]) -> Result:
    """Compiles a step as a run does, and takes it. Raises MemoryError if the compiler says that it does not fit."""
    import jax

    from llava_jax import recipes
    from llava_jax.data.plan import Layout
    from llava_jax.parallel.sharding import make_mesh
    from llava_jax.training import builder
    from llava_jax.training.adapters import adapted

    config = recipes.get_config(recipe)
    config.update_from_flattened_dict(overrides)
    model, mesh = adapted(model, config), make_mesh({"fsdp": -1}, jax.local_devices()[:1])
    length = config.max_length
    layout = Layout(config.batch_rows, 1, length, 1, length, model.image_tokens, model.vision.image_size)
    program = builder.build(config, model, layout, mesh, steps=1000)
    state, frozen, batch = program.arguments
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError("the compiler ran out of memory") from None
        raise
    stats, limit = compiled.memory_analysis(), (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    said = stats.peak_memory_in_bytes
    if limit and said > limit:
        raise MemoryError(f"the compiler's peak is {said / GiB:.1f} GiB, there are {limit / GiB:.1f}")

    weights = {**_random(state.trainable), **_random(frozen)}
    trained = {name: weights.pop(name) for name in state.trainable}
    state = builder.init_state(program.optimizer, trained, mesh)
    values = jax.device_put(_batch(batch, model), {name: leaf.sharding for name, leaf in batch.items()})
    losses = []

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, weights, values)
        losses.append(metrics["loss"])
        return state

    seconds = timed(step, repeats=5)
    tokens = config.batch_rows * length
    flops = sum(part.needed for part in program.flops.values())
    result = {
        "model": what,
        "rows": config.batch_rows,
        "length": length,
        "seconds": seconds,
        "samples_per_second": config.batch_rows / seconds["median"],
        "tokens_per_second": tokens / seconds["median"],
        "flops": flops,
        "attention": program.settings.attention,
        "compilers_peak": said,
        "peak": peak_memory(),
        "losses": [float(loss) for loss in losses],
    }
    if not all(map(math.isfinite, result["losses"])):
        raise SystemExit(f"{what}: the losses are {result['losses']}")
    say(
        f"{what}: {1e3 * seconds['median']:.1f} ms a step of {config.batch_rows} x {length} positions (median; best "
        f"{1e3 * seconds['best']:.1f}), {result['tokens_per_second']:.0f} tokens/s, attention {result['attention']}"
        f", {flops / seconds['median'] / 1e12:.1f} TFLOP/s{_share(flops / seconds['median'])}"
    )
    used = f"{result['peak'] / GiB:.2f}" if result["peak"] else "?"
    say(f"  peak memory {used} GiB; the compiler said {said / GiB:.2f}")
    result["predicted"] = _predicted(compiled.as_text())
    if isinstance(result["predicted"], float):
        say(f"  preflight predicts {1e3 * result['predicted']:.1f} ms")
    return result


def _predicted(text: str) -> float | str | None:
    """Seconds of a step as preflight predicts them; None for machines that it doesn't know, an error as its text."""
    import jax

    from llava_jax.parallel.hardware import GPUS, TPUS
    from llava_jax.preflight import hlo_text, predict
    from llava_jax.preflight.rates import rates_of

    kind = jax.local_devices()[0].device_kind
    machine = next((one for one in (*TPUS.values(), *GPUS.values()) if one.kind == kind), None)
    if machine is None:
        return None
    hardware = predict.Hardware(machine, rates_of(machine), (1, 1), [(0, 0)])
    try:
        return predict.summary(predict.operations(hlo_text.parse(text), hardware))["seconds"]
    except Exception as error:  # what was measured is not lost
        return f"{type(error).__name__}: {error}"


def _share(rate: float) -> str:
    """Of the peak in the data sheet, which MFU is relative to."""
    import jax

    from llava_jax.parallel.hardware import peak_flops

    peak = peak_flops(jax.local_devices()[0].device_kind)
    return f" ({rate / peak:.1%} MFU)" if peak else ""


def _random(shapes: dict[str, Any]) -> dict[str, Any]:
    """Parameters near zero, norms near one, made on the device in their own types."""
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def make(shape: tuple[int, ...], dtype: Any, key: jax.Array, mean: float) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.floating):
            return (mean + 0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        return jax.random.randint(key, shape, 0, 16).astype(dtype)

    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.device_put(make(leaf.shape, leaf.dtype, key, float("norm" in name)), leaf.sharding)
        for key, (name, leaf) in zip(keys, shapes.items(), strict=True)
    }


def _batch(shapes: dict[str, Any], model: Any) -> dict[str, np.ndarray]:
    """Rows of an image and text, all of which are targets."""
    rng, (rows, length) = np.random.default_rng(0), shapes["tokens"].shape
    index = np.arange(length)
    image = np.broadcast_to(np.where(index < model.image_tokens, index, -1).astype(np.int32), (rows, length))
    tokens = np.where(image < 0, rng.integers(3, model.text.vocab_size, (rows, length)), 0).astype(np.int32)
    return {
        "tokens": tokens,
        "labels": np.where(image < 0, tokens, -100).astype(np.int32),
        "positions": np.broadcast_to(index.astype(np.int32), (rows, length)),
        "segment_ids": np.ones((rows, length), np.int32),
        "images": rng.integers(0, 256, shapes["images"].shape, np.uint8),
        "image_feature_index": image,
    }


# ---------------------------------------------------------------------------------------------------------- generation


def generation(tiny: bool) -> Result:
    """Prefill and decoding with LLaVA-1.5-7B's shapes in bfloat16, beside the limits of this machine."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from llava_jax.inference.decoding import MAX_STEPS, Decoder, Slots
    from llava_jax.inference.prompts import PromptBatch
    from llava_jax.models.config import PRESETS
    from llava_jax.models.llava import abstract_params, build

    limit = limits(tiny)
    model = _narrow(PRESETS["llava-v1.5-7b"]) if tiny else PRESETS["llava-v1.5-7b"]
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    while memory and 2.6 * sum(leaf.size for leaf in abstract_params(model).values()) > memory:
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_layers=model.text.num_layers - 4))
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=one)
        for name, leaf in abstract_params(model).items()
    }
    decoder = Decoder(build(model, _random(shapes), jnp.bfloat16))
    P, length = model.image_tokens, 128 if tiny else 1024
    text = model.text
    weights = sum(leaf.size for name, leaf in shapes.items() if name.startswith("llm.") and "embed_tokens" not in name)
    results = []
    for rows in (1, 2) if tiny else (1, 8, 32):
        index = np.full((rows, length), -1, np.int32)
        index[:, :P] = np.arange(rows * P).reshape(rows, P)
        rng = np.random.default_rng(0)
        tokens = rng.integers(3, text.vocab_size, (rows, length)).astype(np.int32)
        images = rng.integers(0, 256, (1, rows, model.vision.image_size, model.vision.image_size, 3), np.uint8)
        batch = PromptBatch(tokens, np.full(rows, length, np.int32), images, index)
        size = length + 4 * MAX_STEPS
        prefill = timed(lambda batch=batch, size=size: decoder.prefill(batch, None, size=size), 3)
        first, cache = decoder.prefill(batch, None, size=size)
        newest, seconds = np.asarray(first), []
        for call in range(4):
            slots = Slots(newest, np.full(rows, length + call * MAX_STEPS, np.int32), np.full(rows, size, np.int32))
            before = time.perf_counter()
            sampled, cache = decoder.decode(slots=slots, stop_ids=np.array([-1]), steps=MAX_STEPS, cache=cache)
            newest = np.asarray(sampled.tokens)[:, -1]
            seconds.append((time.perf_counter() - before) / MAX_STEPS)
        token = min(seconds[1:])
        kept = 2 * 2 * rows * (length + 2 * MAX_STEPS) * text.num_layers * text.num_kv_heads * text.head_dim
        bound = (2 * weights + kept) / limit["bytes"]
        flops = 2 * rows * length * weights
        results.append(
            {
                "rows": rows,
                "prefill": prefill,
                "seconds_a_token": seconds,
                "share_of_matmul_rate": flops / prefill["median"] / limit["flops"],
                "share_of_bandwidth": bound / token,
            }
        )
        say(
            f"generation, 7B's shape with {text.num_layers} layers, {rows} rows: prefill of {length} positions "
            f"{1e3 * prefill['median']:.0f} ms ({flops / prefill['median'] / limit['flops']:.0%} of the matmul rate), "
            f"decoding {rows / token:.0f} tokens/s ({bound / token:.0%} of the copy bandwidth)"
        )
    say(f"  peak memory {peak_memory() / GiB:.2f} GiB" if peak_memory() else "  peak memory ? GiB")
    return {"limits": limit, "layers": text.num_layers, "rows": results, "peak": peak_memory()}


PARTS: dict[str, Callable[[bool], Result]] = {
    "limits": limits,
    "attention": attention,
    "small": small_step,
    "large": functools.partial(large_step, "finetune"),
    "lora": functools.partial(large_step, "finetune_lora"),
    "generation": generation,
}


if __name__ == "__main__":
    raise SystemExit(main())
