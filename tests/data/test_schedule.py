"""Schedules against the orders that they were written from."""

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.data import schedule
from llava_jax.data.modality import ModalityOrder
from llava_jax.data.packing import pack_order
from llava_jax.data.plan import Lengths, Order, Visits

COUNT = 23
TOKENS = np.random.default_rng(0).integers(1, 40, COUNT).astype(np.int32)
LENGTHS = Lengths(TOKENS, TOKENS // 2, *[(TOKENS % 3 > 0).astype(np.int32)] * 2)

ORDERS = {
    "unpacked": Order(np.arange(COUNT), 4, 1),
    "validation": Order(np.arange(3, COUNT), 4, None),
    "mixture": Order(Visits((np.arange(10), np.arange(10, COUNT)), (0.5, 2.0), 1), 4, 1),
    "packed": pack_order(Order(np.arange(COUNT), 4, 1), LENGTHS, 60, 2, 4),
    "by modality": ModalityOrder(np.arange(COUNT), 4, 1, lengths=LENGTHS, rows_per_group=2),
}


@pytest.mark.parametrize("name", ORDERS)
@given(start=st.integers(0, 20), steps=st.integers(0, 20))
def test_rows_are_those_of_the_order(name, start, steps):
    order = ORDERS[name]
    with tempfile.TemporaryDirectory() as directory:
        written = schedule.write(order, start, start + steps, Path(directory))
        rows = [written.rows(step) for step in range(start, start + steps)]
    assert rows == [order.rows(step) for step in range(start, start + steps)]


def test_what_a_reading_process_is_given_does_not_grow_with_the_data(tmp_path):
    written = schedule.write(Order(np.arange(100_000), 64, 0), 0, 2000, tmp_path)
    assert len(pickle.dumps(written)) < 1000
    assert isinstance(schedule._mapped(tmp_path).samples, np.memmap)
