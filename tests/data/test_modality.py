import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.data.modality import ModalityOrder
from llava_jax.data.plan import Lengths, Order


def grouped(images, tokens, rows_per_group=1, groups=2, seed=0):
    images, tokens = np.array(images), np.array(tokens)
    measured = Lengths(tokens, tokens // 2, images, images)
    rows = rows_per_group * groups
    return ModalityOrder(np.arange(len(images)), rows, seed, lengths=measured, rows_per_group=rows_per_group)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 99)), min_size=1, max_size=60),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_every_sample_once_an_epoch_and_batches_of_one_modality(samples, rows_per_group, groups, seed):
    images, tokens = zip(*samples, strict=True)
    order = grouped(images, tokens, rows_per_group, groups, seed)
    assert order.epoch_steps(0) == Order(np.arange(len(images)), order.batch_rows, seed).epoch_steps(0)
    for epoch in range(2):
        steps = range(order.steps(epoch), order.steps(epoch + 1))
        batches = [[index for row in order.rows(step) for index in row] for step in steps]
        assert sorted(index for batch in batches for index in batch) == list(range(len(images)))
        whole = sum(count // order.batch_rows for count in (np.count_nonzero(images), images.count(0)))
        assert all(len({images[index] > 0 for index in batch}) == 1 for batch in batches[:whole])
        assert len(batches) - whole <= 2


def test_batches_come_in_random_order_and_new_in_each_epoch():
    order = grouped([0, 1] * 200, range(1, 401))
    kinds = [int(order.rows(step)[0][0] % 2) for step in range(order.epoch_steps(0))]
    assert 60 < sum(a != b for a, b in zip(kinds, kinds[1:], strict=False)) < 140
    assert order.rows(0) != order.rows(order.epoch_steps(0))
    again = grouped([0, 1] * 200, range(1, 401))
    assert again.rows(17) == order.rows(17)


def test_groups_of_a_batch_are_equally_long():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 1000, 640)
    order = grouped([1] * 640, tokens, rows_per_group=8, groups=8)
    plain = Order(np.arange(640), 64, 0)

    def spread(order):
        of_groups = order.epoch_rows(0).sums(tokens).reshape(-1, 8, 8).sum(2)
        return np.mean(of_groups.max(1) - of_groups.min(1))

    assert spread(order) < spread(plain) / 10


def test_data_of_one_modality_is_only_shuffled_and_dealt():
    order = grouped([0] * 7, range(1, 8), groups=3)
    assert [len([row for row in order.rows(step) if row]) for step in range(3)] == [3, 3, 1]
