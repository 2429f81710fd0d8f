"""Layers that the vision tower, the projector and the decoder share.

Every layer computes in the type of its input; parameters keep their own. So bfloat16 inputs give bfloat16 compute with
float32 master weights. Norms compute in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

WEIGHT_INIT = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """y = x W + b, with `kernel` [in, out] and optionally `bias` [out]. An adapter may be added, see `models.lora`.

    `init` draws both; by default kernels are N(0, 0.02) and biases 0.
    """

    lora: nnx.Module | None = None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs, init: Initializer | None = None):
        self.kernel = nnx.Param((init or WEIGHT_INIT)(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param((init or nnx.initializers.zeros)(rngs.params(), (outputs,))) if bias else None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """[in, out], after the axis of the layers in a stack."""
        return self.kernel.shape

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel [in, out] in the type of the computation."""
        return self.kernel[...].astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """x W [..., out], without bias and adapter."""
        return project(x, self.weight(x.dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return finish(self, x, self.product(x))


def finish(linear: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """y = x W of a linear layer -> the same with its adapter and its bias."""
    if linear.lora is not None:
        y = linear.lora(x, y, linear)
    return add_bias(y, linear.bias)


def add_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return y if bias is None else y + broadcast_last(bias[...].astype(y.dtype), y)


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out], with its own gradient rule.

    JAX's rule computes the kernel's gradient as [out, in] and transposes it, for which CPUs copy dy, the largest array
    of a layer, into another order.
    """
    return x @ kernel


def product_and_factors(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The forward rule of a product, which saves both factors."""
    return x @ kernel, (x, kernel)


def _project_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return dy @ kernel.T, x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


project.defvjp(product_and_factors, _project_backward)


class LayerNorm(nnx.Module):
    """Ba et al. 2016, over the last axis."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        y = y * broadcast_last(self.scale[...], y) + broadcast_last(self.bias[...], y)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Zhang & Sennrich 2019: no mean, no bias."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(features))

    @property
    def weight(self) -> jax.Array:
        return self.scale[...]

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (y * broadcast_last(self.weight, y)).astype(x.dtype)


def broadcast_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector` [D] with as many axes as `like` [..., D]: broadcasting is always explicit."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters have a leading layer axis, to be scanned over."""
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), num_layers))


def unstack_layers(tower: nnx.Module, num_layers: int) -> None:
    """Replaces the stacked `tower.layers` by a list of its first `num_layers` layers; the others are dropped.

    The weights of a layer in a stack would be copied before each use. Parameters are unstacked one by one, so that
    memory holds little more than the model.
    """
    leaves, structure = jax.tree.flatten(tower.layers)
    del tower.layers
    by_layer = []
    while leaves:
        by_layer.append(jnp.unstack(leaves.pop(0))[:num_layers])  # stays on its devices, unlike `list`
    tower.layers = nnx.List(jax.tree.unflatten(structure, layer) for layer in zip(*by_layer, strict=True))
