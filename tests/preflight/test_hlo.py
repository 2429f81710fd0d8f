"""The account of compiled programs whose FLOPs and collectives are known, by the three compilers."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.preflight import hlo_cost, targets

targets.prepare_environment()
pytestmark = pytest.mark.usefixtures("optimized")

LAYERS, ROWS, T, D, F = 3, 2, 128, 256, 1024
# A layer's products 2 T D F twice: forward, twice backward, and the first once more, since the layer is rematerialised.
LAYER_FLOPS = 2 * 2 * ROWS * T * D * F
STEP_FLOPS = LAYERS * LAYER_FLOPS * 3.5
WEIGHT = 2 * D * F  # bytes of one weight in bfloat16
SPECS = {"up": P(None, None, "x"), "down": P(None, "x", None)}
TARGETS = ["v5e:2x2", "v5e:4x4", "v5p:2x2x1", "h100:8"]


@functools.cache
def mesh_of(name: str) -> Mesh:
    return Mesh(np.array(targets.devices(targets.parse(name))), ("x",), axis_types=(AxisType.Auto,))


def compile_text(function, name: str, *arguments, **options) -> str:
    lowered = jax.jit(function, **options).lower(*arguments)
    with targets.nothing_cached():
        return lowered.compile(compiler_options=targets.compile_options(targets.parse(name))).as_text()


def arguments(mesh: Mesh):
    """Stacked float32 weights in pieces, and a bfloat16 batch in rows."""
    shapes = {"up": (LAYERS, D, F), "down": (LAYERS, F, D)}
    weights = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[key]))
        for key, shape in shapes.items()
    }
    x = jax.ShapeDtypeStruct((ROWS * mesh.size, T, D), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    return weights, x


def loss(weights, x, gather):
    def layer(x, weight):
        up, down = gather(weight)
        return x + jax.nn.silu(x @ up) @ down, None

    x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def step_by_compiler(mesh: Mesh, name: str) -> hlo_cost.Cost:
    """FSDP left to the compiler."""

    def step(weights, x):
        gather = lambda weight: (weight["up"].astype(x.dtype), weight["down"].astype(x.dtype))  # noqa: E731
        gradients = jax.grad(loss)(weights, x, gather)
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)

    weights, x = arguments(mesh)
    places = jax.tree.map(lambda weight: weight.sharding, weights)
    return hlo_cost.cost(compile_text(step, name, weights, x, donate_argnums=0, out_shardings=places))


@functools.cache
def step_by_hand(mesh: Mesh, name: str) -> hlo_cost.Cost:
    """FSDP written out: each layer gathers its weights in bfloat16."""

    def gather(weight):
        up = jax.lax.all_gather(weight["up"].astype(jnp.bfloat16), "x", axis=1, tiled=True)
        return up, jax.lax.all_gather(weight["down"].astype(jnp.bfloat16), "x", axis=0, tiled=True)

    def local(weights, x):
        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x, gather))

    step = jax.shard_map(local, mesh=mesh, in_specs=(SPECS, P("x")), out_specs=SPECS, check_vma=False)
    return hlo_cost.cost(compile_text(step, name, *arguments(mesh), donate_argnums=0))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("step", [step_by_compiler, step_by_hand])
def test_flops_of_a_training_step(step, name):
    account = step(mesh_of(name), name)
    assert account.flops == STEP_FLOPS
    assert account.recomputed_flops == 0 and not account.unknown_loops and not account.kernels


@pytest.mark.parametrize("name", TARGETS)
def test_weights_are_gathered_in_bfloat16_for_each_pass(name):
    """Asynchronous or not, alone or combined: two weights a layer, forward and backward, and their gradients once."""
    mesh = mesh_of(name)
    n, account = mesh.size, step_by_hand(mesh, name)
    payload = {(row["kind"], row["dtype"]): row["payload"] for row in account.by_kind()}
    gathers = {dtype: size for (kind, dtype), size in payload.items() if kind == "all-gather"}
    assert gathers == {"bf16": LAYERS * 2 * 2 * WEIGHT}
    # TPUs sum whole gradients where there is more than one ring (see the module): never more than that.
    scattered, summed = payload.get(("reduce-scatter", "bf16"), 0), payload.get(("all-reduce", "bf16"), 0)
    assert scattered + summed == LAYERS * 2 * WEIGHT
    ideal = (LAYERS * 3 * 2 * WEIGHT) * (n - 1) / n
    extra = summed * (n - 1) / n
    other = sum(one.wire * one.times for one in account.collectives if one.kind == "collective-permute")
    assert account.wire - other == pytest.approx(ideal + extra)
    assert other < 0.02 * ideal  # of reduce-scatters' edges


@pytest.mark.parametrize("name", TARGETS)
def test_every_kind_of_collective(name):
    mesh, trips = mesh_of(name), 3
    n, size = mesh.size, 4 * 512 * 512

    def local(x):
        def body(x, _):
            x = jnp.sin(jax.lax.ppermute(x, "x", [(i, (i + 1) % n) for i in range(n)]))
            x = jnp.cos(jax.lax.all_to_all(x, "x", 1, 0, tiled=True).reshape(512, 512))
            part = jnp.sin(jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True))
            whole = jnp.tanh(jax.lax.all_gather(part.astype(jnp.bfloat16), "x", axis=0, tiled=True))
            return whole.astype(jnp.float32) * jax.lax.psum(jnp.cos(whole.astype(jnp.float32)), "x"), None

        return jax.lax.scan(body, x, None, length=trips)[0]

    x = jax.ShapeDtypeStruct((n * 512, 512), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    function = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    account = hlo_cost.cost(compile_text(function, name, x))
    found = {(row["kind"], row["dtype"]): (row["count"], row["payload"], row["wire"]) for row in account.by_kind()}
    share = (n - 1) / n
    assert found["collective-permute", "f32"] == (trips, trips * size, trips * size)
    assert found["all-to-all", "f32"] == (trips, trips * size, pytest.approx(trips * size * share))
    assert found["all-gather", "bf16"] == (trips, trips * size / 2, pytest.approx(trips * size / 2 * share))
    scattered = found.get(("reduce-scatter", "f32"), (0, 0, 0))[0]
    assert scattered in (0, trips)  # else it is written as an all-reduce
    sums = 2 * trips - scattered
    assert found["all-reduce", "f32"] == (sums, sums * size, pytest.approx(sums * size * 2 * share))


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"window_strides": (2, 3), "padding": ((1, 2), (0, 3))},
        {"window_strides": (1, 1), "padding": ((3, 3), (2, 0)), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 2), "padding": ((2, 1), (1, 1)), "lhs_dilation": (2, 3)},
    ],
)
def test_convolutions_count_what_lies_inside(window):
    """As XLA's own analysis of a program without loops does."""
    x, kernel = jnp.zeros((2, 9, 11, 4)), jnp.zeros((3, 4, 4, 8))
    options = {"window_strides": (1, 1), "padding": "VALID"} | window
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)  # noqa: E731
    compiled = jax.jit(convolve).lower(x, kernel).compile()
    assert hlo_cost.cost(compiled.as_text()).flops == compiled.cost_analysis()["flops"] > 0


