"""Every second is charged once, and restarts add up."""

import json
import time

import pytest
from etils import epath

from llava_jax.goodput import KINDS, Goodput


def test_every_second_is_charged_to_one_kind():
    began = time.monotonic()
    goodput = Goodput()
    with goodput.measure("step"):
        time.sleep(0.03)
        with goodput.measure("checkpoint"):
            time.sleep(0.02)
        for _ in goodput.waiting("data", (time.sleep(0.01) for _ in range(3))):
            time.sleep(0.01)
    goodput.write()  # nowhere: no workdir is known yet
    seconds = goodput.seconds
    assert tuple(seconds) == KINDS
    assert seconds["step"] >= 0.06 and seconds["checkpoint"] >= 0.02 and seconds["data"] >= 0.03
    assert seconds["compile"] == seconds["evaluation"] == 0
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - began, abs=0.01)


def test_an_error_within_is_charged_too_and_passes():
    goodput = Goodput()
    with pytest.raises(OSError), goodput.measure("data"):
        time.sleep(0.01)
        raise OSError
    assert goodput.seconds["data"] >= 0.01 and goodput.kind == "setup"


def test_restarts_add_up_and_steps_that_were_lost_are_not_good(tmp_path):
    workdir = epath.Path(tmp_path)
    first = Goodput()
    first.open(workdir, 0)
    first.seconds = dict.fromkeys(KINDS, 0.0) | {"setup": 2.0, "step": 8.0}
    for step in range(1, 9):
        first.done(step)
    first.write()
    assert json.loads((tmp_path / "goodput.json").read_text())["goodput"] == pytest.approx(0.8, abs=0.01)

    second = Goodput()  # the newest checkpoint is that of step 6: steps 7 and 8 are done again
    second.seconds["step"] = 4.0
    second.open(workdir, 6)
    for step in range(7, 11):
        second.done(step)
    second.write()
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert (account["starts"], account["step"], account["steps_done"], account["steps_repeated"]) == (2, 10, 12, 2)
    assert account["seconds"]["step"] == 12.0 and account["seconds"]["setup"] == pytest.approx(2.0, abs=0.1)
    assert account["goodput"] == pytest.approx(12 * (10 / 12) / 14, abs=0.01)
    assert second.summary().startswith("goodput 71% of 14 s in 2 starts: setup 2 s, step 12 s")
    assert not list(tmp_path.glob("*.partial"))


def test_it_is_written_now_and_then(tmp_path):
    goodput = Goodput(every=0.05)
    goodput.open(epath.Path(tmp_path), 0)
    goodput.done(1)
    assert not (tmp_path / "goodput.json").exists()
    time.sleep(0.06)
    goodput.done(2)
    assert json.loads((tmp_path / "goodput.json").read_text())["step"] == 2


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"seconds": 1}'])
def test_a_damaged_account_begins_anew(tmp_path, damaged):
    (tmp_path / "goodput.json").write_text(damaged)
    goodput = Goodput()
    goodput.open(epath.Path(tmp_path), 3)
    assert goodput.account()["starts"] == 1
