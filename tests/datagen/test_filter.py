"""The captions that are chosen, against the rule done by hand, and the phrases that it goes by."""

import collections
import json

import numpy as np
import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st
from spacy.tokens import Doc

from llava_jax.cli import UserError
from llava_jax.datagen import phrases
from llava_jax.datagen.__main__ import main
from llava_jax.datagen.filter import build_index, count_after, coverage, select
from llava_jax.datagen.phrases import extractor, spacy_phrases, word_phrases


@given(st.lists(st.lists(st.integers(0, 9).map(str), unique=True)), st.integers(1, 4), st.integers(1, 6))
@settings(deadline=None)
def test_each_phrase_has_what_it_is_due(captions, least, most):
    index = build_index(iter(captions))
    chosen = select(index, least, most, seed=0)
    having = collections.defaultdict(list)
    for number, found in enumerate(captions):
        for phrase in found:
            having[phrase].append(number)
    for numbers in having.values():
        due = min(len(numbers), most) if len(numbers) >= least else 0
        assert chosen[numbers].sum() >= due
    asked = {number for numbers in having.values() if len(numbers) >= least for number in numbers}
    assert {*np.flatnonzero(chosen)} <= asked
    limit = sum(min(len(numbers), most) for numbers in having.values() if len(numbers) >= least)
    assert chosen.sum() <= limit

    found = coverage(index, chosen, least)
    assert found["unique phrases"]["before"] == len(having)
    assert found["unique phrases"]["after"] == sum(chosen[numbers].any() for numbers in having.values())
    assert found["occurrences of phrases"]["after"] == sum(chosen[numbers].sum() for numbers in having.values())
    assert found["captions without a phrase"] == sum(not found for found in captions)
    assert sorted(index.counts) == list(index.counts) == sorted(map(len, having.values()))


def test_a_common_phrase_is_sampled_by_seed():
    index = build_index(iter([["dog"]] * 500 + [["cat"]] * 50 + [["emu"]] * 2 + [[]]))
    first, second = select(index, 3, 100, seed=0), select(index, 3, 100, seed=1)
    for chosen in first, second:
        assert chosen[:500].sum() == 100 and chosen[500:550].all() and not chosen[550:].any()
        assert 30 < chosen[:250].sum() < 70
    assert (first != second).any() and (first == select(index, 3, 100, seed=0)).all()
    assert count_after(index, first).tolist() == [0, 50, 100]


def filter_file(tmp_path, records, *args, name="in.jsonl"):
    source = tmp_path / name
    source.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    output = tmp_path / "out.jsonl"
    paths = ["--captions", str(source), "--output", str(output), "--report", str(tmp_path / "report.json")]
    main(["filter", *paths, "--phrases", "words", *args])
    return source.read_text().splitlines(), output.read_text().splitlines()


def test_the_command_keeps_records_as_they_are_and_tells_coverage(tmp_path, capsys):
    dogs = [
        {"image": f"{i}.jpg", "caption": f"a dög near the {'lake' if i % 4 else 'house'}", "x": i} for i in range(40)
    ]
    rare = [{"image": "r.jpg", "caption": "an emu"}]
    before, after = filter_file(tmp_path, rare + dogs, "--most", "5")
    assert set(after) < set(before) and after == [line for line in before if line in set(after)]
    assert 5 <= len(after) <= 15 and "emu" not in "".join(after)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["captions"] == {"before": 41, "after": len(after)} and report["method"] == "words"
    assert report["unique phrases"] == {"before": 4, "after": 3}
    assert report["most common phrases"][0] == {"phrase": "dög", "before": 40, "after": len(after)}
    assert sum(report["phrases by captions"]["before"].values()) == 4
    assert "unique phrases" in capsys.readouterr().err
    assert filter_file(tmp_path, rare + dogs, "--most", "5")[1] == after
    assert filter_file(tmp_path, rare + dogs, "--most", "5", "--seed", "3")[1] != after


def test_bad_lines_and_nothing_left(tmp_path, capsys):
    good = [{"image": "a.jpg", "caption": "a dog"}] * 3
    with pytest.raises(UserError, match="1 records hold no caption"):
        filter_file(tmp_path, [*good, {"image": "a.jpg"}])
    assert not (tmp_path / "out.jsonl").exists()
    assert len(filter_file(tmp_path, [{"image": "a.jpg"}, *good], "--skip-bad")[1]) == 3
    assert capsys.readouterr().out.count("line 1: has neither") == 1
    with pytest.raises(UserError, match="lower --least"):
        filter_file(tmp_path, good, "--least", "4")


def test_coco_and_arrays(tmp_path):
    coco = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
        "annotations": [{"id": 9 - i, "image_id": i, "caption": "a dog\n"} for i in range(4)],
    }
    assert json.loads(filter_file(tmp_path, [coco])[1][0]) == {"id": 9, "image": "0.jpg", "caption": "a dog\n"}
    pretty = json.dumps([{"image": "a.jpg", "caption": "a dög"}] * 3, indent=1, ensure_ascii=False)
    (tmp_path / "pretty.json").write_text(pretty)
    output = tmp_path / "pretty_out.json"
    main(["filter", "--captions", str(tmp_path / "pretty.json"), "--output", str(output), "--phrases", "words"])
    assert json.loads(output.read_text()) == json.loads(pretty)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man riding a wave on top of a surfboard.", ["man", "wave", "top", "surfboard"]),
        ("Two dogs, their owner's red ball and two dogs", ["two dogs", "owner's red ball"]),
        ("the very old big brown wooden house", ["brown wooden house"]),
        ("12 cats, a well-lit building; a man dressed in white", ["cats", "well-lit building", "man", "white"]),
        ("it is quickly running", []),
        ("", []),
    ],
)
def test_phrases_by_words(text, expected):
    assert word_phrases(text) == expected


def parsed(nlp):
    """A sentence as a parser of spaCy would leave it: "The two dogs chase a Red  ball and it."."""
    words = ["The", "two", "dogs", "chase", "a", "Red", "ball", "and", "it", "."]
    heads = [2, 2, 3, 3, 6, 6, 3, 6, 6, 3]
    deps = ["det", "nummod", "nsubj", "ROOT", "det", "amod", "dobj", "cc", "conj", "punct"]
    pos = ["DET", "NUM", "NOUN", "VERB", "DET", "ADJ", "NOUN", "CCONJ", "PRON", "PUNCT"]
    return Doc(nlp.vocab, words, heads=heads, deps=deps, pos=pos)


def test_phrases_of_a_parse_of_spacy():
    assert spacy_phrases(parsed(spacy.blank("en"))) == ["two dogs", "red ball"]


def test_models_of_spacy_that_are_not_there_or_cannot_parse(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="python -m spacy download en_none"):
        extractor("en_none")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UserError, match="has no parser"):
        extractor(str(tmp_path / "blank"))
    monkeypatch.setattr(phrases, "_installed", lambda module: module == "spacy")
    assert extractor()[0] == "words"


def test_a_model_of_spacy_is_used(tmp_path):
    """An untrained pipeline of the right parts, of which the phrases mean nothing."""
    nlp = spacy.blank("en")
    parser = nlp.add_pipe("parser")
    parser.add_label("nsubj")
    nlp.initialize()
    nlp.to_disk(tmp_path / "model")
    name, extract = extractor(str(tmp_path / "model"))
    assert name.startswith(f"spaCy {spacy.__version__}, en_") and len(list(extract(["a dog", "a cat"]))) == 2