LOOP = """HloModule m, num_partitions=8

%body (p: (s32[], s32[], f32[4,6])) -> (s32[], s32[], f32[4,6]) {
  %p = (s32[]{:T(128)}, s32[], f32[4,6]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=1
  %x = f32[4,6]{1,0:T(8,128)} get-tuple-element(%p), index=2
  %c = s32[]{:T(128)S(6)} copy(%i)
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%c, %two)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s32[], s32[], /*index=2*/f32[4,6]{1,0}) tuple(%next, %limit, %x)
}

%condition (p.1: (s32[], s32[], f32[4,6])) -> pred[] {
  %p.1 = (s32[], s32[], f32[4,6]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] compare(%i.1, %limit.1), direction=LT
}

ENTRY %main (x.1: f32[4,6]) -> f32[4,6] {
  %x.1 = f32[4,6]{1,0} parameter(0)
  %kernel = f32[4,6]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", backend_config={"body": "
}}
  %fake = f32[4,4]{1,0} not an instruction
"}
  %zero = s32[] constant(1)
  %eight = s32[] constant(8)
  %init = (s32[], s32[], f32[4,6]{1,0}) tuple(%zero, %eight, %kernel)
  %loop = (s32[], s32[], f32[4,6]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[4,6]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_loops_without_a_known_length_are_counted_out():
    """From 1 to 8 by twos, the limit being in the loop's state: 4 trips. What a kernel carries is passed over."""
    account = hlo_cost.cost(LOOP)
    assert account.flops == 4 * (2 * 4 * 4 * 6)
    assert account.kernels == {"tpu_custom_call": 1} and not account.unknown_loops
    unknown = hlo_cost.cost(LOOP.replace("constant(8)", "parameter(1)"))
    assert unknown.unknown_loops == ("loop",) and unknown.flops == 2 * 4 * 4 * 6


def test_the_command_prints_the_cost_of_a_saved_text(tmp_path):
    (tmp_path / "step.hlo").write_text(LOOP)
    command = [sys.executable, "-m", "llava_jax.hlo", str(tmp_path / "step.hlo")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "matmul FLOPs  768," in shown and "1 x tpu_custom_call" in shown


def test_computations_of_other_threads_end_where_they_end():
    """A v5p has sparse cores, whose computations name their thread after the closing brace."""
    body, rest = LOOP.split("}\n\n%condition", 1)
    account = hlo_cost.cost(f'{body}}}, execution_thread="sparsecore"\n\n%condition{rest}')
    assert account == hlo_cost.cost(LOOP)


@pytest.mark.parametrize(
    "groups,members",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_of_devices(groups, members):
    text = f"""HloModule m, num_partitions=8

ENTRY %main (x: bf16[16]) -> bf16[16] {{
  %x = bf16[16]{{0}} parameter(0)
  ROOT %r = bf16[16]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    (one,) = hlo_cost.cost(text).collectives
    assert one.group == members and one.payload == 32


def test_what_goes_to_other_hosts():
    """16 GPUs in hosts of 8: half of a gathered array comes from the other host, through 8 adapters."""
    host = [device // 8 for device in range(16)]
    everyone = tuple(range(16))
    gather = hlo_cost.Collective("all-gather", "bf16", 1600.0, everyone, 1)
    assert gather.wire == 1500 and gather.crossing(host) == 100
    assert hlo_cost.Collective("all-reduce", "bf16", 1600.0, everyone, 1).crossing(host) == 200
    assert hlo_cost.Collective("all-gather", "bf16", 1600.0, everyone[:8], 1).crossing(host) == 0
