"""What the web page shows and keeps, without a browser: tests/page_in_chromium.py has the rest."""

import asyncio
import functools
import json
import zipfile
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.utils import get_upload_folder
from serving import bomb, picture

from llava_jax.cli import UserError
from llava_jax.data import check
from llava_jax.data.images import preprocess
from llava_jax.serve.messages import all_files, answer, answered, files_of, question, text_of, to_request, write_zip
from llava_jax.serve.page import attach, keep, pack, restore, undo
from llava_jax.serve.pictures import Reader

SQUARE = functools.partial(preprocess, size=16, aspect="pad", mean=(0.48, 0.46, 0.41))


def read_files(files: list[str]) -> dict:
    return asyncio.run(Reader(SQUARE).read_files(files))


@pytest.fixture
def uploads(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    folder = Path(get_upload_folder())
    folder.mkdir()
    return folder


@pytest.fixture
def talk(uploads):
    """Two questions about three pictures, two of which are one file."""
    files = [str(uploads / name) for name in ("a.png", "b.PNG")]
    for seed, file in enumerate(files):
        picture(seed).save(file)
    return [question("It?", files), answer("Yes."), question("", files[:1]), answer("No.")]


def test_messages_become_a_request(talk):
    pictures = read_files(all_files(talk[:3]))
    request = to_request(talk[:3], pictures)
    marks = "<image>\n"
    assert request.turns == [("user", f"{marks}{marks}It?"), ("assistant", "Yes."), ("user", marks)]
    assert [np.asarray(image).tolist() for image in request.images] == [SQUARE(picture(i)).tolist() for i in (0, 1, 0)]
    assert request.images[0] is request.images[2]  # and is read once


@pytest.mark.parametrize("data, what", [(b"no picture", "damaged"), (bomb(9_000), "9000 x 9000 pixels are more")])
def test_a_bad_picture_is_named_without_its_folder(uploads, data, what):
    (uploads / "bad.png").write_bytes(data)
    with pytest.raises(UserError, match=f"bad.png.*{what}") as error:
        read_files([str(uploads / "bad.png")])
    assert str(uploads) not in str(error.value)


def test_a_zip_is_a_clean_data_set(talk, tmp_path):
    write_zip(talk, tmp_path / "talk.zip")
    with zipfile.ZipFile(tmp_path / "talk.zip") as archive:
        assert sorted(archive.namelist()) == ["1.png", "2.png", "conversation.json"]
        archive.extractall(tmp_path / "talk")
    (sample,) = json.loads((tmp_path / "talk/conversation.json").read_text())
    assert sample["image"] == ["1.png", "2.png", "1.png"]
    assert not check.main(["--json", str(tmp_path / "talk/conversation.json"), "--images", str(tmp_path / "talk")])


def test_a_question_without_an_answer_is_not_kept(talk):
    assert answered(talk[:3]) == answered(talk[:2]) == talk[:2]
    assert answered([]) == []
    with pytest.raises(gr.Error, match="nothing to download"):
        next(pack(talk[:1]))


def test_what_is_kept_is_restored(talk):
    assert restore(json.loads(json.dumps(keep(talk)))) == talk
    assert restore([]) == []


@pytest.mark.parametrize("kept", [None, 3, "text", [1], [["user", "It?"]], [["user", "It?", [3]]], [["user", 3, []]]])
def test_what_the_browser_makes_up_is_not_restored(kept):
    assert restore(kept) == []


def test_files_that_nobody_uploaded_are_not_shown(talk, uploads, tmp_path):
    (tmp_path / "secret.png").write_bytes(Path(files_of(talk[0])[0]).read_bytes())
    for file in (tmp_path / "secret.png", uploads / "../secret.png", uploads / "gone.png"):
        assert restore([["user", "It?", [str(file)]]]) == []


def test_undo_takes_the_question_back(talk):
    event = gr.UndoData(None, {"index": 2, "value": ""})
    message, history = undo(talk, event)
    assert message == {"text": text_of(talk[2]), "files": files_of(talk[2])}
    assert history == talk[:2]


def test_a_photo_joins_the_message():
    assert attach({"text": "It?", "files": ["a.png"]}, "photo.png") == (
        {"text": "It?", "files": ["a.png", "photo.png"]},
        None,
    )
    assert attach({"text": "It?", "files": []}, None) == ({"text": "It?", "files": []}, None)
