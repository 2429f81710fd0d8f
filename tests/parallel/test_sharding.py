"""Mesh shapes and where parameters and batches lie."""

import math

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, NamedSharding

from llava_jax.cli import UserError
from llava_jax.models.config import PRESETS
from llava_jax.models.llava import abstract_params
from llava_jax.parallel import sharding


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | {"data": data, "fsdp_x": fsdp, "tensor": tensor}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_one_axis_may_take_the_rest():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
    assert sharding.axis_sizes(mesh) == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert sharding.batch_shards(mesh) == jax.device_count()
    for axes in ({"data": -1, "fsdp": -1}, {"data": 3, "fsdp": 5}, {"data": 0, "fsdp": -1}, {"data": -2, "fsdp": -2}):
        with pytest.raises(UserError, match="its product is not"):
            sharding.make_mesh(axes)


@pytest.mark.parametrize(
    "axes,name,shape,expected",
    [
        ({"fsdp": 8}, "llm.layers.attention.q_proj.kernel", (2, 64, 32), (None, "fsdp", None)),
        ({"fsdp": 4, "tensor": 2}, "llm.layers.attention.q_proj.kernel", (2, 64, 32), (None, "fsdp", "tensor")),
        ({"fsdp": 8}, "llm.layers.mlp.down_proj.kernel", (2, 96, 64), (None, "fsdp", None)),
        ({"fsdp": 4, "tensor": 2}, "llm.layers.mlp.down_proj.kernel", (2, 96, 64), (None, "tensor", "fsdp")),
        ({"fsdp": 8}, "llm.layers.mlp.down_proj.kernel", (2, 97, 64), (None, None, "fsdp")),
        ({"fsdp": 4, "tensor": 2}, "llm.lm_head.kernel", (64, 401), ("fsdp", None)),
        ({"fsdp": 8}, "llm.layers.input_layernorm.scale", (2, 64), (None, None)),
        ({"data": 8}, "llm.layers.attention.q_proj.kernel", (2, 64, 32), (None, None, None)),
    ],
)
def test_a_parameter_is_split_as_the_tables_say(axes, name, shape, expected):
    spec = sharding.param_spec(abstract_mesh(**axes), name, shape)
    assert tuple("fsdp" if axis == sharding.FSDP_RINGS else axis for axis in spec) == expected


def test_what_an_optimizer_keeps_of_a_parameter_is_split_along_the_axes_that_it_has():
    mesh, name = abstract_mesh(fsdp=4, tensor=2), "llm.layers.mlp.down_proj.kernel"
    params = {name: jax.ShapeDtypeStruct((2, 96, 64), "float32")}
    parts = {(2, 96, 64): (None, "tensor", "fsdp"), (2, 96): (None, "tensor"), (2, 64): (None, "fsdp")}
    for shape, expected in (parts | dict.fromkeys([(2,), (2, 1), (1,), ()], ())).items():
        state = {"llm": ({name: {"v": jax.ShapeDtypeStruct(shape, "float32")}}, jax.ShapeDtypeStruct((3,), "int32"))}
        placed = sharding.tree_shardings(mesh, state, params)["llm"]
        spec = tuple("fsdp" if axis == sharding.FSDP_RINGS else axis for axis in placed[0][name]["v"].spec)
        assert spec == expected or not any((*spec, *expected))
        assert placed[1].is_fully_replicated


def test_too_much_on_every_device_is_an_error():
    shapes = abstract_params(tiny.config())
    sharding.check_replicated(abstract_mesh(data=8), shapes)
    with pytest.raises(UserError, match=r"on every device, most of them \S+embedding"):
        sharding.check_replicated(abstract_mesh(fsdp=7), shapes)
    for preset in PRESETS.values():
        sharding.check_replicated(abstract_mesh(fsdp=256), abstract_params(preset))


@pytest.mark.parametrize(
    "axes", [{"fsdp": 16}, {"fsdp": 256}, {"data": 2, "fsdp": 32}, {"fsdp": 8, "tensor": 4}], ids=str
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_device_holds_its_part_of_a_published_model(preset, axes):
    mesh, shapes = abstract_mesh(**axes), abstract_params(PRESETS[preset])
    sizes = {
        n: NamedSharding(mesh, sharding.param_spec(mesh, n, v.shape)).shard_shape(v.shape) for n, v in shapes.items()
    }
    held, whole = (
        sum(math.prod(shape) for shape in all_shapes)
        for all_shapes in (sizes.values(), [v.shape for v in shapes.values()])
    )
    assert held * axes["fsdp"] * axes.get("tensor", 1) < 1.05 * whole


@pytest.mark.parametrize(
    "shape,data,tensor,expected",
    [
        ((1, 8, 8, 1, 1), 1, 1, ([1] * 5, [1, 8, 8, 1, 1], [1] * 5)),
        ((2, 4, 4, 1, 1), 2, 1, ([2, 1, 1, 1, 1], [1, 4, 4, 1, 1], [1] * 5)),
        ((1, 4, 4, 1, 1), 2, 2, ([1, 2, 1, 1, 1], [1, 2, 2, 1, 1], [1, 1, 2, 1, 1])),
        ((1, 2, 2, 4, 2), 1, 4, ([1] * 5, [1, 2, 2, 2, 1], [1, 1, 1, 2, 2])),
    ],
)
def test_data_takes_the_outer_links_and_tensor_the_inner(shape, data, tensor, expected):
    assert sharding.factor(shape, data, tensor) == expected


def test_a_factor_that_no_axis_has_is_an_error():
    with pytest.raises(UserError, match="a factor 3"):
        sharding.factor((1, 4, 4, 1, 1), 3, 1)


def test_a_batch_made_of_pieces_is_the_batch():
    """With several processes: tests/parallel/test_distributed.py."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1})
    groups = 4 * jax.device_count()
    assert sharding.local_groups(mesh, groups) == tuple(range(groups))
    batch = {"tokens": np.arange(groups * 3 * 5).reshape(groups * 3, 5), "images": np.arange(groups * 2).reshape(-1, 2)}
    for name, array in sharding.put_batch(mesh, groups, batch).items():
        assert array.sharding == sharding.batch_sharding(mesh)
        np.testing.assert_array_equal(array, batch[name])
