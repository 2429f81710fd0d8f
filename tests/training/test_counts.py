"""What a run compiles and copies, in counts that no machine changes. If one changes, say why in the commit."""

import collections

import jax
import pytest
from jax._src.array import ArrayImpl
from training_runs import run_config

from llava_jax.training import loop

STEPS = 6


@pytest.fixture
def counts(monkeypatch):
    """Programs compiled, batches copied to the devices, and arrays copied from them."""
    found: collections.Counter[str] = collections.Counter()

    def listen(event: str, duration: float, **_) -> None:
        found["programs"] += event.endswith("backend_compile_duration")

    put, value = jax.make_array_from_process_local_data, ArrayImpl._value.fget

    def counted_put(*args, **options):
        found["batches"] += 1
        return put(*args, **options)

    def counted_value(array):
        found["arrays"] += array._npy_value is None
        return value(array)

    monkeypatch.setattr(jax, "make_array_from_process_local_data", counted_put)
    monkeypatch.setattr(ArrayImpl, "_value", property(counted_value))
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_compiles_and_copies_no_more_than_it_did(world, tmp_path, counts):
    jax.clear_caches()
    loop.train(run_config(world, steps=STEPS), str(tmp_path / "run"))
    first = dict(counts)
    counts.clear()
    jax.clear_caches()
    loop.train(run_config(world, steps=2 * STEPS), str(tmp_path / "longer"))
    a_step = {name: (counts[name] - first[name]) / STEPS for name in counts}
    assert a_step == {"programs": 0, "batches": 1, "arrays": 3}  # the loss, the norm of the gradient, a learning rate
    assert first["programs"] <= 15
