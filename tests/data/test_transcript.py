"""Conversations as LLaVA JSON: there and back, clean for `data.check`, never over something else."""

import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data import check
from llava_jax.data.transcript import Transcript, dump, load, save

texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<image>" not in text)
rounds = st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=1, max_size=3)


@given(rounds, st.none() | texts)
def test_what_is_saved_is_loaded(tmp_path_factory, rounds, system):
    turns, pictures = [], []
    for question, answer, images in rounds:
        turns += [("user", "<image>\n" * images + question), ("assistant", answer)]
        pictures += [f"/pictures/{len(pictures) + i} é.png" for i in range(images)]
    file = epath.Path(tmp_path_factory.mktemp("saved")) / "talk.json"
    save(file, Transcript(turns, pictures, system))
    assert load(file) == (tuple(turns), pictures, system)
    assert [path.name for path in file.parent.iterdir()] == ["talk.json"]


def test_a_saved_conversation_is_a_clean_data_set(tmp_path, capsys):
    Image.new("RGB", (3, 4)).save(tmp_path / "a.png")
    for name, turns, pictures in [
        ("one", [("user", "<image>\nHm?"), ("assistant", "Ah.")], ["a.png"]),
        ("two", [("user", "<image>\n<image>\nSame?"), ("assistant", "Yes.")], ["a.png", "a.png"]),
        ("none", [("user", "Hello"), ("assistant", "Hi")], []),
    ]:
        (tmp_path / "talk.json").write_text(dump(Transcript(turns, pictures, "Be brief."), name))
        assert not check.main(["--json", str(tmp_path / "talk.json"), "--images", str(tmp_path)])
        assert load(epath.Path(tmp_path) / "talk.json").images == [str(tmp_path / name) for name in pictures]
    assert capsys.readouterr().err == "no problems\n" * 3


def test_only_conversations_are_overwritten(tmp_path):
    talk = Transcript([("user", "Hello"), ("assistant", "Hi")])
    file = epath.Path(tmp_path) / "talk.json"
    save(file, talk)
    save(file, talk._replace(system="Be brief."))
    assert load(file).system == "Be brief."
    file.write_text("my diary")
    with pytest.raises(UserError, match="talk.json exists and is no saved conversation"):
        save(file, talk)
    assert file.read_text() == "my diary"
    with pytest.raises(UserError, match="No such file"):
        save(epath.Path(tmp_path) / "nowhere" / "talk.json", talk)
    with pytest.raises(UserError, match="nothing to save"):
        save(file, Transcript([]))


@pytest.mark.parametrize(
    "value, message",
    [
        ([{"conversations": [{"from": "human", "value": "Hello"}]}], "no answer"),
        ([{"conversations": [{"from": "human", "value": "<image>"}]}], "1 <image> in the text, but 0 images"),
        ([{"system": 3, "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": ""}]}], "system"),
        ([{"conversations": [{"from": "human", "value": "Hello"}]}] * 2, "more than one sample"),
        ([], "holds no samples"),
        ({"turns": []}, "conversations"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_file(tmp_path, value, message):
    file = epath.Path(tmp_path) / "talk.json"
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"talk.json.*{message}"):
        load(file)
