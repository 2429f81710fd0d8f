"""Records stream out of files block by block as if these were parsed at once, and are found again by their place."""

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.data import records
from llava_jax.data.records import RecordFile, load_json, scan

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(TEXT, value, max_size=3),
    max_leaves=8,
)


def read(path):
    """What a file holds by the stream, and by random access to the places that the stream told."""
    found = list(scan(path, path))
    values = [load_json(r.value, r.where) if isinstance(r.value, bytes) else r.value for r in found]
    at_random = RecordFile(path, [r.start for r in found], [r.stop for r in found])
    assert [load_json(at_random[r.index], r.where) for r in found] == values
    return values


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("records") / "data"


@given(
    values=st.lists(VALUES, min_size=1, max_size=5),
    block=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    around=st.text(" \t\r\n", max_size=3),
)
def test_arrays_in_blocks_of_any_size(path, values, block, ascii_only, indent, around):
    text = around + json.dumps(values, ensure_ascii=ascii_only, indent=indent) + around
    path.write_bytes(text.encode("utf-8-sig"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BLOCK", block)
        assert read(path) == values


@given(value=VALUES, cut=st.integers(0), swap=st.characters(codec="ascii"), block=st.integers(1, 40))
def test_arrays_that_are_no_json_are_refused_where_they_break(path, value, cut, swap, block):
    text = json.dumps([value, {"id": "x"}], indent=1)
    cut %= len(text) - 1
    text = text[: 1 + cut] + swap + text[2 + cut :]
    path.write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BLOCK", block)
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(UserError) as caught:
                read(path)
            place = f"line {error.lineno} column {error.colno} (byte {error.pos})"
            assert str(caught.value).endswith(f"{error.msg}: {place}")
        else:
            assert read(path) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines(path, end):
    values = [{"a": "é\u2028"}, 1, [2]]
    path.write_bytes((end * 2).join(json.dumps(v, ensure_ascii=False) for v in values).encode("utf-8-sig"))
    assert read(path) == values
    assert [record.where for record in scan(path, "F")] == ["F: line 1", "F: line 3", "F: line 5"]


def test_lines_that_are_no_json_hide_no_others(path):
    path.write_text('{}\n{"a\n[1]\n')
    assert [record.value for record in scan(path, "F")] == [b"{}", b'{"a', b"[1]"]


@pytest.mark.parametrize("text", ['[1, "' + "x" * 99 + '"]', '[{"a": "' + "x" * 99, "1\n" + "x" * 99])
def test_records_that_never_end_are_refused(path, text, monkeypatch):
    monkeypatch.setattr(records, "BLOCK", 8)
    monkeypatch.setattr(records, "LONGEST", 50)
    path.write_text(text)
    with pytest.raises(UserError, match=r"F: (line 2|a sample at byte \d+) takes more than"):
        list(scan(path, "F"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_values_nested_too_deeply_are_refused(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match="nested too deeply|is no JSON"):
        read(path)


def test_memory_does_not_grow_with_the_file(path, monkeypatch):
    """No more of a file is held than a record and a block."""
    monkeypatch.setattr(records, "BLOCK", 1000)
    longest, grow = 0, records._Window._grow

    def watched(window):
        nonlocal longest
        more = grow(window)
        longest = max(longest, len(window.text))
        return more

    monkeypatch.setattr(records._Window, "_grow", watched)
    lengths = random.Random(0)
    path.write_text(json.dumps(["x" * lengths.randrange(1, 3000) for _ in range(200)]))
    assert len(list(scan(path, path))) == 200 < os.path.getsize(path)
    assert longest <= 3000 + 2 * 3000


def test_threads_may_begin_at_once(path):
    path.write_text("[1]")
    for _ in range(20):
        file, barrier = RecordFile(path, [1], [2]), threading.Barrier(8)

        def read_together(_, file=file, barrier=barrier):
            barrier.wait()
            return file[0]

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read_together, range(8))) == {b"1"}
