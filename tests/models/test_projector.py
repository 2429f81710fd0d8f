"""The projector against what the published ones are: linear layers with exact GELU between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
from flax import nnx

from llava_jax.models.config import check_projector_type
from llava_jax.models.projectors import projector_kind

D_IN, D = 32, 48


def torch_projector(num_layers):
    """As the original builder makes it."""
    modules = [torch.nn.Linear(D_IN, D)]
    for _ in range(1, num_layers):
        modules += [torch.nn.GELU(), torch.nn.Linear(D, D)]
    return reference.randomize(torch.nn.Sequential(*modules))


@pytest.mark.parametrize("projector_type, num_layers", [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3)])
def test_equals_torch(projector_type, num_layers):
    torch_model = torch_projector(num_layers)
    ours = projector_kind(projector_type).build(projector_type, D_IN, D, nnx.Rngs(0))
    for i in range(num_layers):
        linear = getattr(ours, f"linear_{i + 1}")
        linear.kernel[...] = jnp.asarray(torch_model[2 * i].weight.detach().numpy().T)
        linear.bias[...] = jnp.asarray(torch_model[2 * i].bias.detach().numpy())
    x = np.random.default_rng(0).normal(0, 2, (3, 5, D_IN)).astype(np.float32)
    expected = torch_model(torch.from_numpy(x)).detach().numpy()
    assert expected.std() > 0.5
    np.testing.assert_allclose(ours(jnp.asarray(x)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projector_type", ["mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu_x", "identity", ""])
def test_unknown_types_are_an_error(projector_type):
    with pytest.raises(ValueError, match="not 'linear' or 'mlpNx_gelu'"):
        check_projector_type(projector_type)


def test_many_layers():
    check_projector_type("mlp12x_gelu")
    projector = projector_kind("mlp12x_gelu").build("mlp12x_gelu", D_IN, D, nnx.Rngs(0))
    shapes = [getattr(projector, f"linear_{number}").kernel.shape for number in range(1, 13)]
    assert shapes == [(D_IN, D)] + [(D, D)] * 11


def test_starts_as_torch_linears_do():
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias."""
    ours = projector_kind("mlp2x_gelu").build("mlp2x_gelu", D_IN, D, nnx.Rngs(0))
    for linear, fan_in in ((ours.linear_1, D_IN), (ours.linear_2, D)):
        bound = fan_in**-0.5
        for values in (linear.kernel[...], linear.bias[...]):
            assert 0.85 * bound < float(jnp.abs(values).max()) <= bound
            assert float(jnp.std(values)) == pytest.approx(bound / 3**0.5, rel=0.2)
    assert not jax.numpy.array_equal(ours.linear_1.bias[...], ours.linear_2.bias[...])
