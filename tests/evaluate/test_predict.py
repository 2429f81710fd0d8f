"""Predicting with a tiny checkpoint: batches against one by one, interrupted and resumed, and what goes wrong."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.data.images import load_image
from llava_jax.evaluate import __main__ as evaluate
from llava_jax.evaluate import in_training
from llava_jax.evaluate.answer_file import AnswerFile
from llava_jax.evaluate.predict_checkpoint import ANSWER_IS, batches
from llava_jax.evaluate.questions import Question, read_images
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from tests.parallel.test_distributed import free_port


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint, pictures and questions: two about each picture, one without any."""
    root = tmp_path_factory.mktemp("predict")
    tiny.checkpoint(root)
    tiny.data(root, samples=3)
    lines = [{"question_id": i, "image": f"{i // 2}.png", "text": "What colour " * (1 + i % 2) + "is it?"}
             for i in range(6)]  # fmt: skip
    lines.append({"question_id": 6, "text": "Say red.", "category": "text"})
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def generator(made) -> Generator:
    return Generator.from_checkpoint(open_checkpoint(made / "model"))


def predict(made: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    paths = {"questions": "questions.jsonl", "images": "images", "checkpoint": "model"}
    given = [f"--{name}={made / path}" for name, path in paths.items()]
    evaluate.main(["predict", "llava-bench", *given, f"--output={output}", "--max-new-tokens=6", *more])
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def answers(made) -> list[dict[str, Any]]:
    return predict(made, made / "all.jsonl", "--batch-rows=4")


def test_answers_are_those_of_one_by_one_in_the_order_of_the_questions(made, generator, answers):
    assert [line["question_id"] for line in answers] == list(range(7))
    assert answers[6] | {"text": "", "answer_id": "", "metadata": {}} == {
        "question_id": 6, "prompt": "Say red.", "text": "", "answer_id": "", "model_id": "model", "metadata": {},
        "category": "text",
    }  # fmt: skip
    for i, line in enumerate(answers):
        marks, images = ("", ()) if i == 6 else ("<image>\n", [made / f"images/{i // 2}.png"])
        request = Request([("user", marks + line["prompt"])], images)
        assert generator.answer([request], Sampling(max_new_tokens=6)) == [line["text"]]
    assert len({line["answer_id"] for line in answers}) == 7 and not list(made.glob("*.part*"))


def test_it_goes_on_after_a_cut_line(made, answers, tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    whole = (made / "all.jsonl").read_bytes().splitlines(keepends=True)
    output.write_bytes(whole[5])
    (tmp_path / "a.jsonl.part0").write_bytes(whole[0] + whole[2][:40])
    (tmp_path / "a.jsonl.part1").write_bytes(whole[3])  # of a process that there isn't now
    assert predict(made, output) == answers
    assert "resumes after 3 answers" in capsys.readouterr().err and not list(tmp_path.glob("*.part*"))
    assert predict(made, output) == answers
    assert "second" not in capsys.readouterr().err  # nothing was left to ask


def test_answers_of_another_step_or_with_other_options_are_not_taken_for_these(made, answers, tmp_path):
    output = tmp_path / "a.jsonl"
    whole = (made / "all.jsonl").read_bytes()
    for more in ("--temperature=0.5", "--top-p=0.5", "--max-new-tokens=7", "--picture-last", "--template=plain"):
        output.write_bytes(whole)
        with pytest.raises(UserError, match="a.jsonl: line 1: is by another checkpoint or step than model is now, or"):
            predict(made, output, more)
        assert output.read_bytes() == whole
    again = tiny.checkpoint(tmp_path, params=tiny.params(tiny.config(), seed=5))  # of the same name
    with pytest.raises(UserError, match="is by another checkpoint or step"):
        predict(made, output, f"--checkpoint={again}")
    older = [line | {"metadata": {}} for line in answers]  # which do not say it
    output.write_text("".join(f"{json.dumps(line)}\n" for line in older))
    assert predict(made, output) == older


def test_two_hosts_answer_what_one_does(made, answers, tmp_path):
    """Two processes of two devices, which meet over gloo; the first one was interrupted before."""
    whole = (made / "all.jsonl").read_bytes().splitlines(keepends=True)
    output = tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl.part0").write_bytes(whole[1] + whole[4][:30])
    command = [sys.executable, "-m", "llava_jax.evaluate", "predict", "llava-bench", f"--output={output}",
               f"--questions={made / 'questions.jsonl'}", f"--images={made / 'images'}",
               f"--checkpoint={made / 'model'}", "--max-new-tokens=6", "--batch-rows=2",
               f"--coordinator=localhost:{free_port()}", "--num-processes=2"]  # fmt: skip
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    hosts = [subprocess.Popen([*command, f"--process-id={i}"], env=environment, stderr=subprocess.PIPE, text=True)
             for i in range(2)]  # fmt: skip
    try:
        told = [host.communicate()[1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], told
    assert [json.loads(line) for line in output.read_text().splitlines()] == answers
    counts = [int(re.search(r"([0-9]+) answers in .* devices were idle for [0-9.]+%", text)[1]) for text in told]
    assert sum(counts) == 6 and min(counts) >= 2  # of seven one was there
    assert not list(tmp_path.glob("*.part*"))


def test_it_goes_on_after_a_cut_character(tmp_path):
    """Answers are UTF-8: what was interrupted may end within a character."""
    questions = [Question(i, "?") for i in range(2)]
    file = AnswerFile(tmp_path / "a.jsonl", questions, "m")
    file.add([(questions[0], "rot"), (questions[1], "gr\u00fcn")])
    part = tmp_path / "a.jsonl.part0"
    part.write_bytes(part.read_bytes().split(b"\xbcn")[0])
    again = AnswerFile(tmp_path / "a.jsonl", questions, "m")
    assert [line["text"] for line in again.lines.values()] == ["rot"]
    again.add([(questions[1], "gr\u00fcn")])
    again.finish(again.lines)
    written = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in written] == ["rot", "gr\u00fcn"]


def test_a_failure_keeps_what_was_answered(made, answers, tmp_path):
    """The picture of the last batch is missing: the first ones stay, and are not asked again."""
    lines = [json.loads(line) for line in (made / "questions.jsonl").read_text().splitlines()]
    lines[0]["image"] = lines[1]["image"] = "none.png"
    lines[0]["text"] = lines[1]["text"] = "?"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:6]))
    with pytest.raises(UserError, match=r"question 0: .*none.png"):
        predict(made, tmp_path / "a.jsonl", f"--questions={tmp_path / 'q.jsonl'}", "--batch-rows=2")
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl.part0").read_text().splitlines()]
    assert kept == answers[2:4] + answers[4:6] and not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(("more", "message"), [
    (["--max-new-tokens=4000"], "question [0-9]: request .*: its prompt takes .* lower max-new-tokens"),
    (["--model-id=other"], "line 1: is by model, not by other: choose another output"),
    (["--suffix=Briefly."], "line 1: answers question 0, as it isn't asked now"),
    (["--devices-each=3"], "--devices-each 3: does not divide the"),
    (["--endpoint=http://localhost"], "give either --checkpoint or --endpoint"),
    (["--temperature=-1"], "temperature is -1"),
    (["--questions=none.jsonl"], "none.jsonl"),
])  # fmt: skip
def test_mistakes(made, answers, tmp_path, more, message):
    output = tmp_path / "a.jsonl"
    if "devices" not in more[0] and "max" not in more[0]:
        output.write_bytes((made / "all.jsonl").read_bytes())
    with pytest.raises((UserError, OSError), match=message):
        predict(made, output, *more)


