"""Mesh shapes and where parameters and batches lie."""

import jax
import numpy as np
import pytest

from llava_jax import sharding
from llava_jax.cli import UserError


def test_one_axis_may_take_the_rest():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
    assert dict(mesh.shape) == {"data": 1, "fsdp": jax.device_count()}
    assert sharding.batch_shards(mesh) == jax.device_count()
    for axes in ({"data": -1, "fsdp": -1}, {"data": 3, "fsdp": 5}, {"data": 0, "fsdp": -1}):
        with pytest.raises(UserError, match="does not make up"):
            sharding.make_mesh(axes)


@pytest.mark.parametrize(
    "shape,axis", [((32, 4096, 11008), 2), ((3, 6, 10), None), ((7, 8, 9), 1), ((4096,), None), ((), None)]
)
def test_the_longest_divisible_axis_is_split(shape, axis):
    assert sharding.split_axis(shape, 4) == axis


def test_a_batch_made_of_pieces_is_the_batch():
    """With several processes: tests/test_distributed.py."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
    groups = 4 * jax.device_count()
    assert sharding.local_groups(mesh, groups) == tuple(range(groups))
    batch = {"tokens": np.arange(groups * 3 * 5).reshape(groups * 3, 5), "images": np.arange(groups * 2).reshape(-1, 2)}
    for name, array in sharding.put_batch(mesh, groups, batch).items():
        assert array.sharding == sharding.batch_sharding(mesh)
        np.testing.assert_array_equal(array, batch[name])
