"""One process at a time writes into a directory; the others hear who does."""

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from fake_gcs import FakeGcs
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.files import lock
from llava_jax.files.lock import LOCK, entries, hold

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from etils import epath
from llava_jax.files.lock import hold
with hold(epath.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(directory, **environment: str) -> subprocess.Popen:
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=-1, stdout=-1, stderr=-1, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} | environment,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n", process.communicate()[1]
    return process


@pytest.fixture
def watched(monkeypatch) -> list[float]:
    """Waits of the lock, which take no time; what a test puts into it is done at the first of them."""
    waits = []
    monkeypatch.setattr(lock.time, "sleep", waits.append)
    return waits


def of_another_machine(directory: Path, **changes) -> bytes:
    """The lock as a process on another machine left it."""
    text = lock._describe("another boot 1") | {"host": "elsewhere", "pid": 7, "command": "train"} | changes
    (directory / LOCK).write_text(json.dumps(text))
    os.utime(directory / LOCK, (1e9, 1e9))
    return (directory / LOCK).read_bytes()


def signs_of_life(directory: Path):
    """A wait of ten seconds each, in which the holder gives its sign."""
    ticks = itertools.count(int(1e9) + 10, 10)
    return lambda _: os.utime(directory / LOCK, (tick := next(ticks), tick))


def test_the_second_is_told_who_holds_it_and_what_to_do(tmp_path):
    first = holder(tmp_path / "run")
    with pytest.raises(UserError) as raised, hold(epath.Path(tmp_path / "run")):
        pass
    said = str(raised.value)
    assert said.startswith(f"{tmp_path}/run: is in use by another process ({first.pid} on ") and "\n" not in said
    assert "since 20" in said and "import sys" in said and "wait for its end, or end it" in said
    assert (tmp_path / "run" / LOCK).exists()
    first.communicate("")
    assert not (tmp_path / "run").exists(), "it was made for the lock, and nothing was written"


def test_a_lock_ends_with_its_process_even_when_that_is_killed(tmp_path, watched, capsys):
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists()
    with hold(epath.Path(tmp_path)) as check:
        check()
        assert entries(epath.Path(tmp_path)) == []
    assert not (tmp_path / LOCK).exists() and tmp_path.exists()
    assert not watched and not capsys.readouterr().err


