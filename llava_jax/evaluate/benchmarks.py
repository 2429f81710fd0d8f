"""All benchmarks that are scored by comparing answers with labels, by name."""

from llava_jax.cli import UserError
from llava_jax.evaluate.benchmark import LETTER, Benchmark
from llava_jax.evaluate.choices import MMBENCH, MMBENCH_CN, SEED
from llava_jax.evaluate.easy_vqa import EASY_VQA
from llava_jax.evaluate.exact import EXACT
from llava_jax.evaluate.mm_vet import MM_VET
from llava_jax.evaluate.mme import MME
from llava_jax.evaluate.pope import POPE
from llava_jax.evaluate.textvqa import TEXTVQA
from llava_jax.evaluate.vqa import GQA, VIZWIZ, VQAV2

BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": VQAV2,
    "gqa": GQA,
    "vizwiz": VIZWIZ,
    "textvqa": TEXTVQA,
    "pope": POPE,
    "mme": MME,
    "mmbench": MMBENCH,
    "mmbench-cn": MMBENCH_CN,
    "seed": SEED,
    "mm-vet": MM_VET,
    "easy-vqa": EASY_VQA,
    "exact": EXACT,
    # What scores these two has commands of its own.
    "scienceqa": Benchmark("ScienceQA: accuracy", suffix=LETTER, max_new_tokens=1024),
    "llava-bench": Benchmark("LLaVA-Bench: relative scores by a judge", max_new_tokens=1024),
}


def listing(has: str) -> str:
    """The benchmarks that have this attribute, for a command's help."""
    return "\n".join(f"  {name:<13}{b.what}" for name, b in BENCHMARKS.items() if getattr(b, has) is not None)


def require(name: str, has: str) -> Benchmark:
    """A benchmark that has this attribute."""
    names = [known for known, benchmark in BENCHMARKS.items() if getattr(benchmark, has) is not None]
    if name not in names:
        raise UserError(f"{name}: is no such benchmark; choose from {', '.join(names)}")
    return BENCHMARKS[name]
