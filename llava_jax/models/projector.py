"""The projection W of the paper (section 4.1): visual features into the word embedding space."""

import jax
from flax import nnx
from jax.nn.initializers import Initializer

from llava_jax.models.config import num_projector_layers
from llava_jax.models.layers import Linear


class Projector(nnx.Module):
    """linear_1, then (exact GELU, linear_i) for i = 2 ... N. The first widens to the decoder's width."""

    def __init__(self, projector_type: str, in_features: int, features: int, *, rngs: nnx.Rngs):
        self.num_layers = num_projector_layers(projector_type)
        for i in range(1, self.num_layers + 1):
            fan_in = in_features if i == 1 else features
            init = torch_uniform(fan_in)
            setattr(
                self, f"linear_{i}", Linear(fan_in, features, bias=True, rngs=rngs, kernel_init=init, bias_init=init)
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.linear_1(x)
        for i in range(2, self.num_layers + 1):
            x = getattr(self, f"linear_{i}")(jax.nn.gelu(x, approximate=False))
        return x


def torch_uniform(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias: what the published projectors started from."""
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
