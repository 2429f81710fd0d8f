"""Targets: their names, missing wheels, and a process that stays as it was."""

import importlib.util

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llava_jax.cli import UserError
from llava_jax.parallel import hardware
from llava_jax.preflight import targets

targets.prepare_environment()


@pytest.mark.parametrize(
    "name,devices,platform",
    [
        ("v4:2x2x1", 4, "tpu"),
        ("v5e:1x1", 1, "tpu"),
        ("v5e:4x4", 16, "tpu"),
        ("v5p:2x2x2", 8, "tpu"),
        ("v6e:2x4", 8, "tpu"),
        ("7x:2x2x1", 8, "tpu"),  # two a chip
        ("a100:8", 8, "gpu"),
        ("h100:2x8", 16, "gpu"),
        ("h200:1", 1, "gpu"),
        ("b200:8", 8, "gpu"),
        ("cpu", jax.device_count("cpu"), "cpu"),
    ],
)
def test_names_become_devices(name, devices, platform):
    target = targets.parse(name)
    found = targets.devices(target)
    assert len(found) == target.devices == devices
    assert target.platform == found[0].platform == platform
    if target.machine:
        assert found[0].device_kind == target.machine.kind
        assert hardware.peak_flops(found[0].device_kind) == target.machine.flops
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    "name,message",
    [
        ("v9:2x2", "no such machine; known are v5e:4x4"),
        ("h100", "has no size: give one, for example h100:8"),
        ("h100:9", "hosts of up to 8 GPUs"),
        ("v5e:2x2x2", "v5e slices have 2 axes"),
        ("v5e:2x3", "libtpu refuses it"),
        ("cpu:2", "no such machine"),
    ],
)
def test_mistaken_names(name, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        targets.devices(targets.parse(name))
    assert "\n" not in str(error.value)


def test_every_usual_slice_exists():
    for tpu in hardware.TPUS.values():
        sizes = [targets.parse(name).devices for name in targets.family(tpu.name)]
        assert sizes == sorted(sizes)
        for name in targets.family(tpu.name)[:4]:
            assert len(targets.devices(targets.parse(name))) == targets.parse(name).devices
    assert targets.parse("v5e:4x4").larger[0] == "v5e:4x8"
    assert targets.parse("h100:4").larger[0] == "h100:8"


@pytest.mark.parametrize("name,wheel,extra", [("v5e:2x2", "libtpu", "preflight-tpu"), ("h100:8", "jax_plugins", "gpu")])
def test_a_missing_wheel_is_named_with_its_extra(name, wheel, extra, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == wheel else find(module))
    with pytest.raises(UserError, match=rf"--target {name} needs .*pip install 'llava_jax\[.*{extra}\]'"):
        targets.devices(targets.parse(name))


def test_a_process_that_has_looked_for_gpus_is_told_what_to_do(monkeypatch):
    """As in a notebook on a machine with the CUDA plugin and no driver."""

    def refuse(**options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(UserError, match="h100:8: the CUDA plugin refuses it .*set JAX_PLATFORMS=cpu before JAX is im"):
        targets.devices(targets.parse("h100:8"))


def test_links_of_slices():
    """A grid of 4 x 4 has 24 links, two directions each, for 16 devices; the full 16 x 16 closes to rings."""
    v5e, v5p = hardware.TPUS["v5e"], hardware.TPUS["v5p"]
    assert targets.parse("v5e:4x4").send_rate == 48 / 16 * v5e.link
    assert targets.parse("v5e:16x16").send_rate == 4 * v5e.link
    assert targets.parse("v5p:4x4x4").send_rate == 6 * v5p.link
    assert targets.parse("v5p:2x2x1").send_rate == 2 * v5p.link


def test_cudnn_is_assumed_only_within():
    from jax._src.cudnn import fused_attention_stablehlo

    before = fused_attention_stablehlo.check_cudnn_version
    with pytest.raises(RuntimeError), targets.assumed_cudnn():
        assert fused_attention_stablehlo.check_cudnn_version() >= 91000
        raise RuntimeError
    assert fused_attention_stablehlo.check_cudnn_version is before


def test_the_compilation_cache_is_off_within_and_back_afterwards(tmp_path):
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.set_cache_dir(str(tmp_path))
    try:
        with targets.nothing_cached():
            jax.jit(lambda x: x * 3 + 1)(1.0)
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x * 3 + 2)(1.0)
        assert "/jax/compilation_cache/cache_misses" in events and list(tmp_path.glob("*-cache"))
    finally:
        compilation_cache.reset_cache()
        compilation_cache.set_cache_dir(before)
