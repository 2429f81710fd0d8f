"""Where most positions are padding, the settings that are named mend it; elsewhere nothing is said."""

import re

import numpy as np
import pytest

from llava_jax.data.modality import ModalityOrder
from llava_jax.data.packing import fill, pack_order
from llava_jax.data.padding import padding_of_run, padding_of_samples
from llava_jax.data.plan import Lengths, Order


def lengths_of(tokens, images=1) -> Lengths:
    tokens = np.asarray(tokens, np.int32)
    return Lengths(tokens, tokens // 4, *[np.full(len(tokens), images, np.int32)] * 2)


def named(line: str, key: str) -> int | None:
    found = re.search(rf"--config\.{key}=(\d+)", line)
    return int(found[1]) if found else None


def left(line: str, key: str) -> float:
    return int(re.search(rf"--config\.{key}=[^;]*? leaves (\d+)%", line)[1]) / 100


def test_where_half_is_used_nothing_is_said():
    tokens = np.arange(521, 1545, 8)
    assert padding_of_samples(lengths_of(tokens), 2048) is None
    order = Order(np.arange(len(tokens)), 16, 0)
    assert padding_of_run(order, lengths_of(tokens), 2048) is None


def test_a_shorter_length_cuts_no_sample():
    tokens = np.full(100, 300)
    tokens[7] = 340
    line = padding_of_samples(lengths_of(tokens), 2048)
    assert line.startswith("85% of positions: ") and named(line, "max_length") == 384
    assert left(line, "max_length") == pytest.approx(1 - tokens.mean() / 384, abs=0.01)
    assert (
        named(padding_of_samples(lengths_of(np.full(10, 20)), 64), "max_length") == 20
    )  # no multiple of 128 is shorter


def test_packing_mends_what_a_few_long_samples_cost():
    rng = np.random.default_rng(0)
    tokens = np.append(rng.integers(100, 400, 500), 2000)
    lengths = lengths_of(tokens)
    order = Order(np.arange(len(tokens)), 4, 0)
    line = padding_of_run(order, lengths, 2048)
    assert named(line, "max_length") is None and "--config.pack=True leaves" in line
    packed = pack_order(order, lengths, 2048, 1, int(2048 / 100))
    assert left(line, "pack") == pytest.approx(1 - fill(packed).tokens, abs=0.05)
    assert padding_of_run(packed, lengths, 2048) is None


def test_a_packed_run_of_rows_that_its_few_samples_do_not_fill():
    lengths = lengths_of(np.full(12, 50))
    packed = pack_order(Order(np.arange(12), 1, 0), lengths, 2048, 1, 12)
    line = padding_of_run(packed, lengths, 2048)
    assert line.startswith("71% of positions: --config.pack=True --config.row_length=1024 --config.image_slots=0")
    assert left(line, "pack") == pytest.approx(1 - 600 / 1024, abs=0.01)


def test_a_packed_run_with_too_few_image_slots():
    lengths = lengths_of(np.full(400, 100))
    order = Order(np.arange(400), 4, 0)
    packed = pack_order(order, lengths, 2048, 2, 4)
    line = padding_of_run(packed, lengths, 2048)
    assert line.startswith("90% of positions") and "--config.image_slots=0" in line and left(line, "pack") < 0.1


def test_rows_that_only_fill_up_a_step():
    lengths = lengths_of(np.full(10, 60))
    line = padding_of_run(Order(np.arange(10), 64, 0), lengths, 64)
    assert line == "85% of positions: an epoch has 10 rows; lower --config.batch_rows=64"


def test_grouping_by_modality_excludes_packing():
    lengths = lengths_of(np.append(np.full(64, 100), 2000))
    order = ModalityOrder(np.arange(65), 4, 0, lengths=lengths, rows_per_group=1)
    assert "--config.pack=True --config.group_by_modality=False leaves" in padding_of_run(order, lengths, 2048)


def test_samples_with_faults_take_no_positions():
    assert padding_of_samples(lengths_of(np.zeros(4)), 2048) is None
    assert padding_of_samples(lengths_of([0, 0, 2000]), 2048) is None
