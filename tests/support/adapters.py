"""Random adapters of a model, as parameters, merged into it, and as the workdir of a run."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import tiny
from etils import epath

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.models.config import LlavaConfig, LoraConfig
from llava_jax.models.llava import Params
from llava_jax.models.lora import PARAMETER, merged

EVERY = (r"llm\.layers\..*_proj",)


def lora(rank: int = 4, targets: tuple[str, ...] = EVERY, dora: bool = False, **options) -> LoraConfig:
    return LoraConfig(rank, 2.0 * rank, targets, dora=dora, **options)


def adapter(config: LlavaConfig, lora: LoraConfig, seed: int = 1, projector: bool = False) -> Params:
    """Parameters with a large effect; with `projector` also those of a projector of its own."""
    params = tiny.params(dataclasses.replace(config, lora=lora), seed)
    wanted = {name: value for name, value in params.items() if PARAMETER.fullmatch(name)}
    rng = np.random.default_rng(seed)
    for name, value in wanted.items():
        if name.endswith(".b"):
            wanted[name] = rng.normal(0, 0.3, value.shape).astype(np.float32)
        elif name.endswith(".magnitude"):
            wanted[name] = rng.uniform(0.1, 0.4, value.shape).astype(np.float32)
    if projector:
        wanted |= {name: value for name, value in params.items() if name.startswith("projector.")}
    return {name: np.asarray(value) for name, value in wanted.items()}


def with_merged(base: Params, lora: LoraConfig, adapter: Params) -> Params:
    """The parameters of the base with those of an adapter."""
    whole = dict(base)
    for name, value in adapter.items():
        if (match := PARAMETER.fullmatch(name)) is None:
            whole[name] = value
        elif match["part"] == "a":
            layer = match["layer"]
            own = {
                part: adapter[name] for part in ("a", "b", "magnitude") if (name := f"{layer}.lora.{part}") in adapter
            }
            merge = functools.partial(merged, config=lora)
            merge = jax.vmap(merge) if value.ndim == 3 else merge
            whole[f"{layer}.kernel"] = merge(base[f"{layer}.kernel"], own)
    return whole


def workdir(
    directory: Path, base: Path, lora: LoraConfig, trained: Params, template="v1", step: int = 3, **model
) -> Path:
    """Writes a step of a run from a checkpoint with these trained parameters."""
    source = open_checkpoint(base)
    model = dataclasses.replace(source.config, lora=lora, **model)
    frozen = [name for name in source.abstract() if name not in trained]
    sources = source.sources_of(frozen, epath.Path(directory))
    checkpoints = TrainingCheckpoints(
        epath.Path(directory), Description(model, template, sources=sources, stage="finetune"), 1
    )
    state = {"count": jax.numpy.zeros(())}  # of an optimizer
    checkpoints.save(step, {name: jax.numpy.asarray(value) for name, value in trained.items()}, state, wait=True)
    checkpoints.close()
    shutil.copytree(source.tokenizer_dir, directory / "tokenizer")
    return directory
