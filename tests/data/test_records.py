"""Records stream out of files block by block as if these were parsed at once, and are found again by their place."""

import itertools
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.data import records
from llava_jax.data.records import RecordFile, load_json, local_data, scan
from llava_jax.data.samples import read_sample, record_value
from llava_jax.data.sources import LlavaJson
from llava_jax.evaluate.answers import read_answers, read_json
from llava_jax.evaluate.lines import read_lines
from llava_jax.evaluate.sheets import read_sheet

NEWER = itertools.count(1)  # times of files
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


@pytest.mark.parametrize("text", ["[]]", "[] 1", "[1]]", "[1][2]"])
def test_what_follows_an_array_is_an_error(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match="is no JSON: Extra data"):
        read(path)


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
    monkeypatch.setattr(records, "MAX_RECORD", 50)
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


@given(
    values=st.lists(st.dictionaries(TEXT, TEXT, max_size=2), min_size=1, max_size=4),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
    lines=st.booleans(),
    block=st.integers(1, 40),
)
def test_every_unicode_encoding_is_read(path, values, encoding, lines, block):
    text = "\n".join(json.dumps(v, ensure_ascii=False) for v in values) if lines else json.dumps(values)
    path.write_bytes(text.encode(encoding))
    os.utime(path, ns=(0, next(NEWER)))  # no two are the same file to the cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BLOCK", block)
        assert read(local_data(path)) == values


def test_what_is_in_no_encoding_is_refused(path):
    path.write_bytes('["\u00e9"]'.encode("utf-16")[:-1])
    with pytest.raises(UserError, match="data: is no UTF-16: truncated data; convert it to UTF-8: iconv"):
        local_data(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    with pytest.raises(UserError, match="data: is a Git LFS pointer"):
        local_data(path)


SPREAD = {
    '{"data": [{"id": 1}]}': "is one object whose 'data' holds a list of objects.*one a line, was expected",
    '{"version": 1, "licences": [1], "\u00e9": [ {"id": "\u00e9"}]}': "is one object whose '\u00e9' holds",
    '{"id": "a", "conversations": [{"from": "human", "value": "q"}]}': "is spread over several lines",
    '{"id": "a", "images": ["a.jpg"], "n": {"x": [{}]}}': "is spread over several lines",
    "{}": "is spread over several lines",
}


@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize(("text", "message"), SPREAD.items())
def test_objects_over_several_lines_are_one_error(path, text, message, block, monkeypatch):
    monkeypatch.setattr(records, "BLOCK", block)
    spread = json.dumps(json.loads(text), indent=1, ensure_ascii=False).replace("{}", "{\n}")
    for content in (spread, f"\n{spread}\n{spread}\n"):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            list(scan(path, "F"))
    path.write_text(f"{text}\n{text}\n", encoding="utf-8")  # each on a line
    assert len(list(scan(path, "F"))) == 2


def test_a_huge_object_on_one_line_is_told_by_its_key(path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 50)
    path.write_text(json.dumps({"data": [{"id": i} for i in range(20)]}))
    with pytest.raises(UserError, match="whose 'data' holds a list"):
        list(scan(path, "F"))


@pytest.mark.parametrize("first", ["{", '{"id": ', '{"id": "a', '{"id": "a"} x', '{"a": [{"b": 1}'])
def test_a_damaged_first_line_hides_no_others(path, first):
    path.write_text(f'{first}\n{{"id": "b"}}\n')
    if first.endswith("1}"):  # which the next line might continue
        with pytest.raises(UserError, match="whose 'a' holds"):
            list(scan(path, "F"))
    else:
        assert [record.value for record in scan(path, "F")] == [first.strip().encode(), b'{"id": "b"}']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\x1f\x8b\x08\x00", "data: is compressed by gzip: gunzip it"),
        (b"PK\x03\x04\x14\x00", "data: is a ZIP archive"),
        (b"PAR1\x15\x04", "data: is Parquet: .*to_json"),
    ],
)
def test_files_that_are_no_text_are_named(path, text, message):
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        local_data(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="is a folder, not a file"):
        local_data(tmp_path)


def test_a_control_character_in_the_first_line_is_told_where_it_stands(path):
    path.write_text('{"id": "a\tb"}\n{"id": "b"}\n')
    first, second = scan(path, "F")
    assert second.value == b'{"id": "b"}'
    with pytest.raises(UserError, match="Invalid control character"):
        load_json(first.value, first.where)


def test_several_values_in_a_row_are_told(path):
    path.write_text('{"id": "a"} {"id": "b"}\n')
    (line,) = scan(path, "F")
    with pytest.raises(UserError, match="line 1: is no JSON: Extra data.*; several values follow each other: jq -c"):
        load_json(line.value, line.where)
    path.write_text('[{"id": "a"}]\n[{"id": "b"}]\n')
    with pytest.raises(UserError, match="Extra data, a second array .*: line 2 column 1"):
        list(scan(path, "F"))


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("value", ["9" * 5000, *("[" * n + "]" * n for n in (150, 900, 985, 1100, 10**5))])
def test_numbers_and_depths_that_python_cannot_take_are_one_line(tmp_path, capsys, value, as_array):
    good = '{"id": "g", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}'
    bad = f'{{"id": "x", "image": {value}, "conversations": []}}'
    file = tmp_path / "data.json"
    file.write_text(f"[{good},{bad}]" if as_array else f"{good}\n{bad}")
    with pytest.raises(UserError, match="data.json: .*is no JSON: .*(nested|digits)"):
        for record in scan(file, file):
            read_sample(record_value(record))


@pytest.mark.parametrize("name", tiny.IRREGULAR)
def test_what_is_no_file_is_refused_by_name_and_never_opened(tmp_path, name):
    (tmp_path / "data").mkdir()
    tiny.add_irregular(tmp_path / "data")
    for read in (local_data, LlavaJson, read_lines, read_sheet, read_answers, read_json):
        with pytest.raises(UserError, match=f"{name}: is a (folder|device, pipe or socket), not a file"):
            read(tmp_path / "data" / name)


@pytest.mark.parametrize("as_array", [False, True])
def test_a_record_that_is_too_long_is_named(tmp_path, monkeypatch, as_array):
    monkeypatch.setattr(records, "MAX_RECORD", 10**6)
    monkeypatch.setattr(records, "BLOCK", 10**5)
    line = json.dumps({"id": "x", "conversations": [{"from": "human", "value": "q" * 10**7}]})
    file = tmp_path / "data.json"
    file.write_text(f"[{line}]" if as_array else line)
    with pytest.raises(UserError, match="data.json: (line 1|a sample at byte 1) takes more than 0 MiB"):
        list(scan(file, file))
