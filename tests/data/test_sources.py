"""LLaVA JSON and JSONL, and errors that say where."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest

from llava_jax.cli import UserError
from llava_jax.data import sources
from llava_jax.data.samples import read_sample
from llava_jax.data.sources import LlavaJson, Sample
from llava_jax.files import cache

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A cat.\u2028"}
GOOD = [
    {"id": "a", "image": "a.jpg", "conversations": [QUESTION, ANSWER]},
    {"id": 7, "image": ["a.jpg", "b.jpg"], "conversations": [{"from": "user", "value": "<image> <image>"}, ANSWER]},
    {"images": ["c.jpg"], "conversations": [QUESTION, {"from": "assistant", "value": ""}], "source": "x"},
    {"id": None, "image": None, "conversations": [ANSWER, {"from": "human", "value": "hi"}, ANSWER]},
]


def write(path, records, jsonl):
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n\n".join(lines) + "\n" if jsonl else f"\n[{','.join(lines)}]", encoding="utf-8-sig")
    return path


def record(*turns, **fields):
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns], **fields}


@pytest.mark.parametrize("jsonl", [False, True])
def test_samples(tmp_path, jsonl):
    samples = LlavaJson(write(tmp_path / "data", GOOD, jsonl))
    cat = ("assistant", "A cat.\u2028")
    assert list(samples) == [
        Sample("a", ("a.jpg",), (("user", "<image>\nWhat is it?"), cat)),
        Sample("7", ("a.jpg", "b.jpg"), (("user", "<image> <image>"), cat)),
        Sample("2", ("c.jpg",), (("user", "<image>\nWhat is it?"), ("assistant", ""))),
        Sample("3", (), (("user", "hi"), cat)),
    ]
    assert len(samples) == 4 and samples[-1] == samples[3]


FAULTS = [
    ("structure", "is no object", 3),
    ("structure", "`id`", record(("human", "q"), id=["x"])),
    ("structure", "`image`", record(("human", "<image>"), image={"name": "a.jpg"})),
    ("structure", "`image`", record(("human", "<image>"), images=["a.jpg", 3])),
    ("structure", "`conversations`", {"id": "x", "image": "a.jpg"}),
    ("structure", "`conversations`", record()),
    ("structure", "turn 2 is no object", {"conversations": [QUESTION, "A cat."]}),
    ("structure", "`value` of turn 1", record(("human", None))),
    ("structure", "surrogate", record(("human", "\ud800"))),
    ("role", 'turn 2 is from "bot"', record(("human", "q"), ("bot", "a"))),
    ("order", "two turns of user", record(("human", "q"), ("human", "q"), ("gpt", "a"))),
    ("order", "two turns of assistant", record(("gpt", "a"), ("gpt", "a"))),
    ("marks", "1 <image> in the text, but 0 images", record(("human", "What does <image> mean?"), ("gpt", "a"))),
    ("marks", "0 <image> in the text, but 1 images", record(("human", "q"), ("gpt", "a"), image="a.jpg")),
    ("marks", "2 <image> in the text, but 1 images", record(("human", "<image>"), ("gpt", "<image>"), image="a.jpg")),
    ("marks", "0 <image> in the text, but 1 images", record(("gpt", "<image>"), ("human", "q"), image="a.jpg")),
]


@pytest.mark.parametrize(("kind", "detail", "value"), FAULTS)
def test_faults_name_file_place_and_id(tmp_path, kind, detail, value):
    (fault,) = read_sample(value).faults
    assert fault.kind == kind and detail in fault.detail
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(GOOD[0]) + "\n\n" + json.dumps(value))
    with pytest.raises(UserError) as error:
        LlavaJson(data)
    ident = "x" if isinstance(value, dict) and value.get("id") == "x" else "1" if value == 3 else ""
    assert str(error.value).startswith(f"{data}: line 3 (id {ident}") and detail in str(error.value)
    data.write_text(json.dumps([GOOD[0], value]))
    with pytest.raises(UserError, match="sample 1"):
        LlavaJson(data)


@pytest.mark.parametrize("jsonl", [False, True])
def test_faulty_records_of_a_lenient_source_raise_where_they_are_asked_for(tmp_path, jsonl):
    """One of them holds half a surrogate pair, which has no encoding."""
    good = {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    odd = {"id": "b", "conversations": [{"from": "human", "value": "\ud800"}, {"from": "gpt", "value": "a"}]}
    lines = [json.dumps(value) for value in (good, [1], odd, good)]
    file = tmp_path / "data.json"
    file.write_text("\n".join(lines) if jsonl else f"[{','.join(lines)}]")
    with pytest.raises(UserError, match="is no object"):
        LlavaJson(file)
    source = LlavaJson(file, lenient=True)
    assert len(source) == 4 and source[0].id == source[3].id == "a"
    for index in (1, 2):
        with pytest.raises(UserError, match=f"sample {index}"):
            source[index]
    digests = {source.digest, LlavaJson(file, lenient=True).digest}
    file.write_text(file.read_text().replace("[1]", "[2]"))
    assert len(digests) == 1 and LlavaJson(file, lenient=True).digest not in digests


def test_all_faults_of_a_sample_are_told():
    value = {"conversations": [{"from": "bot", "value": 1}, 2]}
    assert [fault.kind for fault in read_sample(value).faults] == ["role", "structure", "structure"]
    value = record(("human", "<image>"), ("human", "q"))
    assert [fault.kind for fault in read_sample(value).faults] == ["order", "marks"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no samples"),
        (b"[]", "holds no samples"),
        (json.dumps(GOOD)[:-1].encode() + b",\n 1e", r"data: sample 4 .*is no object"),
        (b"[{]", r"data: is no JSON: Expecting property name .*: line 1 column 3 \(byte 2\)"),
        (b'{"id": 1}\n{"id": \n', "line 1 .*`conversations`"),
        (b'["\xff"]', "sample 0: is no UTF-8"),
        (json.dumps(GOOD[0]).encode() + b"\n{", "line 2: is no JSON"),
    ],
)
def test_files_that_are_no_data(tmp_path, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(UserError, match=message):
        LlavaJson(tmp_path / "data")


def digest_of(samples):
    """The digest of samples, however they are stored."""
    return hashlib.sha256("".join(map(repr, samples)).encode()).hexdigest()


def test_the_cache_is_of_the_file_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write(tmp_path / "data", GOOD, jsonl=True)
    first = LlavaJson(data)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "scan", None)  # nothing is read again
        again = LlavaJson(data)
    assert list(again) == list(first) and again.digest == first.digest == digest_of(first)
    (cached,) = (tmp_path / "cache" / "llava_jax").iterdir()
    cached.write_bytes(cached.read_bytes()[:-200])
    assert list(LlavaJson(data)) == list(first)
    write(data, GOOD[:1], jsonl=True)
    assert len(LlavaJson(data)) == 1 and LlavaJson(data).digest != first.digest
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").touch()  # where no directory can be made
    assert len(LlavaJson(data)) == 1


def test_samples_travel_to_other_processes_without_their_texts(tmp_path):
    samples = LlavaJson(write(tmp_path / "data", GOOD * 500, jsonl=True))
    assert samples[1700] == samples[0]
    travelled = pickle.dumps(samples)
    assert len(travelled) < 1000
    assert list(pickle.loads(travelled)) == list(samples)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        LlavaJson(tmp_path / "data.json")


@pytest.mark.parametrize("size", [1, 3000])
def test_another_file_of_the_same_size_and_time_is_read_anew(tmp_path, size):
    """As `rsync -t`, `cp -p`, a checkout or a clock that is set back leave one."""
    samples = [record(("human", "aa"), ("gpt", "bbbb"))] * size
    data = write(tmp_path / "data", samples, jsonl=True)
    before, stat = LlavaJson(data), data.stat()
    assert before[size - 1].turns[1][1] == "bbbb"
    for changed in ("aaaa", "bb"), ("aa", "cccc"):
        samples[size // 2] = record(("human", changed[0]), ("gpt", changed[1]))
        write(data, samples, jsonl=True)
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (data.stat().st_size, data.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        again = LlavaJson(data)
        assert again[size // 2].turns[1][1] == changed[1]
        assert again.digest == digest_of(again) != before.digest


def test_files_are_told_apart_by_content_where_times_are_coarse(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "version", lambda path: "as it was")
    for size in (10, cache.BLOCK, 3 * cache.BLOCK + 1, 100 * cache.BLOCK):
        (tmp_path / "a").write_bytes(b"a" * size)
        versions = {cache.content_version(tmp_path / "a")}
        half = size // 2
        for changed in (b"b" + b"a" * (size - 1), b"a" * (size - 1) + b"b", b"a" * half + b"b" * (size - half)):
            (tmp_path / "a").write_bytes(changed)
            versions.add(cache.content_version(tmp_path / "a"))
        assert len(versions) == 4


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"starts": np.zeros(3, np.int64)},
        {"starts": np.array([0, 5]), "stops": np.array([4, 10**9]), "digest": np.array("x")},
        {"starts": np.array([5, 0]), "stops": np.array([9, 4]), "digest": np.array("x")},
        {"starts": np.array([0.0]), "stops": np.array([4.0]), "digest": np.array("x")},
        {"starts": np.array([0]), "stops": np.array([4]), "digest": np.array(7)},
        {"starts": np.array([{}], object), "stops": np.array([4]), "digest": np.array("x")},
        b"",
        b"garbage" * 100,
        b"PK\x03\x04garbage",
    ],
)
def test_what_is_no_index_in_the_cache_is_made_anew(tmp_path, monkeypatch, index):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write(tmp_path / "data", GOOD, jsonl=True)
    expected = list(LlavaJson(data))
    (cached,) = (tmp_path / "cache" / "llava_jax").iterdir()
    good = cached.read_bytes()
    if isinstance(index, bytes):
        cached.write_bytes(index)
    else:
        np.savez(cached, **index)
    assert list(LlavaJson(data)) == expected and cached.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").touch()  # where no directory can be made
    data = [write(tmp_path / f"{i}", GOOD, jsonl=True) for i in range(3)]
    (tmp_path / "utf16").write_bytes(data[0].read_text().encode("utf-16"))
    for path in (*data, tmp_path / "utf16"):
        assert len(LlavaJson(path)) == len(GOOD)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cache.derived("x", data[0], lambda target: target.write_bytes(b"x")).read_bytes() == b"x"


def test_the_cache_is_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    LlavaJson(write(tmp_path / "data", GOOD, jsonl=True))
    assert (tmp_path / "cache" / "llava_jax").stat().st_mode & 0o777 == 0o700
