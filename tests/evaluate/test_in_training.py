"""A benchmark answered during training: by one process, by two, and what's wrong with it told before the first step."""

import base64
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny

from configs import common
from llava_jax.cli import UserError
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.in_training import Evaluation, answer_line, choose, flatten, request
from llava_jax.evaluate.questions import Question, read_questions
from llava_jax.training import loop
from tests.evaluate.test_dataset_files import BLUE, RED, parquet, shown, tsv
from tests.parallel.test_distributed import Run

STEPS = 80


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Questions of colours, whose answers can be learned by heart: `init`, `data.*` and `evaluate.*` of a config."""
    directory = tmp_path_factory.mktemp("world")
    model = tiny.checkpoint(directory)
    file, images = tiny.data(directory, samples=12)
    samples = [sample for sample in json.loads(file.read_text()) if "image" in sample]
    for sample in samples:
        sample["conversations"][1]["value"] = sample["conversations"][1]["value"].removeprefix("It is ").rstrip(".")
    file.write_text(json.dumps(samples))
    return {
        "init": str(model), "data.json": str(file), "data.images": str(images), "evaluate.benchmark": "easy-vqa",
        "evaluate.questions": str(file), "evaluate.labels": str(file), "evaluate.images": str(images),
    }  # fmt: skip


def config(world: dict[str, str], **changes: Any):
    config = common.get_config()
    fixed = {"stage": "finetune", "max_length": 64, "batch_rows": 3, "steps": STEPS, "learning_rate": 3e-3}
    config.update_from_flattened_dict({**fixed, **world, **changes})
    return config.lock()


def metrics(workdir: Path) -> list[dict[str, Any]]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many programs each evaluation compiled."""
    counts: list[int] = []
    events: list[str] = []
    run = Evaluation.run

    def listen(event: str, duration: float, **_: Any) -> None:
        events.append(event)

    def counted(self: Evaluation, *args: Any) -> dict[str, float]:
        events.clear()
        scores = run(self, *args)
        counts.append(sum(event.endswith("backend_compile_duration") for event in events))
        return scores

    monkeypatch.setattr(Evaluation, "run", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


def test_scores_rise_and_the_answers_are_kept(
    world: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: list[int]
):
    loop.train(config(world, **{"evaluate.every": STEPS // 2, "evaluate.limit": 6}), str(tmp_path / "run"))
    scores = {line["step"]: line for line in metrics(tmp_path / "run") if "easy-vqa/accuracy" in line}
    assert list(scores) == [0, STEPS // 2, STEPS]
    assert scores[0]["easy-vqa/accuracy"] == 0 and scores[STEPS]["easy-vqa/accuracy"] == 100
    assert scores[0]["easy-vqa/total"] == 6 and "easy-vqa/by_kind/colour" in scores[0]
    assert f"step {STEPS}: easy-vqa/accuracy 100" in capsys.readouterr().err
    assert compiled[0] > 3 and compiled[2] == 0  # what the first one compiled serves the others
    answers = tmp_path / "run" / "evaluations" / str(STEPS) / "easy-vqa.jsonl"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert {line["text"] for line in lines} <= {*tiny.COLOURS} and len(lines) == 6
    evaluate.main(["score", "easy-vqa", "--answers", str(answers), "--labels", world["evaluate.labels"], "--partial",
                   "--json"])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["accuracy"] == 100
    folders = [str(tmp_path / "run" / "evaluations" / str(step)) for step in (0, STEPS)]
    evaluate.main(["report", *folders, "--json", "--resamples", "10"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["differences"][str(STEPS)]["value"] == 100


def test_an_evaluation_before_the_first_step_locks_no_workdir(world: dict[str, str], tmp_path: Path, monkeypatch):
    """Nor is anything of it left when the run is corrected."""
    empty = tmp_path / "empty"
    empty.mkdir()
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match="sample-"):
        loop.train(config(world, steps=2, **{"data.images": str(empty)}), str(workdir))
    assert [line["step"] for line in metrics(workdir)] == [0]
    with monkeypatch.context() as patch:
        live = live_around_evaluations(patch)
        loop.train(config(world, steps=2, **{"evaluate.limit": 3}), str(workdir))
    lines = [(line["step"], line.get("easy-vqa/total")) for line in metrics(workdir)]
    assert lines == [(0, 3), (1, None), (2, None), (2, 3)]
    assert all(after <= before for before, after in live) and len(live) == 2
    with pytest.raises(UserError, match="data.images"):
        loop.train(config(world, steps=2, **{"data.images": str(empty)}), str(workdir))


def live_around_evaluations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Bytes of the arrays before and after each: none of the weights that it has copied stays."""
    found, run = [], Evaluation.run

    def measured(self: Evaluation, *args: Any) -> dict[str, float]:
        before = sum(array.nbytes for array in jax.live_arrays())
        scores = run(self, *args)
        gc.collect()
        found.append((before, sum(array.nbytes for array in jax.live_arrays())))
        return scores

    monkeypatch.setattr(Evaluation, "run", measured)
    return found


@pytest.mark.parametrize(("changes", "message"), [
    ({"evaluate.labels": ""}, "evaluate.labels is not set"),
    ({"evaluate.benchmark": "llava-bench"}, "llava-bench: is no such benchmark; choose from"),
    ({"evaluate.benchmark": "easy"}, "easy: is no such benchmark"),
    ({"evaluate.limit": 0}, "evaluate.limit is 0"),
    ({"evaluate.images": "/nowhere"}, "/nowhere/0.png"),
    ({"evaluate.images": ""}, "evaluate.images is not set, and the image of question"),
])  # fmt: skip
def test_what_is_wrong_shows_before_the_first_step(world: dict[str, str], tmp_path: Path, changes: Any, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(config(world, **changes), str(tmp_path / "run"))
    assert not metrics(tmp_path / "run")


def test_what_is_scored_together_is_asked_together():
    asked = [Question(i, f"{i}?", (f"{i % 5}.png",)) for i in range(10)]
    pairs = choose(asked, BENCHMARKS["mme"], limit=5, seed=0)
    assert len(pairs) == 6 and len({question.images for question in pairs}) == 3
    assert [question.id for question in pairs] == sorted(question.id for question in pairs)
    assert len(choose(asked, BENCHMARKS["pope"], limit=5, seed=0)) == 5


def test_two_processes_answer_what_one_does(world: dict[str, str], tmp_path: Path):
    """Five questions of two processes with two devices each, over which the parameters are split."""
    changes = {"batch_rows": 4, "steps": 2, "evaluate.limit": 5, "data.holdout": 0, "eval_every": 0}
    runs = [Run(world, tmp_path / f"{n}", processes=n, devices=4 // n, **changes) for n in (1, 2)]
    for run in runs:
        assert run.wait() == [0] * len(run.processes), run.told()
    one, two = ([json.loads(line)["text"] for step in (0, 2)
                 for line in (run.workdir / "evaluations" / str(step) / "easy-vqa.jsonl").read_text().splitlines()]
                for run in runs)  # fmt: skip
    assert one == two and len(one) == 10
    assert runs[0].metrics("easy-vqa/accuracy") == runs[1].metrics("easy-vqa/accuracy")


def test_a_file_with_questions_images_and_labels(tmp_path: Path):
    """All questions about an image are asked or none."""
    rows = [{"question": f"{i}?", "options": ["x", "y"], "answer": "1", "image": {"bytes": RED if i < 2 else BLUE}}
            for i in range(3)]  # fmt: skip
    file, benchmark = parquet(tmp_path / "test.parquet", rows), BENCHMARKS["ai2d"]
    asked = choose(read_questions([file], "", benchmark.questions), benchmark, limit=1, seed=1)
    assert {shown(question) for question in asked} in ({(RED,)}, {(BLUE,)})
    assert len(request(asked[0], tmp_path).images) == 1
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.benchmark, evaluation.labels, evaluation.questions = benchmark, [file], asked
    lines = [answer_line(number, question, "B", 7) for number, question in enumerate(asked)]
    scores = flatten("ai2d/", benchmark.score(evaluation._pairs(lines)))
    assert (scores["ai2d/score"], scores["ai2d/total"]) == (100.0, len(asked))


def test_images_inside_the_file(world: dict[str, str], tmp_path: Path):
    """Of Parquet and of a table, also for a question about two images; no folder of images is given."""
    rows = [{"id": f"validation_Art_{i}", "question": "<image 1>?" if i else "<image 1> or <image 2>?", "answer": "A",
             "question_type": "multiple-choice", "options": "['red', 'blue']", "image_1": {"bytes": RED},
             "image_2": {"bytes": BLUE}} for i in range(2)]  # fmt: skip
    inside = [base64.b64encode(image).decode() for image in (RED, BLUE)]
    table = [{"index": i, "id": row["id"], "question": row["question"], "A": "red", "B": "blue", "answer": "A",
              "image": inside[0] if i else str(inside)} for i, row in enumerate(rows)]  # fmt: skip
    answers = []
    for file in (parquet(tmp_path / "mmmu.parquet", rows), tsv(tmp_path / "mmmu.tsv", table)):
        workdir = tmp_path / f"run{len(answers)}"
        files = {"evaluate.benchmark": "mmmu", "evaluate.questions": file, "evaluate.labels": file}
        loop.train(config(world, steps=1, **files, **{"evaluate.images": ""}), str(workdir))
        assert [line["mmmu/total"] for line in metrics(workdir) if "mmmu/score" in line] == [2, 2]
        answers.append((workdir / "evaluations/0/mmmu.jsonl").read_text())
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 2
