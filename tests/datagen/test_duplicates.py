"""Near-duplicates by MinHash."""

import random

from hypothesis import given
from hypothesis import strategies as st

from llava_jax.datagen.duplicates import RUN, near_duplicates, signature

WORDS = [f"w{i}" for i in range(2000)]


def text(rng: random.Random, words: int = 150) -> list[str]:
    return [rng.choice(WORDS) for _ in range(words)]


def runs(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def test_signatures_estimate_the_share_of_common_runs():
    rng = random.Random(0)
    for changes in (0, 2, 5, 15, 40):
        errors = []
        for _ in range(30):
            one = text(rng)
            other = list(one)
            for i in rng.sample(range(len(one)), changes):
                other[i] = rng.choice(WORDS)
            similarity = len(runs(one) & runs(other)) / len(runs(one) | runs(other))
            errors.append((signature(" ".join(one)) == signature(" ".join(other))).mean() - similarity)
        assert abs(sum(errors) / len(errors)) < 0.03 and max(map(abs, errors)) < 0.25


def test_later_ones_are_duplicates_of_earlier_ones():
    rng = random.Random(1)
    words = [text(rng) for _ in range(50)]
    near = [*words[7][:100], "changed", *words[7][101:]]
    texts = [" ".join(each) for each in [*words, near, words[3], words[3]]]
    assert near_duplicates(texts) == {50: 7, 51: 3, 52: 3}
    assert near_duplicates(["Yes.", "No.", "yes", ""]) == {2: 0}
    assert near_duplicates([]) == {}


@given(st.lists(st.sampled_from(["a b c d e f", "A b c d e f!", "g h i j k", "a b c d x y", ""]), max_size=12))
def test_nothing_is_the_duplicate_of_what_is_one_itself(texts: list[str]):
    found = near_duplicates(texts)
    assert all(original < i and original not in found for i, original in found.items())
    assert all(i in found or texts[i] not in texts[:i] for i in range(len(texts)))
