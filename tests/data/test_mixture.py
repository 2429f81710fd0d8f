"""Several sets as one source, and how often an epoch visits each of their samples."""

import collections
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.data import build
from llava_jax.data.mixture import Mixture, check_folders, open_data, visits
from llava_jax.data.plan import Lengths, Order, Visits, split
from llava_jax.data.sources import LlavaJson


def config(**data) -> ConfigDict:
    return ConfigDict({"json": "", "images": "", "built": "", "mixture": ()} | data)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[dict[str, str], dict[str, str]]:
    """Twelve samples as JSON and five others built, as entries of a mixture."""
    root = tmp_path_factory.mktemp("sets")
    (file, images), (other, others) = tiny.data(root / "a"), tiny.data(root / "b", 5)
    other.write_text(other.read_text().replace("sample-", "other-"))
    build.main(["--json", str(other), "--images", str(others), "--output", str(root / "built"), "--shards", "2"])
    return {"json": str(file), "images": str(images)}, {"built": str(root / "built")}


def test_a_mixture_is_its_sets_one_after_the_other(sets):
    alone = [open_data(config(**entry)) for entry in sets]
    both = open_data(config(mixture=(sets[0], sets[1] | {"weight": 0.5})))
    assert list(both) == [*alone[0], *alone[1]] and len(both) == 17
    assert both[12].id == both[-5].id == "other-0" and both.weights == (1.0, 0.5)
    for index in (0, 3, 11, 12, 16):
        source, place = (alone[0], index) if index < 12 else (alone[1], index - 12)
        names = both[index].images
        assert both.read_images(index, names) == source.read_images(place, names)
    digests = {both.digest, alone[0].digest, open_data(config(mixture=sets[::-1])).digest}
    assert len(digests) == 3 and open_data(config(mixture=sets)).digest == both.digest


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.floats(0.04, 3.5)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    epochs=st.integers(1, 6),
)
def test_every_sample_is_visited_by_its_weight_in_each_epoch_and_in_all_together(sizes, seed, epochs):
    starts = np.cumsum([0, *(size for size, _ in sizes)])
    sets = tuple(np.arange(a, b) * 2 for a, b in zip(starts, starts[1:], strict=False))
    mixture = Visits(sets, tuple(weight for _, weight in sizes), seed)
    total = collections.Counter()
    for epoch in range(epochs):
        visited = mixture.epoch(epoch)
        assert len(visited) == len(mixture)
        counts = collections.Counter(visited.tolist())
        total += counts
        for chosen, weight in zip(sets, mixture.weights, strict=True):
            times = [counts[index] for index in chosen.tolist()]
            assert sum(times) == round(len(chosen) * weight)
            assert set(times) <= {math.floor(weight), math.ceil(weight)}
    for chosen in sets:
        times = [total[index] for index in chosen.tolist()]
        assert max(times) - min(times) <= 1


def test_parts_depend_on_seed_and_epoch_alone():
    def visited(seed, epoch):
        return Visits((np.arange(100), np.arange(100, 150)), (0.5, 1.0), seed).epoch(epoch).tolist()

    assert visited(0, 1) == visited(0, 1)
    assert len({tuple(visited(seed, epoch)[:50]) for seed in range(2) for epoch in range(2)}) == 4
    assert sorted(visited(0, 0)[:50] + visited(0, 1)[:50]) == list(range(100))  # two halves are the whole
    assert visited(3, 7)[50:] == list(range(100, 150))


def test_steps_of_a_mixture_are_random_access():
    mixture = Visits((np.arange(10), np.arange(10, 14)), (0.7, 2.0), 5)
    order = Order(mixture, 4, 5)
    assert order.epoch_steps(0) == 4  # 7 + 8 samples
    seen = [[index for row in order.rows(step) for index in row] for step in range(12)]
    for epoch in range(3):
        visited = [index for step in seen[4 * epoch : 4 * epoch + 4] for index in step]
        assert sorted(visited) == sorted(mixture.epoch(epoch).tolist())
    again = Order(Visits(mixture.sets, mixture.weights, 5), 4, 5)
    assert [index for row in again.rows(9) for index in row] == seen[9]


def test_held_out_samples_are_left_out_of_each_set(sets):
    source = open_data(config(mixture=(sets[0] | {"weight": 2}, sets[1])))
    training, held_out = split(len(source), 6, seed=0)
    visited = visits(source, training, seed=0).epoch(0)
    assert collections.Counter(visited.tolist()) == {i: 2 if i < 12 else 1 for i in set(range(17)) - set(held_out)}
    plain = open_data(config(**sets[0]))
    assert visits(plain, training, seed=0) is training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "config.data names no data: set json .with images. or built"),
        ({"images": "x"}, "names no data"),
        ({"json": "a", "built": "b"}, "config.data names both json .with images. and built"),
        ({"built": "b", "images": "x"}, "config.data.images is set, but b holds its own images"),
        ({"json": "a", "mixture": ({"json": "a"},)}, "mixture stands beside config.data.json"),
        ({"mixture": ("a.json",)}, r"mixture\[0\] is 'a.json': it has to be a dict of built, images, json, weight"),
        ({"mixture": ({"jsn": "a"},)}, "has to be a dict of"),
        ({"mixture": ({"json": ["a", "b"]},)}, r"mixture\[0\].json is \['a', 'b'\]: it has to be one path"),
        ({"mixture": ({"json": "a", "weight": 0},)}, r"mixture\[0\]: a weight has to be a number above 0, not 0"),
        ({"mixture": ({"json": "a", "weight": "2"},)}, "a number above 0, not '2'"),
        ({"mixture": ({"weight": 2},)}, r"config.data.mixture\[0\] names no data"),
    ],
)
def test_what_names_no_data_or_too_much_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        open_data(config(**data))


def test_a_part_of_nothing_is_refused(sets):
    source = open_data(config(mixture=(sets[0], sets[1] | {"weight": 0.1})))
    with pytest.raises(UserError, match="weight 0.1 of 5 samples is less than one an epoch"):
        visits(source, np.arange(17), 0)


def test_each_set_with_pictures_needs_its_folder(sets, tmp_path):
    file = sets[0]["json"]
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([sample for sample in json.loads(Path(file).read_text()) if "image" not in sample]))

    def check(*entries):
        source = open_data(config(mixture=entries))
        images = np.array([len(sample.images) for sample in source])
        check_folders(source, Lengths(*[images] * 4))

    check(*sets, {"json": str(texts)})
    with pytest.raises(UserError, match=f"{file} has samples with images: give their folder"):
        check(sets[1], {"json": file})
    with pytest.raises(UserError, match=f"nowhere: no such folder of images .of {file}"):
        check({"json": file, "images": str(tmp_path / "nowhere")}, sets[1])


def test_an_entry_stands_on_the_command_line(sets, tmp_path):
    """What `--config.data.mixture=...` makes of it is what the code takes."""
    from ml_collections.config_flags import tuple_parser

    entries = tuple_parser.TupleParser().parse(f"({sets[0]!r}, {sets[1] | {'weight': 0.5}!r})")
    source = open_data(config(mixture=entries))
    assert isinstance(source, Mixture) and isinstance(source.sources[0], LlavaJson) and source.weights == (1.0, 0.5)
