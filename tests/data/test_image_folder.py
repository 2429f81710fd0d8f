"""Names of images: those that stay below their folder are its files, all others are refused."""

import os
import posixpath
import unicodedata

import pytest
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.data.image_folder import ImageFolder, image_path, name_fault

# Texts that are made of what paths are made of, in several forms of Unicode.
parts = st.sampled_from(
    ["..", ".", "/", "\\", "a", "b.jpg", "é", "e\u0301", "．", "／", "‥", ":", "C", "~", "\0", "gs://"]
)
names = st.lists(parts, max_size=8).map("".join) | st.text(max_size=20)


@given(names)
@example("a/../../b.jpg")
@example("a/..／../b.jpg")
@example("C:x")
@example("file:///etc/passwd")
def test_what_is_accepted_stays_below_the_folder(name):
    """Whatever the operating system, the disk or the object store make of a name."""
    try:
        path = image_path("/images", name)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        for text in (os.fspath(path), f"/images/{name}"):
            whole = posixpath.normpath(unicodedata.normalize(form, text).replace("\\", "/"))
            assert whole.startswith("/images/") and "\0" not in whole


@given(st.lists(st.text(st.characters(exclude_characters="/\\\0:．／"), min_size=1), min_size=1, max_size=4))
@example(["a:b.jpg"])
def test_plain_names_are_accepted(parts):
    if not {".", ".."} & {unicodedata.normalize("NFKC", part) for part in parts}:
        name = "/".join(parts)
        if not unicodedata.normalize("NFKC", name).startswith("/"):
            assert image_path("/images", name) == epath.Path("/images") / name


@pytest.mark.parametrize(
    "name, message",
    [
        ("../p.png", "leaves the folder of images"),
        ("a/../../p.png", "leaves the folder of images"),
        ("..", "leaves the folder of images"),
        ("..\\p.png", "leaves the folder of images"),
        ("．．/p.png", "leaves the folder of images"),
        ("/etc/passwd", "is an absolute name.*--allow-absolute-images"),
        ("//host/share/a.png", "is an absolute name"),
        ("\\\\host\\share\\a.png", "is an absolute name"),
        ("C:\\a.png", "is an absolute name"),
        ("gs://bucket/a.png", "is an absolute name"),
        ("a\0.png", "holds a NUL character"),
        ("", "names no file"),
        ("a" * 5000, "has 5,000 characters"),
        ("./.", "names no file"),
        ("a/..", "names no file"),
    ],
)
@pytest.mark.parametrize("folder", ["/images", "images", "", "gs://bucket/images"])
def test_what_leaves_the_folder_is_refused(folder, name, message):
    with pytest.raises(UserError, match=f"^image .* {message}"):
        image_path(folder, name)


def test_what_stays_in_the_folder_is_normalised_by_its_text(tmp_path):
    """`a/../b` is `b`, also where `a` is a link to another disk, whose parent it would be otherwise."""
    assert image_path("/images", "a/../b.jpg") == epath.Path("/images/b.jpg")
    assert image_path("/images", "..a/b...jpg") == epath.Path("/images/..a/b...jpg")
    assert str(image_path("gs://bucket/images", "a/../b.jpg")) == "gs://bucket/images/b.jpg"


def test_absolute_names_are_allowed_by_a_flag_and_relative_ones_stay_bounded():
    folder = ImageFolder("/images", allow_absolute=True)
    assert image_path(folder, "/else/a.png") == epath.Path("/else/a.png")
    assert str(image_path(folder, "gs://bucket/a.png")) == "gs://bucket/a.png"
    assert image_path(folder, "a.png") == epath.Path("/images/a.png")
    for name in ("../a.png", "/a\0", "C:\\a.png", "C:/../../a.png", "\\\\host\\a.png", "／a.png"):
        assert name_fault(name, allow_absolute=True), name
    assert not ImageFolder("") and ImageFolder("a") and os.fspath(folder) == str(folder) == "/images"
