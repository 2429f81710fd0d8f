"""Optimizers by name (`config.optimizer`), made of Optax's transformations for a flat dict of parameters by name.

Weight decay is decoupled and multiplied by the learning rate in all of them. What is defined for a matrix is applied to
each layer of a stack, so that a stack trains as its layers would.

Axes: L layers of a stack, I inputs, O outputs.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.parallel import sharding
from llava_jax.registry import Registry

Transformation = optax.GradientTransformation

NO_DECAY = re.compile(r"(bias|scale|magnitude)$")
STACK = re.compile(r"\.layers\.")  # in the names of parameters whose first axis is that of layers
# Matrices that Muon trains; not embeddings and the head, whose rows or columns are tokens.
MATRIX = re.compile(r"(?<!lm_head)\.kernel$|\.lora\.[ab]$")
MAX_AT_ONCE = 2**24  # numbers in the matrices that are orthogonalized at the same time on a device


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer. `make(config, learning rate, weight decay, mesh)` is called for each group of parameters."""

    name: str
    options: tuple[str, ...]  # that it uses, of those that not all do: how their names begin
    make: Callable[[ConfigDict, optax.Schedule, float, Mesh | None], Transformation]


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer")


def _decays(params: optax.Params) -> dict[str, bool]:
    """Matrices do, biases and norms do not."""
    return {name: not NO_DECAY.search(name) for name in params}


# --------------------------------------------------------------------------------------------------- AdamW and Lion


def _adamw(config: ConfigDict, rate: optax.Schedule, weight_decay: float, mesh: Mesh | None) -> Transformation:
    """AdamW (Loshchilov and Hutter 2019)."""
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mu_dtype=config.moment_dtype or None,
        weight_decay=weight_decay,
        mask=_decays,
    )


def _lion(config: ConfigDict, rate: optax.Schedule, weight_decay: float, mesh: Mesh | None) -> Transformation:
    """Lion (Chen et al. 2023, algorithm 2): the sign of the momentum. Its learning rates are 3 to 10 times smaller."""
    moment_dtype = config.moment_dtype or None
    return optax.lion(rate, config.lion.beta1, config.lion.beta2, moment_dtype, weight_decay, mask=_decays)


# --------------------------------------------------------------------------------------------------------- Adafactor


def _adafactor(config: ConfigDict, rate: optax.Schedule, weight_decay: float, mesh: Mesh | None) -> Transformation:
    """Adafactor (Shazeer and Stern 2018, algorithms 4 and 5), without momentum.

    `optax.adafactor` does not multiply the weight decay by the learning rate.
    """
    options = config.adafactor
    scaled = [
        optax.scale_by_factored_rms(decay_rate=options.decay, min_dim_size_to_factor=options.min_factored),
        optax.clip_by_block_rms(options.clip),
    ]
    if options.scale_parameter:
        scaled.append(optax.scale_by_param_block_rms())
    return optax.chain(
        each_layer(optax.chain(*scaled)),
        optax.add_decayed_weights(weight_decay, _decays),
        optax.scale_by_learning_rate(rate),
    )


def each_layer(transformation: Transformation) -> Transformation:
    """The same for each parameter by itself and, of a stack, for each layer by itself."""

    def over_layers(function: Callable, path: tuple) -> Callable:
        return jax.vmap(function) if STACK.search(path[-1].key) else function

    def init(params: optax.Params) -> Any:
        return jax.tree.map_with_path(lambda path, leaf: over_layers(transformation.init, path)(leaf), params)

    def update(updates: optax.Updates, state: Any, params: optax.Params) -> tuple[optax.Updates, Any]:
        pairs = jax.tree.map_with_path(
            lambda path, *of_one: over_layers(transformation.update, path)(*of_one), updates, state, params
        )
        return tuple(jax.tree.map(lambda _, pair, part=part: pair[part], updates, pairs) for part in (0, 1))

    return optax.GradientTransformation(init, update)


# -------------------------------------------------------------------------------------------------------------- Muon


def _muon(config: ConfigDict, rate: optax.Schedule, weight_decay: float, mesh: Mesh | None) -> Transformation:
    """Muon (Jordan et al. 2024) for matrices, those of stacks included, and AdamW for the rest.

    The momentum is that of the paper and of torch; `optax.contrib.muon` corrects its bias, and takes stacks for no
    matrices.
    """

    def orthogonalized(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        return jax.tree.map_with_path(lambda path, leaf: _orthogonalized(path[-1].key, leaf, config, mesh), updates)

    matrices = optax.chain(
        optax.trace(config.muon.momentum, nesterov=True, accumulator_dtype=config.moment_dtype or None),
        optax.stateless(orthogonalized),
        optax.add_decayed_weights(weight_decay, _decays),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"matrix": matrices, "other": _adamw(config, rate, weight_decay, mesh)}, _matrix_or_other)


def _matrix_or_other(params: optax.Params) -> dict[str, str]:
    def label(path: tuple, leaf: jax.Array) -> str:
        name = path[-1].key
        is_matrix = MATRIX.search(name) and leaf.ndim - bool(STACK.search(name)) == 2
        return "matrix" if is_matrix else "other"

    return jax.tree.map_with_path(label, params)


def _orthogonalized(name: str, momentum: jax.Array, config: ConfigDict, mesh: Mesh | None) -> jax.Array:
    """Each matrix of a parameter, [L, I, O] or [I, O], orthogonalized and scaled."""
    momentum_LIO = momentum if momentum.ndim == 3 else momentum[None]
    spec = sharding.param_spec(mesh, name, momentum_LIO.shape) if mesh else ()
    update_LIO = sharding.on_whole_matrices(_newton_schulz, mesh, spec, momentum_LIO)
    inputs, outputs = momentum.shape[-2:]
    if config.muon.rms:  # that of AdamW's updates (Liu et al. 2025, equation 4)
        scale = config.muon.rms * math.sqrt(max(inputs, outputs))
    else:
        scale = math.sqrt(max(1, outputs / inputs))
    return (scale * update_LIO).reshape(momentum.shape)


def _newton_schulz(momentum_LIO: jax.Array) -> jax.Array:
    """U V^T of the singular value decomposition U S V^T of each matrix, nearly: five steps of Newton and Schulz."""
    iteration = optax.contrib.scale_by_muon(  # without momentum it is the iteration alone
        beta=0.0, nesterov=False, eps=1e-7, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
    )
    at_once = max(1, MAX_AT_ONCE // math.prod(momentum_LIO.shape[1:]))
    return jax.lax.map(lambda x_IO: iteration.update(x_IO, iteration.init(x_IO))[0], momentum_LIO, batch_size=at_once)


_OF_ADAMW = ("beta1", "beta2", "epsilon", "moment_dtype")
for _optimizer in (
    Optimizer("adamw", _OF_ADAMW, _adamw),
    Optimizer("adafactor", ("adafactor.",), _adafactor),
    Optimizer("lion", ("lion.", "moment_dtype"), _lion),
    Optimizer("muon", (*_OF_ADAMW, "muon."), _muon),
):
    OPTIMIZERS.add(_optimizer)
