import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.data.packing import PackedOrder, Room, fill, image_slot_plans, pack, pack_order
from llava_jax.data.plan import Lengths, Order, plan_layout

LENGTH = 40
GOLDEN = (
    "[[(3, 0), (), (8, 7), (6,)], [(4, 9, 1, 5), (2,), (), ()], "
    "[(1, 3), (0, 2), (9, 7), ()], [(6,), (4, 8, 5), (), ()]]"
)


def lengths(samples):
    """(tokens, images) of each; every second token is a target."""
    tokens, images = (np.array(values, np.int32) for values in zip(*samples, strict=True))
    return Lengths(tokens, tokens // 2, images, images)


SAMPLES = st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, 3)), min_size=1, max_size=60)


def mixture(count, seed=0):
    """Lengths like those of visual instructions in small: images of 23 positions, one sample in 16 without."""
    rng = np.random.default_rng(seed)
    images = (rng.random(count) > 1 / 16).astype(np.int32)
    texts = np.where(images, 3 + rng.gamma(2, 4, count), 8 + rng.gamma(2, 20, count)).astype(np.int32)
    tokens = np.minimum(23 * images + texts, 82).astype(np.int32)
    return Lengths(tokens, texts // 3 + 1, images, images)


@given(SAMPLES, st.integers(1, 5), st.integers(3, 9), st.integers(1, 9), st.integers(0, 9) | st.none())
def test_every_sample_once_an_epoch_and_nothing_overflows(samples, rows_per_group, image_slots, groups, seed):
    measured, indices = lengths(samples), np.arange(len(samples))
    order = pack_order(Order(indices, groups * rows_per_group, seed), measured, LENGTH, rows_per_group, image_slots)
    step = 0
    for epoch in range(2):
        rows = [row for k in range(step, step + order.epoch_steps(epoch)) for row in order.rows(k)]
        step += order.epoch_steps(epoch)
        assert sorted(index for row in rows for index in row) == indices.tolist()
        assert all(measured.tokens[list(row)].sum() <= LENGTH for row in rows)
        of_groups = np.array([measured.images[list(row)].sum() for row in rows]).reshape(-1, rows_per_group)
        assert of_groups.sum(1).max() <= image_slots
        assert not any(order.epoch_rows(epoch).row(order.epoch_rows(epoch).count))
    assert order.steps(2) == step


@given(SAMPLES, st.integers(1, 4), st.integers(0, 5))
def test_any_step_alone_is_the_step_of_the_whole(samples, rows_per_group, seed):
    def order():
        return pack_order(
            Order(np.arange(len(samples)), 2 * rows_per_group, seed), lengths(samples), LENGTH, rows_per_group, 4
        )

    whole = order()
    steps = [whole.rows(step) for step in range(whole.steps(3))]
    for step in (len(steps) - 1, len(steps) // 2, 0):
        assert order().rows(step) == steps[step]


def test_the_plan_is_the_same_everywhere():
    """Golden values: a change here would change the order of every run that is resumed."""
    code = (
        "import numpy as np; from llava_jax.data.packing import pack_order; from llava_jax.data.plan import *\n"
        "tokens = np.array([9, 9, 30, 31, 12, 5, 40, 17, 23, 9]); images = np.array([1, 0, 1, 0, 1, 0, 2, 1, 0, 1])\n"
        "order = pack_order(Order(np.arange(10), 4, 5), Lengths(tokens, tokens, images, images), 40, 2, 3)\n"
        "print([order.rows(step) for step in range(4)])"
    )
    for hashes in ("0", "7"):
        ran = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hashes}, capture_output=True, text=True
        )
        assert ran.stdout.strip() == GOLDEN, ran.stderr


def test_epochs_differ_in_their_rows_and_validation_does_not():
    measured = mixture(400)
    shuffled, fixed = (pack_order(Order(np.arange(400), 8, seed), measured, 164, 4, 19) for seed in (0, None))
    first, second = ({frozenset(row) for row in map(shuffled.epoch_rows(e).row, range(60))} for e in range(2))
    assert len(first & second) < len(first) / 10
    assert fixed.rows(1) == fixed.rows(1 + fixed.epoch_steps(0))


def test_rows_and_image_slots_are_full():
    """Twenty thousand samples, since there is always a remainder."""
    best, *others = image_slot_plans(Order(np.arange(20_000), 32, 0), mixture(20_000), 164, 4)
    report = fill(best)
    assert report.tokens > 0.96 and report.images > 0.95
    assert all(fill(other).used <= report.used for other in others)
    assert report.samples_a_row * report.rows == 20_000 and report.groups * 4 == report.rows


def test_samples_without_images_are_spread():
    measured = mixture(5000)
    order = pack_order(Order(np.arange(5000), 32, 0), measured, 164, 4, 19)
    texts = order.epoch_rows(0).sums(measured.images == 0).reshape(-1, 4).sum(1)
    assert np.percentile(texts, 99) <= 4 * texts.mean()


def test_data_without_images_needs_no_slots():
    measured = lengths([(9, 0), (20, 0), (31, 0)])
    (plan,) = image_slot_plans(Order(np.arange(3), 2, 0), measured, LENGTH, 1)
    assert plan.room == Room(LENGTH, 1, 0) and fill(plan).images == 1.0
    assert sorted(map(len, plan.rows(0))) == [1, 2]


def test_parts_of_an_epoch_and_layouts():
    measured = mixture(100)
    order = pack_order(Order(np.arange(100), 4, 0), measured, 164, 2, 10)
    first, second = order.epoch_steps(0), order.epoch_steps(1)
    assert order.steps(0.5) == -(-first // 2) and order.steps(1) == first
    assert order.steps(1.5) == first + -(-second // 2)
    layout = plan_layout(
        [(order, order.steps(2))], measured, rows_per_group=2, max_length=164, image_tokens=23, image_size=8
    )
    assert layout.image_slots <= 10
    assert layout.label_slots == max(fill(order, epoch).label_slots for epoch in range(2))


def test_a_sample_with_more_images_than_a_group_has_slots_is_refused():
    with pytest.raises(ValueError, match="a sample has 3 images, a group 2 slots"):
        pack_order(Order(np.arange(2), 2, 0), lengths([(9, 3), (9, 0)]), LENGTH, 1, 2)


def test_rows_that_fit_exactly_are_found():
    """Three samples a row and none left over, if rows are closed by pairs that fit."""
    tokens = np.array([20, 13, 7] * 30)
    groups = pack(tokens, np.zeros(90, np.int64), Room(40, 1, 0))
    assert len(groups) <= 31


def test_plans_are_kept_and_travel(monkeypatch):
    order = pack_order(Order(np.arange(50), 4, 0), mixture(50), 164, 2, 10)
    rows = order.rows(0)
    travelled = pickle.loads(pickle.dumps(order))
    monkeypatch.setattr(PackedOrder, "_plan", None)
    assert travelled.rows(0) == rows
