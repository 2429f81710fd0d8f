"""Times of schedules that can be computed by hand, and the predictions of the small model's step."""

from pathlib import Path

import pytest

from llava_jax.parallel.hardware import GPUS, TPUS
from llava_jax.preflight import hlo_text, predict
from llava_jax.preflight.hlo_cost import Collective
from llava_jax.preflight.rates import rates_of

V5E = predict.Hardware(TPUS["v5e"], rates_of(TPUS["v5e"]), (4, 4), [divmod(at, 4) for at in range(16)])
H100 = predict.Hardware(GPUS["h100"], rates_of(GPUS["h100"]), (2, 8), [divmod(at, 8) for at in range(16)])
SCHEDULES = Path(__file__).parent / "schedules"


def read(name: str) -> str:
    return (SCHEDULES / f"{name}.hlo").read_text()


def walk(name: str, hardware: predict.Hardware, cycles: int = 0) -> list[predict.Operation]:
    return predict.operations(hlo_text.parse(read(name).replace("CYCLES", str(cycles))), hardware)


@pytest.mark.parametrize("cycles", [150_000, 1_500_000])
def test_a_collective_runs_while_a_tpu_computes(cycles):
    """A gather of 8 MiB over a grid takes 0.07 ms, the products 0.04 or 0.4 ms."""
    found = walk("overlap", V5E, cycles)
    gather = Collective("all-gather", "bf16", 2 * 4096 * 1024, tuple(range(16)), 1)
    computing, sending = V5E.product(2 * 64 * 4096 * 1024, cycles), V5E.collective(gather)
    assert sending == pytest.approx(7e-5, rel=0.1)
    totals = predict.summary(found)
    assert totals["exposed_communication"] == pytest.approx(max(sending - computing, 0.0))
    assert totals["seconds"] == pytest.approx(max(sending, computing))
    assert totals["parts"]["mlp"]["compute"] == pytest.approx(computing)


def test_a_group_has_the_links_of_the_axes_along_which_it_extends():
    """Of a 4 x 4 v5e, whose axes are no rings: 2 (4 - 1) / 4 links each."""
    size = 90e6
    row, grid = ((0, 1, 2, 3), tuple(range(16)))
    seconds = [V5E.collective(Collective("reduce-scatter", "bf16", size, group, 1)) for group in (row, grid)]
    link, latency = 45e9 * V5E.rates.link, V5E.rates.latency
    assert seconds[0] == pytest.approx(latency + size * 3 / 4 / (1.5 * link))
    assert seconds[1] == pytest.approx(latency + size * 15 / 16 / (3 * link))
    ring = V5E._replace(shape=(16, 16), positions=[divmod(at, 16) for at in range(256)])
    around = Collective("all-reduce", "bf16", size, tuple(range(16)), 1)
    assert ring.collective(around) == pytest.approx(latency + size * 2 * 15 / 16 / (2 * link))


def test_links_of_different_directions_and_axes_are_others():
    """Along a ring of 4, from 0 to 3 is the way back."""
    hardware = V5E._replace(
        machine=TPUS["v5p"], shape=(4, 4, 4), positions=[(at // 16, at // 4 % 4, at % 4) for at in range(64)]
    )
    permute = Collective("collective-permute", "bf16", 1.0, (0, 1, 2, 3), 1)

    def links(pairs: str) -> list[str]:
        attributes = f", source_target_pairs={{{pairs}}}"
        return hardware.links(
            permute, hlo_text.Instruction("p", "collective-permute-start", (), True, (), "", attributes)
        )

    assert links("{0,1},{1,2},{2,3},{3,0}") == ["2 True"] and links("{0,3},{1,0},{2,1},{3,2}") == ["2 False"]
    assert links("{0,16},{16,32}") == ["0 True"]
    both = Collective("all-gather", "bf16", 1.0, tuple(range(16)), 1)
    gather = hlo_text.Instruction("g", "all-gather-start", (), True, (), "", "")
    assert hardware.links(both, gather) == ["1 True", "1 False", "2 True", "2 False"]


def test_gpus_on_several_hosts_share_the_network():
    inside = Collective("all-gather", "bf16", 8e9, tuple(range(8)), 1)
    across = Collective("all-gather", "bf16", 80e9, tuple(range(16)), 1)
    rates = H100.rates
    assert H100.collective(inside) == pytest.approx(rates.latency + 7e9 / (450e9 * rates.link))
    assert H100.collective(across) == pytest.approx(
        rates.latency + max(75e9 / (450e9 * rates.link), 5e9 / (50e9 * rates.network))
    )


def test_a_loop_takes_its_iterations_and_slices_are_all_that_is_moved():
    found = {one.name: one for one in walk("loop", H100)}
    rates, MiB = H100.rates, 2**20
    assert set(found) == {"w", "u", "n"} and {one.times for one in found.values()} == {32}
    bandwidth = 3352.32e9 * rates.memory
    assert found["w"].seconds == pytest.approx(rates.launch + (4 + 2) * MiB / bandwidth, rel=1e-5)
    assert found["n"].seconds == pytest.approx(rates.launch + (4 + 4) * MiB / bandwidth, rel=1e-5)
    assert found["u"].kind == "compute"
    assert found["u"].seconds == pytest.approx(rates.launch + 2 * 1024**3 / (989.4e12 * rates.product))


def test_flops_of_kernels_follow_from_shapes():
    """One product of all scores is 2 B N T^2 H; of 4 x 4 blocks, 10 are not masked out."""
    main = hlo_text.parse(read("kernels")).computations["main"]
    product = 2 * 4 * 32 * 2048**2 * 128
    found = {name: predict.attention_flops(main, one) / product for name, one in main.instructions.items()}
    masked = 10 / 16
    expected = {
        "splash_mha_fwd.1": 2 * masked,
        "splash_mha_fwd.2": 2,
        "splash_mha_dq.1": 3 * masked,
        "splash_mha_dkv.1": 4 * masked,
        "cudnn.1": 2 / 2,
        "cudnn.2": 5,
        "other": 0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
