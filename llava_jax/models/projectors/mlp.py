"""The published projectors: one linear layer (the paper), or several with GELU between them (LLaVA-1.5: two)."""

import functools
import re
from collections.abc import Callable

import jax
from flax import nnx
from jax.nn.initializers import Initializer

from llava_jax.models.hf_names import Entry, linear
from llava_jax.models.layers import Linear
from llava_jax.models.projectors import ProjectorKind, register

exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


class Mlp(nnx.Module):
    """linear_1, then (activation, linear_i) for i = 2 ... N. The first widens to the decoder's width."""

    def __init__(
        self, num_layers: int, in_features: int, features: int, activation: Callable = exact_gelu, *, rngs: nnx.Rngs
    ):
        self.num_layers, self.activation = num_layers, activation
        for i in range(1, num_layers + 1):
            fan_in = in_features if i == 1 else features
            layer = Linear(fan_in, features, bias=True, rngs=rngs, init=torch_uniform(fan_in))
            setattr(self, f"linear_{i}", layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.linear_1(x)
        for i in range(2, self.num_layers + 1):
            x = getattr(self, f"linear_{i}")(self.activation(x))
        return x


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias, as the published projectors were initialized."""
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


@register
class MlpKind(ProjectorKind):
    """`linear`, and `mlpNx_gelu` with N of 1 to 99."""

    pattern = r"linear|mlp([1-9]\d?)x_gelu"
    # Transformers always has two layers: an export of `linear` adds the identity (convert/export.py).
    hf_types = {"gelu": "mlp2x_gelu", "linear": "linear"}

    def num_layers(self, projector_type: str) -> int:
        return int(re.fullmatch(self.pattern, projector_type)[1] or 1)

    def build(self, projector_type: str, in_features: int, features: int, rngs: nnx.Rngs) -> nnx.Module:
        return Mlp(self.num_layers(projector_type), in_features, features, rngs=rngs)

    def entries(self, projector_type: str) -> list[Entry]:
        names = [f"linear_{i}" for i in range(1, self.num_layers(projector_type) + 1)]
        return [entry for name in names for entry in linear(f"projector.{name}", name)]
