import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.data.plan import Lengths, Order, permutation, plan_layout, split

GOLDEN = [6, 3, 4, 2, 1, 7, 5, 0]
SHAPES = {"max_length": 16, "image_tokens": 4, "image_size": 8}


def lengths(targets, images):
    return Lengths(
        tokens=np.full(len(targets), 9), targets=np.array(targets), tiles=np.array(images), images=np.array(images)
    )


def plan(schedules, lengths, rows_per_group=1, **slots):
    return plan_layout(schedules, lengths, rows_per_group=rows_per_group, **SHAPES, **slots)


@given(count=st.integers(0, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_permutation_permutes_and_depends_on_its_key_alone(count, seed, epoch):
    order = permutation(count, "epoch", seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    permutation.cache_clear()
    np.testing.assert_array_equal(order, permutation(count, "epoch", seed, epoch))


def test_permutation_is_the_same_everywhere():
    """Golden values: a change here would change the order of every run that is resumed."""
    assert permutation(8, "epoch", 0, 0).tolist() == GOLDEN
    code = "from llava_jax.data.plan import permutation; print(permutation(8, 'epoch', 0, 0).tolist())"
    other = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert other.stdout.strip() == str(GOLDEN)


@pytest.mark.parametrize(
    "other", [("epoch", 1, 0), ("epoch", 0, 1), ("held out", 0), ("epoch", 11, 0), ("epoch", 1, 10)]
)
def test_permutations_of_different_keys_differ(other):
    assert permutation(100, *other).tolist() != permutation(100, "epoch", 0, 0).tolist()


@given(num_samples=st.integers(1, 100), held_out=st.integers(0, 99), seed=st.integers(0, 99))
def test_split_parts_the_samples(num_samples, held_out, seed):
    if held_out >= num_samples:
        with pytest.raises(UserError, match=f"hold out {held_out} of {num_samples}"):
            split(num_samples, held_out, seed)
        return
    train, valid = split(num_samples, held_out, seed)
    assert len(valid) == held_out
    assert sorted([*train.tolist(), *valid.tolist()]) == list(range(num_samples))
    assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()


def test_split_depends_on_the_seed():
    assert split(100, 10, 0)[1].tolist() != split(100, 10, 1)[1].tolist()


def test_split_of_nothing_is_refused():
    with pytest.raises(UserError, match="no samples"):
        split(0, 0, 0)


@given(count=st.integers(1, 60), batch_rows=st.integers(1, 12), seed=st.integers(0, 9) | st.none())
def test_every_sample_once_an_epoch(count, batch_rows, seed):
    order = Order(np.arange(count) * 3, batch_rows, seed)
    for epoch in range(3):
        steps = range(epoch * order.epoch_steps(0), (epoch + 1) * order.epoch_steps(0))
        rows = [row for step in steps for row in order.rows(step)]
        assert len(rows) == len(steps) * batch_rows
        indices = [index for row in rows for index in row]
        assert sorted(indices) == [3 * i for i in range(count)]
        assert all(rows[: len(indices)])  # empty rows stand last


def test_parts_of_epochs_are_rounded_up_to_whole_steps():
    order = Order(np.arange(100), 10, 0)
    assert [order.steps(epochs) for epochs in (1, 1.1, 1.11, 0.01)] == [10, 11, 12, 1]


def test_epochs_are_shuffled_and_validation_is_not():
    orders = {seed: [Order(np.arange(50), 50, seed).rows(epoch) for epoch in range(2)] for seed in (0, 1, None)}
    assert orders[0][0] != orders[0][1] and orders[0] != orders[1]
    assert orders[None][0] == orders[None][1] == [(i,) for i in range(50)]


def test_steps_of_parts_of_an_epoch():
    order = Order(np.arange(20), 2, 0)
    assert (order.steps(3), order.steps(0.25), order.steps(1.01)) == (30, 3, 11)


@given(
    samples=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=30),
    groups=st.integers(1, 4),
    rows_per_group=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_automatic_slots_are_the_least_that_suffices(samples, groups, rows_per_group, epochs):
    measured = lengths(*zip(*samples, strict=True))
    order = Order(np.arange(len(samples)), groups * rows_per_group, seed=0)
    steps = epochs * order.epoch_steps(0)
    layout = plan([(order, steps)], measured, rows_per_group)
    used = []
    for step in range(steps):
        rows = order.rows(step)
        for group in range(groups):
            members = [i for row in rows[group * rows_per_group : (group + 1) * rows_per_group] for i in row]
            used.append((measured.targets[members].sum(), measured.images[members].sum()))
    targets, images = zip(*used, strict=True)
    assert (layout.label_slots, layout.image_slots) == (max(targets), max(images))
    assert layout.groups == groups


def test_slots_fit_the_steps_of_all_schedules():
    measured = lengths(targets=[1, 1, 7], images=[0, 0, 2])
    train, valid = (Order(np.array(samples), 1, None) for samples in ([0, 1], [2]))
    assert plan([(train, 2)], measured).label_slots == 1
    both = plan([(train, 2), (valid, 1)], measured)
    assert (both.label_slots, both.image_slots) == (7, 2)


def test_wanted_slots():
    schedules = [(Order(np.arange(2), 2, 0), 1)]
    measured = lengths(targets=[3, 4], images=[1, 1])
    layout = plan(schedules, measured, 2, image_slots=5, label_slots=7)
    assert (layout.image_slots, layout.label_slots) == (5, 7)
    with pytest.raises(UserError, match="image_slots=1 is too few: a group of 2 rows needs 2"):
        plan(schedules, measured, 2, image_slots=1)
    with pytest.raises(UserError, match="label_slots=6 is too few: a group of 2 rows needs 7"):
        plan(schedules, measured, 2, label_slots=6)


@pytest.mark.parametrize("rows_per_group", [0, 3, 8])
def test_rows_must_divide_into_groups(rows_per_group):
    with pytest.raises(UserError, match=f"batch_rows=4 is no multiple of rows_per_group={rows_per_group}"):
        plan([(Order(np.arange(4), 4, 0), 1)], lengths([1] * 4, [0] * 4), rows_per_group)
