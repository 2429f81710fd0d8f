"""The commands that ask a language model, from files to files, against a scripted server."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from datagen_runs import COUNT, rejects, reply, run, samples, sentence, write_contexts
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.data import check
from llava_jax.llm_api import retry
from llava_jax.llm_api.ledger import Ledger


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "key")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_contexts(tmp_path)


def test_from_contexts_to_samples(folder: Path, capsys: pytest.CaptureFixture):
    with ScriptedLLM(reply=reply, faults={"error": 0.1, "malformed": 0.1}) as server:
        assert run(folder, server) == 0
        asked = server.completions
        assert run(folder, server) == 0 and server.completions == asked
    made = samples(folder)
    assert [sample["id"] for sample in made] == [str(i) for i in range(COUNT)] and not rejects(folder)
    questions = {sample["conversations"][0]["value"] for sample in made}
    assert questions == {"<image>\nWhy does the dog run?", "Why does the dog run?\n<image>"}
    assert made[3]["conversations"][1] == {"from": "gpt", "value": f"Because {sentence(3)}"}
    assert asked == COUNT + len(range(0, COUNT, 7))
    assert f"{COUNT} samples of {COUNT} contexts" in capsys.readouterr().out
    assert check.main(["--json", str(folder / "out" / "llava.json"), "--images", str(folder)]) == 0


def test_what_a_model_thinks_is_no_data(folder: Path):
    """Not even where it has no end, after which the same is asked again."""

    def thinks(body: dict[str, Any]) -> str:
        text = reply(body)
        unclosed = "Dog number 3." in body["messages"][-1]["content"]
        return f"<think>\nQuestion:\nWhat?\n===\nAnswer:\nA dog.\n{'' if unclosed else '</think>'}\n{text}"

    with ScriptedLLM(reply=reply) as server:
        run(folder, server, "--limit", 6, output="plain")
    with ScriptedLLM(reply=thinks) as server:
        assert run(folder, server, "--limit", 6) == 0
    assert samples(folder) == [sample for sample in samples(folder, "plain") if sample["id"] != "3"]
    assert rejects(folder) == {"3": "cut-off"}


def test_a_refusal_for_the_rate_within_an_answer_is_no_reject(folder: Path):
    body = {"id": None, "choices": None, "error": {"message": "Provider returned error", "code": 429}}
    left = [body] * 5
    with ScriptedLLM(reply=reply, raw=lambda _: left.pop() if left else None) as server:
        assert run(folder, server, "--limit", 3, "--concurrency", 2, "--prices", 1, 2) == 0
        ledger = Ledger(folder / "out" / "ledger.sqlite")
        assert ledger.db.execute("SELECT COUNT(*), TOTAL(cost) FROM requests WHERE state = 'failed'").fetchone() == (
            5, 0.0,
        )  # fmt: skip
        ledger.close()
    assert len(samples(folder)) == 3 and not rejects(folder)


@pytest.mark.parametrize("more", [(), ("--batch", "--poll", 0.01)])
def test_where_the_server_fails_for_a_while_contexts_stay_open(folder: Path, capsys: pytest.CaptureFixture, more):
    broken = {"error": {"message": "Provider returned error", "code": 502}}
    failing = {"2", "3"}

    def raw(body: dict[str, Any]) -> Any:
        return broken if any(f"Dog number {i}." in str(body["messages"][-1]) for i in failing) else None

    with ScriptedLLM(reply=reply, raw=raw) as server:
        assert run(folder, server, "--limit", 6, "--concurrency", 2, *more) == 1
        assert [sample["id"] for sample in samples(folder)] == list("0145") and not rejects(folder)
        assert "2 contexts have no verdict yet" in capsys.readouterr().err
        failing.clear()
        assert run(folder, server, "--limit", 6, "--concurrency", 2, *more) == 0
    assert [sample["id"] for sample in samples(folder)] == list("012345")


def test_output_does_not_depend_on_the_order_of_answers(folder: Path):
    def five(body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"]
        return f"Question:\nWhy?\n===\nAnswer:\nIt is {sentence(int(asked.split()[2].rstrip('.')) % 5)}"

    outputs = []
    for seed in range(3):
        with ScriptedLLM(reply=five, faults={"error": 0.3, "cut": 0.2}, seed=seed) as server:
            run(folder, server, "--concurrency", 4, "--no-boxes", output=f"out{seed}")
        outputs.append([(folder / f"out{seed}" / name).read_bytes() for name in ("llava.json", "rejects.jsonl")])
    assert outputs[0] == outputs[1] == outputs[2]
    assert [sample["id"] for sample in samples(folder, "out0")] == list("01234")
    assert outputs[0][1].count(b"near-duplicate") == COUNT - 5


def test_a_larger_limit_goes_on(folder: Path):
    with ScriptedLLM(reply=reply) as server:
        run(folder, server, "--limit", 3)
        assert len(samples(folder)) == 3 and server.completions == 4
        run(folder, server, "--limit", 5)
        assert len(samples(folder)) == 5 and server.completions == 6


def test_rejects_have_reasons(folder: Path):
    def bad(body: dict[str, Any]) -> str:
        number = int(body["messages"][-1]["content"].split()[2].rstrip("."))
        texts = {0: "Nothing.", 1: "Question:\nWhy?\n===\nAnswer:\nThe captions say so."}
        return texts.get(number) or reply(body)

    with ScriptedLLM(reply=bad) as server:
        assert run(folder, server, "--limit", 4, "--attempts", 1) == 0
    assert rejects(folder) == {"0": "wrong-form", "1": "mentions-context"}
    assert [sample["id"] for sample in samples(folder)] == ["2", "3"]


def test_another_recipe_in_the_same_directory_is_refused(folder: Path):
    with ScriptedLLM(reply=reply) as server:
        run(folder, server, "--limit", 1)
        for more, message in (
            (["--seed", 1], "seed: 0 there, 1 now"),
            (["--temperature", 0], '"temperature": 0.0'),
            (["--no-boxes"], "boxes: true there, false now"),
            (["--model", "other"], 'model: "m" there, "other" now'),
        ):
            with pytest.raises(UserError, match=message):
                run(folder, server, *more)
        with pytest.raises(UserError, match="kind"):
            run(folder, server, kind="conversation")
        assert server.completions == 2
        run(folder, server, "--limit", 2, "--concurrency", 2)


def test_budget_stops_and_keeps_what_was_paid(folder: Path):
    costs = ["--prices", 1, 1, "--max-tokens", 200, "--concurrency", 4]
    with ScriptedLLM(reply=reply, latency=0.01) as server:
        with pytest.raises(UserError, match="budget"):
            run(folder, server, *costs, "--budget", 0.03)
        done = len(samples(folder))
        assert 0 < done < COUNT
        ledger = Ledger(folder / "out" / "ledger.sqlite")
        assert 0.01 < ledger.totals().cost <= 0.03
        ledger.close()
        assert run(folder, server, *costs, "--budget", 1) == 0
    assert len(samples(folder)) == COUNT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_under_way_end(folder: Path, number: signal.Signals):
    def reply_and_stop(body: dict[str, Any]) -> str:
        if server.completions == 6:
            os.kill(os.getpid(), number)
        return reply(body)

    with ScriptedLLM(reply=reply_and_stop, latency=0.05) as server:
        assert run(folder, server, "--concurrency", 4) == 128 + number
        asked, done = server.completions, len(samples(folder))
        assert 0 < done < COUNT and not rejects(folder)
        ledger = Ledger(folder / "out" / "ledger.sqlite")
        assert dict(ledger.db.execute("SELECT state, COUNT(*) FROM requests GROUP BY state")) == {"answered": asked}
        ledger.close()
        assert run(folder, server) == 0 and server.completions == COUNT + 5
    assert len(samples(folder)) == COUNT


def test_show_and_dry_run_need_no_server(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert run(folder, None, "--show", "12") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("--- system\nYou write") and shown.endswith(
        "--- user\nDog number 12.\n\ndog: [0.125, 0.250, 0.500, 0.750]\n\n"
    )
    assert run(folder, None, "--show", kind="conversation") == 0
    assert capsys.readouterr().out.endswith("--- user\nDog number 0.\n\n")
    with pytest.raises(UserError, match="no context has the id"):
        run(folder, None, "--show", "77")
    assert run(folder, None, "--dry-run", "--prices", 1, 2) == 0
    estimate = capsys.readouterr().out
    assert f"contexts to ask about: {COUNT}" in estimate and "about $0.0" in estimate
    assert run(folder, None, "--dry-run", "--prices", 1, 2, "--body", '{"max_tokens": null}') == 0
    estimate = capsys.readouterr().out
    assert "from the examples: 0 " not in estimate and "the answers, without max_tokens there is no limit" in estimate
    assert not (folder / "out" / "llava.json").exists()


def test_bad_options_are_one_line(folder: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(UserError, match="--budget needs --prices"):
        run(folder, None, "--budget", 1, "--model", "m")
    with pytest.raises(UserError, match="--language english: any, or one of .*, en, "):
        run(folder, None, "--language", "english", "--model", "m")
    text = (folder / "contexts.jsonl").read_text()
    (folder / "contexts.jsonl").write_text(text.replace('"boxes"', '"bags"'))
    with pytest.raises(UserError, match="none: give --instances, or --no-boxes"):
        run(folder, None, "--show", output="other")
    for more in (["--limit", 0], ["--body", "[1]"], []):
        with pytest.raises(SystemExit):
            run(folder, None, *more)
        assert "error" in capsys.readouterr().err
    with pytest.raises(UserError, match="local directory"):
        run(folder, None, "--show", "--output", "gs://b/o")
    for more, message in (
        (["--captions", "none.json"], "none.json: no such file"),
        (["--images", "no"], "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, None, "--show", *more, output="nothing")
    assert not (folder / "nothing").exists()


def test_bad_contexts_leave_nothing_behind(folder: Path):
    good = folder / "contexts.jsonl"
    bad = folder / "bad.jsonl"
    bad.write_text(f'{good.read_text()}\n{{"image": 7}}\n')
    with pytest.raises(UserError, match=f"line {COUNT + 1}: not an image"):
        run(folder, None, "--dry-run", "--captions", bad, output="made/of/it")
    assert not (folder / "made").exists()
    run(folder, None, "--dry-run")
    with pytest.raises(UserError, match=f"line {COUNT + 1}: not an image"):
        run(folder, None, "--dry-run", "--captions", bad)
    assert [path.name for path in (folder / "out").iterdir()] == ["ledger.sqlite"]
    assert run(folder, None, "--show", "3") == 0


def test_what_the_command_says_itself_is_not_taken_from_the_body(folder: Path, capsys: pytest.CaptureFixture):
    for body, name in (('{"n": 3}', "n"), ('{"messages": [], "model": "m"}', "messages, model")):
        with pytest.raises(SystemExit):
            run(folder, None, "--body", body, "--model", "m")
        assert f"holds {name}, which the command sets itself" in capsys.readouterr().err


def test_a_longest_answer_is_a_number(folder: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        run(folder, None, "--body", '{"max_completion_tokens": "100"}', "--model", "m")
    assert 'has max_completion_tokens "100", which is not an integer' in capsys.readouterr().err


def test_answers_can_be_streamed(folder: Path):
    asked = []
    with ScriptedLLM(reply=lambda body: asked.append(body) or reply(body), faults={"cut": 0.1}) as server:
        assert run(folder, server, "--body", '{"stream": true, "top_p": 0.9}') == 0
        assert run(folder, server, "--body", '{"top_p": 0.9}') == 0
    assert len(samples(folder)) == COUNT
    assert {(body["stream"], body["top_p"]) for body in asked} == {(True, 0.9)}
