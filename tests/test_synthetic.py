"""The synthetic data set is like the published one, valid, and the same for a seed."""

from PIL import Image

from benchmarks.synthetic import SUBSETS, main, make_samples
from llava_jax.data.samples import read_sample


def test_subsets_are_those_of_mix665k():
    total = sum(subset.samples for subset in SUBSETS)
    without = sum(subset.samples for subset in SUBSETS if not subset.picture)
    assert total == 665_298 and round(total / without) == 16


def test_samples_are_valid_and_the_same_for_a_seed():
    samples = list(make_samples(300, pictures=7))
    assert not [fault for sample in samples for fault in read_sample(sample).faults]
    assert {sample.get("image") for sample in samples} == {None, *(f"{i:012}.jpg" for i in range(7))}
    assert list(make_samples(300, pictures=7)) == samples == list(make_samples(400, pictures=7))[:300]
    assert list(make_samples(300, pictures=7, seed=1)) != samples


def test_pictures_that_are_there_stay(tmp_path):
    args = ["--json", str(tmp_path / "a.jsonl"), "--samples", "5", "--images", str(tmp_path / "images"), "--pictures"]
    main([*args, "1"])
    (first,) = (tmp_path / "images").iterdir()
    before = first.stat()
    main([*args, "3"])
    assert first.stat() == before and len((tmp_path / "a.jsonl").read_text().splitlines()) == 5
    assert {Image.open(file).mode for file in (tmp_path / "images").iterdir()} == {"RGB"}
    assert len(list((tmp_path / "images").iterdir())) == 3