def test_a_lock_of_a_machine_that_shows_no_life_is_taken_over(tmp_path, watched, capsys):
    of_another_machine(tmp_path)
    with hold(epath.Path(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    told = capsys.readouterr().err
    assert "held by another process (7 on elsewhere since 20" in told and "last sign of life was" in told
    assert "waits up to 120 s until it ends, or gives none for 60 s, and takes over then" in told
    assert f"at once if you remove {tmp_path}/{LOCK}" in told
    assert watched == [1] * lock.EXPIRY


def test_a_lock_of_a_machine_that_shows_life_is_refused(tmp_path, monkeypatch, capsys):
    """Also where its clock is years behind."""
    of_another_machine(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", signs_of_life(tmp_path))
    with pytest.raises(UserError, match="is in use by another process .7 on elsewhere"), hold(epath.Path(tmp_path)):
        pass
    assert (tmp_path / LOCK).exists()


def test_a_holder_that_dies_while_another_waits_is_followed(tmp_path, monkeypatch, capsys):
    """As one that was preempted and is killed while it saves: its last sign comes after the other has begun to wait."""
    of_another_machine(tmp_path)
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 30:
            os.utime(tmp_path / LOCK, (2e9, 2e9))

    monkeypatch.setattr(lock.time, "sleep", wait)
    with hold(epath.Path(tmp_path)):
        assert len(waits) == 30 + lock.EXPIRY


def test_a_lock_that_is_removed_while_another_waits_is_free(tmp_path, monkeypatch, capsys):
    of_another_machine(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.unlink(tmp_path / LOCK))
    with hold(epath.Path(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_has_signs_of_life_alone(tmp_path, monkeypatch, watched, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    with hold(epath.Path(tmp_path)):  # alive, on this machine, but it cannot be seen
        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(lock.time, "sleep", signs_of_life(tmp_path))
        with (
            pytest.raises(UserError, match=f"is in use by another process .{os.getpid()} on"),
            hold(epath.Path(tmp_path)),
        ):
            pass
    with hold(epath.Path(tmp_path)):
        pass


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with hold(epath.Path(tmp_path)):
        os.utime(tmp_path / LOCK, (1e9, 1e9))
        while (tmp_path / LOCK).stat().st_mtime == 1e9:
            time.sleep(0.01)


@pytest.mark.parametrize("loss", ["taken", "removed"])
def test_a_holder_that_lost_its_lock_stops_before_it_writes(loss, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    with hold(epath.Path(tmp_path)) as check:
        check()
        if loss == "taken":
            theirs = of_another_machine(tmp_path)
        else:
            (tmp_path / LOCK).unlink()
        clock[0] += lock.EXPIRY  # frozen for so long
        with pytest.raises(UserError, match="was taken over by .*: this one ends and writes nothing more"):
            check()
    if loss == "taken":
        assert (tmp_path / LOCK).read_bytes() == theirs, "the lock of another was removed"


@given(st.binary(max_size=300) | st.dictionaries(st.sampled_from(["pid", "host"]), st.text()).map(json.dumps))
def test_whatever_a_lock_says_is_bounded(text):
    said = lock._name(text)
    assert said.startswith("another process") and len(said) < 1300 and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "text", [b"", b"\x1b[2J", b"[" * 100_000, b'{"pid": "\x1b[31m"}', b'{"pid": ' + b"9" * 5000 + b"}"]
)
def test_a_lock_that_says_nonsense_still_locks_nobody_out(text, tmp_path, watched, capsys):
    (tmp_path / LOCK).write_bytes(text)
    with hold(epath.Path(tmp_path)):
        pass
    assert "\x1b" not in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=f"{tmp_path}/file/run: cannot be written"),
        hold(epath.Path(tmp_path / "file/run")),
    ):
        pass

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="cannot be written .No space left"), hold(epath.Path(tmp_path / "run")):
        pass
    assert not list(tmp_path.glob("run/*"))


def test_two_threads_of_one_process_do_not_share_it(tmp_path):
    refused = []

    def second():
        try:
            with hold(epath.Path(tmp_path)):
                pass
        except UserError as error:
            refused.append(str(error))

    with hold(epath.Path(tmp_path)):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1


GCS = """
import json, os, sys
from etils import epath
from llava_jax.files import lock
from llava_jax.cli import UserError
run, waits = epath.Path("gs://bucket/run"), []
lock.time.sleep = waits.append
def refused(why):
    try:
        with lock.hold(run):
            raise AssertionError("not refused")
    except UserError as error:
        assert why in str(error), error
def text(**changes):
    return json.dumps(lock._describe("another boot") | {"host": "elsewhere", "pid": 7, "seen": 1.0} | changes)
with lock.hold(run) as check:
    refused(f"is in use by another process ({os.getpid()} on")
    assert (run / "run.lock").exists() and not waits
assert not (run / "run.lock").exists()

# A holder on this machine that was killed left it.
here = lock._LockObject(run).where
(run / "run.lock").write_text(text(where=here, pid=2**22 + 1))
with lock.hold(run):
    assert not waits

# One on another machine: dead, and alive.
(run / "run.lock").write_text(text())
with lock.hold(run):
    assert waits == [1] * lock.EXPIRY
(run / "run.lock").write_text(text())
lock.time.sleep = lambda _: (run / "run.lock").write_text(text(seen=2.0))
refused("is in use by another process (7 on elsewhere")
(run / "run.lock").unlink()

# One that was frozen until another took it over.
clock = [0.0]
lock.time.monotonic = lambda: clock[0]
with lock.hold(run) as check:
    check()
    clock[0] += lock.EXPIRY
    check()
    (run / "run.lock").write_text(text())
    clock[0] += lock.EXPIRY
    try:
        check()
        raise AssertionError("not noticed")
    except UserError as error:
        assert "was taken over by another process (7 on elsewhere" in str(error), error
assert json.loads((run / "run.lock").read_text())["pid"] == 7

# A directory that is filled in its place.
from llava_jax.checkpoint.writing import new_directory
model = epath.Path("gs://bucket/model")
with new_directory(model) as mine:
    (mine / "a").write_text("mine")
    try:
        with new_directory(model):
            raise AssertionError("not refused")
    except UserError as error:
        assert "model: is in use by another process" in str(error), error
assert (model / "a").read_text() == "mine" and [entry.name for entry in model.iterdir()] == ["a"]
print("all of it")
"""


def test_a_lock_on_an_object_store(tmp_path):
    """The clients are real; each step in one process, for which the store is a fake one."""
    with FakeGcs() as store:
        environment = os.environ | store.environment
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        done = subprocess.run(
            [sys.executable, "-c", GCS], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout == "all of it\n", done.stderr
        assert "held by another process (7 on elsewhere" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_what_is_no_file_is_neither_waited_for_nor_overwritten(kind, tmp_path, monkeypatch):
    """Also where it takes the place of a lock that is held."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"")

    def replace(directory: Path) -> None:
        make = {"link": lambda path: path.symlink_to(precious), "pipe": os.mkfifo, "folder": Path.mkdir,
                "device": lambda path: path.symlink_to("/dev/zero")}[kind]  # fmt: skip
        (directory / LOCK).unlink(missing_ok=True)
        make(directory / LOCK)

    (tmp_path / "run").mkdir()
    replace(tmp_path / "run")
    with (
        pytest.raises(UserError, match=f"run/{LOCK}: is not a regular file, as a lock is: remove it"),
        hold(epath.Path(tmp_path / "run")),
    ):
        pass
    clock = [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    with hold(epath.Path(tmp_path / "other")) as check:
        replace(tmp_path / "other")
        clock[0] += lock.EXPIRY
        with pytest.raises(UserError, match="is not a regular file"):
            check()
    assert precious.read_bytes() == b""