def test_reasons_first_asks_for_the_answer_after_them(made, generator, tmp_path):
    (answer,) = predict(made, tmp_path / "a.jsonl", "--limit=1", "--answer-prompter", "--picture-last")
    turns, sampling = [("user", f"{answer['prompt']}\n<image>")], Sampling(max_new_tokens=6)
    request = Request(turns, [made / "images/0.png"])
    (reasons,) = generator.answer([request], sampling)
    (said,) = generator.answer([Request(turns, request.images, reasons.strip() + ANSWER_IS)], sampling)
    assert answer["text"] == f"{reasons.strip()}\n The answer is {said.strip()}"


@pytest.mark.parametrize("position", ["first", "as_is"])
def test_images_stand_where_the_model_was_trained_with_them(position, made, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path, tiny.config(image_position=position))
    text = "From <image> to <image>, what changed?"
    question = {"question_id": 1, "image": ["0.png", "1.png"], "text": text}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    flags = [f"--checkpoint={checkpoint}", f"--questions={tmp_path / 'q.jsonl'}"]
    images = [made / "images/0.png", made / "images/1.png"]
    generator = Generator.from_checkpoint(open_checkpoint(made / "model"))  # the same weights, images as_is
    generator.prompts.config = dataclasses.replace(generator.config, image_position="as_is")
    bare = text.replace("<image>", "")
    for more, seen in {
        (): text if position == "as_is" else f"<image>\n<image>\n{bare}",
        ("--picture-last",): f"{bare}\n<image>\n<image>",
    }.items():
        (answer,) = predict(made, tmp_path / f"{len(more)}.jsonl", *flags, *more)
        expected = generator.answer([Request([("user", seen)], images)], Sampling(max_new_tokens=6))
        assert [answer["text"]] == expected


