"""A file is there whole, or as it was."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.files.writing import atomic_file, atomic_list


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Within, no file of this process can grow beyond `size` bytes, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@given(before=st.binary(max_size=40) | st.none(), after=st.binary(max_size=60), room=st.integers(0, 70))
def test_a_full_disk_leaves_what_was_there(tmp_path_factory, before, after, room):
    out = tmp_path_factory.mktemp("disk") / "out"
    if before is not None:
        out.write_bytes(before)
    written = False
    try:
        with disk_of(room), atomic_file(out) as file:
            file.write(after)
        written = True
    except UserError as error:
        assert f"{out}: cannot be written: File too large" in str(error)
    assert written == (len(after) <= room)
    expected = after if written else before
    assert (out.read_bytes() if out.exists() else None) == expected
    assert [path.name for path in out.parent.iterdir()] == ([] if expected is None else ["out"])


def test_two_who_write_the_same_file_leave_that_of_one(tmp_path):
    out = tmp_path / "out"
    with atomic_file(out) as first, atomic_file(out) as second:
        first.write(b"first" * 1000)
        second.write(b"second")
    assert out.read_bytes() == b"first" * 1000 and list(tmp_path.iterdir()) == [out]

    def write(text: bytes) -> None:
        for _ in range(50):
            with atomic_list(out, lines=True) as add:
                for _ in range(20):
                    add(text)

    threads = [threading.Thread(target=write, args=[text]) for text in (b"a" * 99, b"b" * 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(out.read_bytes().splitlines())) == 1 and len(out.read_bytes().splitlines()) == 20


def test_links_stay_and_a_pipe_is_written_directly(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(Path(pipe).read_bytes()))
    reader.start()
    with atomic_file(pipe) as file:
        file.write(b"through")
    reader.join()
    assert read == [b"through"] and pipe.is_fifo()
    with pytest.raises(UserError, match="Is a directory"), atomic_file(tmp_path):
        pass
