"""Every second is charged once, and restarts add up."""

import json

import pytest
from etils import epath

from llava_jax.training import goodput as module
from llava_jax.training.goodput import KINDS, Goodput


class Clock:
    """Goes on when it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def time(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_every_second_is_charged_to_one_kind(time):
    goodput = Goodput()
    time.sleep(7)
    with goodput.measure("step"):
        time.sleep(3)
        with goodput.measure("checkpoint"):
            time.sleep(2)
        for _ in goodput.waiting("data", (time.sleep(10) for _ in range(3))):
            time.sleep(1)
    goodput.write()  # nowhere: no workdir is known yet
    assert tuple(goodput.seconds) == KINDS
    charged = {"setup": 7, "step": 6, "checkpoint": 2, "data": 30}
    assert goodput.seconds == dict.fromkeys(KINDS, 0) | charged


def test_an_error_within_is_charged_too_and_passes(time):
    goodput = Goodput()
    with pytest.raises(OSError), goodput.measure("data"):
        time.sleep(0.5)
        raise OSError
    assert goodput.seconds["data"] == 0.5 and goodput.kind == "setup"


def test_restarts_add_up_and_steps_that_were_lost_are_not_good(tmp_path):
    workdir = epath.Path(tmp_path)
    first = Goodput()
    first.open(workdir, 0)
    first.seconds = dict.fromkeys(KINDS, 0.0) | {"setup": 2.0, "step": 8.0}
    for step in range(1, 9):
        first.done(step)
    first.write()
    assert json.loads((tmp_path / "goodput.json").read_text())["goodput"] == 0.8

    second = Goodput()  # the newest checkpoint is that of step 6: steps 7 and 8 are done again
    second.seconds["step"] = 4.0
    second.open(workdir, 6)
    for step in range(7, 11):
        second.done(step)
    second.write()
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert (account["starts"], account["step"], account["steps_done"], account["steps_repeated"]) == (2, 10, 12, 2)
    assert account["seconds"]["step"] == 12.0 and account["seconds"]["setup"] == 2.0
    assert account["goodput"] == round(12 * (10 / 12) / 14, 4)
    assert second.summary().startswith("goodput 71% of 14 s in 2 starts: setup 2 s, step 12 s")
    assert not list(tmp_path.glob("*.partial"))


def test_it_is_written_now_and_then(time, tmp_path):
    goodput = Goodput(every=60)
    goodput.open(epath.Path(tmp_path), 0)
    time.sleep(59)
    goodput.done(1)
    assert not (tmp_path / "goodput.json").exists()
    time.sleep(1)
    goodput.done(2)
    assert json.loads((tmp_path / "goodput.json").read_text())["step"] == 2


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"seconds": 1}', '{"seconds": {}}', '{"seconds": {"step": null}}'])
def test_a_damaged_account_begins_anew(tmp_path, damaged):
    (tmp_path / "goodput.json").write_text(damaged)
    goodput = Goodput()
    goodput.open(epath.Path(tmp_path), 3)
    assert goodput.account()["starts"] == 1
