"""How the backbones are trained: Muon (Jordan et al. 2024) for stacked matrices, Adam for the rest."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from llava_jax.models.llava import Params

MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))


def muon(params: Params, learning_rate: float, steps: int) -> optax.GradientTransformation:
    """For a flat dict of parameters; warm-up over a tenth of the steps, then a cosine to 0."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
    dimensions = {name: MATRIX if ".layers." in f".{name}" and name.endswith("kernel") else None for name in params}
    rule = optax.contrib.muon(
        schedule,
        weight_decay=0.05,
        adam_weight_decay=0.05,
        adam_b2=0.99,
        muon_weight_dimension_numbers=lambda params: dimensions,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def scale_by_fan_in(params: Params) -> Params:
    """Weights of variance 1 / fan-in instead of CLIP's and LLaMA's 0.02: narrow models start better from these."""

    def scaled(name: str, value: jax.Array) -> jax.Array:
        if not name.endswith("kernel"):
            return value
        fan_in = value[..., 0].size // (len(value) if ".layers." in f".{name}" else 1)
        residual = 0.5 if name.endswith(("out_proj.kernel", "fc2.kernel", "o_proj.kernel", "down_proj.kernel")) else 1.0
        return value * (residual / (0.02 * fan_in**0.5))

    return {name: scaled(name, value) for name, value in params.items()}


def with_params(make: Callable[[], nnx.Module], params: Params) -> nnx.Module:
    """The module that `make()` makes, with its parameters from a flat dict that may hold others too."""
    graph, state = nnx.split(nnx.eval_shape(make))
    flat = [(path, nnx.Param(params[".".join(map(str, path))])) for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
