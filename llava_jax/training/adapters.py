"""The adapters (LoRA) of a run: those that its configuration asks for, and their parameters at the start."""

import dataclasses
import difflib
import re

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.models import pieces
from llava_jax.models.config import LlavaConfig, LoraConfig
from llava_jax.models.layers import Linear
from llava_jax.models.llava import Llava, Params, Shapes, abstract_params, build_from_shards, module_params
from llava_jax.models.lora import NOT_ADAPTED, PARAMETER, column_lengths, is_target, linears


def adapted(model: LlavaConfig, config: ConfigDict) -> LlavaConfig:
    """The model that a run trains from `model`: with the adapters of `config.lora`.

    Raises UserError for a target that is not in the model, a rank that is too large, or a model with other adapters.
    """
    wanted = None
    if config.lora.rank:
        values = config.lora.to_dict() | {"targets": tuple(config.lora.targets)}
        wanted = LoraConfig(**values | {"alpha": config.lora.alpha or 2.0 * config.lora.rank})
        check_targets(model, wanted)
    adapted = dataclasses.replace(model, lora=wanted)
    if model.lora is not None and not (wanted and _alike(model, adapted)):
        raise UserError(
            f"config.init has adapters: to train these on, give {_flags(model.lora)}; or merge them first: "
            "python -m llava_jax.convert merge"
        )
    return adapted


def _alike(one: LlavaConfig, other: LlavaConfig) -> bool:
    """Whether the same layers have the same adapters, whatever the patterns and the dropout."""
    free = {"targets": (), "dropout": 0.0}
    same = dataclasses.replace(one.lora, **free) == dataclasses.replace(other.lora, **free)
    return same and abstract_params(one).keys() == abstract_params(other).keys()


def _flags(lora: LoraConfig) -> str:
    given = {"rank": lora.rank, "alpha": lora.alpha, "targets": f'"{lora.targets}"'}
    given |= {name: True for name in ("rslora", "dora") if getattr(lora, name)}
    return " ".join(f"--config.lora.{name}={value}" for name, value in given.items())


def check_targets(model: LlavaConfig, lora: LoraConfig) -> None:
    """Raises UserError for a pattern without a layer, or a rank above the width of a layer that it would adapt."""
    shapes = abstract_params(dataclasses.replace(model, lora=None, base_dtype=""))
    names = {name.removesuffix(".kernel"): leaf for name, leaf in shapes.items() if name.endswith(".kernel")}
    widths = {name: min(leaf.shape[-2:]) for name, leaf in names.items() if name not in NOT_ADAPTED}
    for target in lora.targets:
        try:
            found = [name for name in widths if is_target(name, (target,))]
        except re.error as error:
            raise UserError(f"config.lora.targets: {target!r} is no regular expression: {error}") from None
        if not found:
            known = [*widths, *(name.rpartition(".")[2] for name in widths)]
            nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)[0]
            raise UserError(f"config.lora.targets: no linear layer is named {target!r}; the nearest is {nearest!r}")
        narrow = min(found, key=widths.get)
        if lora.rank > widths[narrow]:
            raise UserError(f"config.lora.rank is {lora.rank}, more than the width {widths[narrow]} of {narrow}")


def fresh(model: LlavaConfig, like: Shapes, key: jax.Array, params: Params) -> Params:
    """New adapters, as PEFT initializes them, with which a model computes the same as before.

    Args:
      model: with adapters.
      like: shapes and shardings of the new parameters.
      key: of the random `a`.
      params: the other parameters, of which DoRA measures the columns.
    """
    drawn = {name: leaf.sharding for name, leaf in like.items() if not name.endswith(".magnitude")}
    measured = {name: leaf.sharding for name, leaf in like.items() if name not in drawn}

    def draw(key: jax.Array) -> Params:
        new = module_params(Llava(model, rngs=nnx.Rngs(params=key)))
        return {name: pieces.take(new, name) for name in drawn}

    def measure(params: Params) -> Params:
        layers = dict(linears(build_from_shards(model, pieces.joined(params))))
        wholes = {pieces.whole(name) for name in measured}
        norms = {name: _column_norms(layers[PARAMETER.fullmatch(name)["layer"]]) for name in wholes}
        return {name: pieces.take(norms, name) for name in measured}

    adapters = jax.jit(draw, out_shardings=drawn)(key)
    if not measured:
        return adapters
    unset = {name: jnp.zeros(like[name].shape) for name in measured}
    return adapters | jax.jit(measure, out_shardings=measured)(params | adapters | unset)


def _column_norms(linear: Linear) -> jax.Array:
    """Lengths of the columns of W, float32[O], for each layer of a stack."""

    def norms(layer: Linear) -> jax.Array:
        return column_lengths(layer.weight(jnp.float32))

    return jax.lax.map(norms, linear) if len(linear.kernel_shape) == 3 else norms(linear)
