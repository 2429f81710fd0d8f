"""Pages of the KV cache: what they hold stays, what begins in the same way is shared, and no answer waits forever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.inference.prefix_cache import Held, PrefixCache

SIZE, MOST = 4, 5  # positions of a page, and pages of an answer


class Memory:
    """A cache with what its pages hold, in which answers are written position by position."""

    def __init__(self, pages: int):
        self.cache, self.pages = PrefixCache(pages, SIZE), np.full((pages, SIZE), -1)

    def read(self, held: Held) -> list[int]:
        return self.pages[held.pages].ravel()[: len(held.contents)].tolist()

    def write(self, held: Held, contents: np.ndarray) -> None:
        """The sequence is these contents now, of which it had the first ones."""
        for position in range(len(held.contents), len(contents)):
            self.pages[held.pages[position // SIZE], position % SIZE] = contents[position]
        held.contents = contents

    def begin(self, contents: np.ndarray, longest: int) -> Held | None:
        placement = self.cache.begin(contents, longest)
        if placement is None:
            return None
        if placement.copy:
            source, target = placement.copy
            self.pages[target] = self.pages[source]
        held = placement.held
        assert self.read(held) == contents[: len(held.contents)].tolist() and len(held.contents) < len(contents)
        self.write(held, contents)
        return held

    def check(self) -> None:
        for held in (*self.cache._running, *self.cache._kept):
            assert self.read(held) == held.contents.tolist()
        users = np.bincount(
            [page for held in (*self.cache._running, *self.cache._kept) for page in held.pages],
            minlength=len(self.pages),
        )
        np.testing.assert_array_equal(users, self.cache._users)
        assert sorted(self.cache._free) == np.flatnonzero(users == 0).tolist()


answers = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=3 * SIZE),  # the prompt
        st.integers(1, 2 * SIZE),  # the most tokens of the answer
        st.integers(1, 2 * SIZE),  # those it has
    ),
    min_size=1,
    max_size=20,
)


@given(answers, st.integers(MOST + 1, 3 * MOST), st.integers(1, 6), st.randoms())
def test_all_answers_end_and_nothing_that_is_held_is_overwritten(asked, pages, slots, random):
    memory, waiting = Memory(pages), [(np.array(prompt), *rest) for prompt, *rest in asked]
    running: list[tuple[Held, int, int]] = []
    done = 0
    while waiting or running:
        progress = False
        while waiting and len(running) < slots:
            prompt, most, tokens = waiting[0]
            held = memory.begin(prompt, len(prompt) + most)
            memory.check()
            if held is None:
                break
            progress = True
            waiting.pop(0)
            running.append((held, min(tokens, most), len(prompt)))
        random.shuffle(running)
        for one in list(running):
            held, tokens, length = one
            if len(held.contents) == length + tokens or random.random() < 0.05:  # or cancelled
                memory.cache.end(held)
                running.remove(one)
                done, progress = done + 1, True
            elif memory.cache.extend(held, len(held.contents) + 1):
                memory.write(held, np.append(held.contents, random.randint(0, 1)))
                progress = True
            memory.check()
        assert progress, "all answers wait for each other"
    assert done == len(asked) and memory.cache.in_use == 0


def test_what_a_prompt_begins_like_is_shared_and_only_a_part_of_a_page_is_copied():
    memory = Memory(8)
    first = memory.begin(np.arange(10), 12)
    second = memory.begin(np.array([*range(9), 77, 78]), 12)
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert memory.cache.in_use == 4
    memory.cache.end(first)
    assert memory.cache.known(np.arange(11)) == 10
    assert memory.cache.known(np.arange(10)) == 9  # the last position gives a token
    memory.check()


def test_an_answer_waits_where_others_could_not_end_any_more():
    """Two answers of up to five pages in six: both begin, and one becomes longer."""
    memory = Memory(MOST + 1)
    one, other = (memory.begin(np.full(SIZE, number), MOST * SIZE) for number in (1, 2))
    assert memory.begin(np.full(SIZE, 3), MOST * SIZE) is None
    assert memory.cache.extend(one, 2 * SIZE) and not memory.cache.extend(other, 2 * SIZE)
    assert memory.cache.extend(one, MOST * SIZE)
    memory.cache.end(one)
    assert memory.cache.extend(other, MOST * SIZE)


@pytest.mark.parametrize("recent", [0, 1, 2])
def test_the_least_recently_used_is_given_up_first(recent):
    memory = Memory(7)
    for number in range(3):
        memory.cache.end(memory.begin(np.full(2 * SIZE, number), 2 * SIZE))
    again = np.append(np.full(2 * SIZE, recent), 9)
    memory.cache.end(memory.begin(again, 3 * SIZE))
    memory.cache.end(memory.begin(np.full(2 * SIZE, 7), 2 * SIZE))
    known = [memory.cache.known(np.full(2 * SIZE + 1, number)) for number in range(3)]
    assert known[recent] == 2 * SIZE and known[next(n for n in range(3) if n != recent)] == 0