def test_batches_keep_pictures_together_and_lengths_apart():
    questions = [
        Question(i, "x" * length, (picture,) if picture else ())
        for i, (length, picture) in enumerate([(3, "a"), (9, ""), (5, "b"), (4, "a"), (1, ""), (8, "c")])
    ]
    ids = [[question.id for question in batch] for batch in batches(questions, 2)]
    assert ids == [[5, 2], [0, 3], [1, 4]]


def test_two_who_answer_into_the_same_file_lose_nothing(tmp_path):
    """Neither is told; each asks what it does not find, and both end with all of it."""
    questions = [Question(i, f"{i}?") for i in range(4)]
    first, second = (AnswerFile(tmp_path / "out.jsonl", questions, "model") for _ in range(2))
    for question in questions:
        first.add([(question, "yes")])
        second.add([(question, "yes")])
    assert first.finish(first.lines) == 4
    second.add([(questions[0], "yes")])
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert second.finish(second.lines) == 4
    assert (tmp_path / "out.jsonl").read_bytes() == whole and list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


def test_parts_of_other_questions_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "prompt": "x", "text": "y", "model_id": "m"}\n{"question')
    assert len(AnswerFile(tmp_path / "a.jsonl", [Question(1, "x")], "m").lines) == 1
    with pytest.raises(UserError, match="line 1: answers question 1, as it isn't asked now"):
        AnswerFile(tmp_path / "a.jsonl", [Question(1, "z")], "m")


@pytest.mark.parametrize("name", ["../secret.png", "/dev/zero", "a\0.png", "pipe.png", "zeros.png"])
def test_images_outside_the_folder_and_what_is_no_file(made, tmp_path, name):
    (tmp_path / "images").mkdir()
    tiny.add_irregular(tmp_path / "images")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 7, "image": name, "text": "What?"}))
    given = [f"--questions={tmp_path}/q.jsonl", f"--images={tmp_path}/images", f"--output={tmp_path}/out.jsonl"]
    for model in (f"--checkpoint={made}/model", "--model=m"):
        endpoint = ["--endpoint=http://127.0.0.1:9/v1"] if model == "--model=m" else []
        with pytest.raises(UserError, match="question 7: image "):
            evaluate.main(["predict", "llava-bench", *given, model, *endpoint])
    with pytest.raises(UserError, match="question 7: image "):
        question = Question(7, "What?", (name,))
        in_training.request(question, f"{tmp_path}/images")
        read_images(question, f"{tmp_path}/images", load_image)


def test_absolute_names_are_read_by_an_option(made, answers, tmp_path):
    absolute = str(made / "images/0.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 0, "image": absolute, "text": "What colour is it?"}))
    given = [f"--questions={tmp_path}/q.jsonl", f"--output={tmp_path}/out.jsonl"]
    with pytest.raises(UserError, match="question 0: .*--allow-absolute-images"):
        predict(made, tmp_path / "out.jsonl", *given)
    (line,) = predict(made, tmp_path / "out.jsonl", *given, "--allow-absolute-images")
    assert line["text"] == answers[0]["text"]
