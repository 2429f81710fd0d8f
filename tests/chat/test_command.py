"""The terminal: one prompt, a session over a pipe, commands and mistakes."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import adapters as support
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from llava_jax import cli
from llava_jax.chat import __main__ as chat
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.inference.answer import Piece
from llava_jax.inference.engine import Engine
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.llava import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def generator(checkpoint) -> Generator:
    return Generator.from_checkpoint(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def engine(checkpoint):
    engine = Engine.from_checkpoint(open_checkpoint(checkpoint), slots=1, adapters=2, adapter_rank=4)
    yield engine
    engine.close()


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)).save(file)
    return file


@pytest.fixture
def session(checkpoint, engine, monkeypatch, capsys):
    """Types lines into a session over a pipe; -> standard output and standard error."""
    monkeypatch.setattr(Engine, "from_checkpoint", lambda *args, **options: engine)
    monkeypatch.setattr(
        Engine, "close", lambda engine: [engine.adapters.unload(each.name) for each in engine.adapters.loaded()]
    )

    def type_in(*lines: str, args: tuple[str, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = chat.main(["--checkpoint", str(checkpoint), "--max-new-tokens", "6", *args])
        out, err = capsys.readouterr()
        assert status == ("error: " in err)
        return out, err

    return type_in


def answer(generator: Generator, *turns: str, images=()) -> str:
    roles = ["user", "assistant"] * len(turns)
    return generator.answer([Request(list(zip(roles, turns, strict=False)), images)], Sampling(max_new_tokens=6))[0]


def test_prompt_prints_the_greedy_answer_alone(checkpoint, generator, picture):
    command = [sys.executable, "-m", "llava_jax.chat", "--checkpoint", checkpoint, "--image", picture]
    command += ["--prompt", "What is it?", "--max-new-tokens", "6"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == answer(generator, "<image>\nWhat is it?", images=[picture]) + "\n"
    assert "Traceback" not in result.stderr


def test_every_turn_sees_those_before_it(session, generator):
    first = answer(generator, "Hello")
    second = answer(generator, "Hello", first, "And then?")
    out, err = session("Hello", "", "And then?", "/quit", "never read")
    assert out == f"{first}\n{second}\n"
    assert err == ""


def test_pictures_go_to_the_next_message_and_stay(session, generator, picture):
    first = answer(generator, "<image>\nIt?", images=[picture])
    second = answer(generator, "<image>\nIt?", first, "Sure?", images=[picture])
    third = answer(generator, "<image>\nIt?", first, "Sure?", second, "<image>\nAnd this?", images=[picture] * 2)
    out, _ = session(f"/image {picture}", "It?", "Sure?", f"/image  {picture} ", "And this?")
    assert out == f"{first}\n{second}\n{third}\n"
    assert session("It?", args=("--image", str(picture)))[0] == f"{first}\n"


def test_later_turns_do_not_compute_the_earlier_ones_again(session, engine, picture):
    before = engine.stats()
    session(f"/image {picture}", "What is the colour of it?", "Sure?", "Really?")
    after = engine.stats()
    computed = (after.prompt_tokens - before.prompt_tokens) - (after.prefix_tokens - before.prefix_tokens)
    assert after.prefix_tokens - before.prefix_tokens > computed


def test_files_may_be_quoted_as_terminals_do_it(session, generator, picture):
    expected = answer(generator, "<image>\nIt?", images=[picture])
    escaped = str(picture).replace(" ", "\\ ")
    for file in (f"'{picture}'", f'"{picture}" ', escaped):
        assert session(f"/image {file}", "It?", "/reset") == (f"{expected}\n", "")


def test_reset_forgets_turns_and_pictures(session, generator, picture):
    hello = answer(generator, "Hello")
    out, _ = session("Hello", f"/image {picture}", "/reset", "Hello")
    assert out == f"{hello}\n{hello}\n"


def test_a_system_prompt_changes_from_the_next_message_on(session, generator):
    def expected(*turns):
        return generator.answer([Request(turns)], Sampling(max_new_tokens=6))[0]

    hello = [("user", "Hello"), ("assistant", expected(("user", "Hello")))]
    brief = [("system", "Be brief."), *hello, ("user", "Hm?")]
    last = [*hello, ("user", "Hm?"), ("assistant", expected(*brief)), ("user", "Go on")]
    out, err = session("Hello", "/system Be brief.", "Hm?", "/system", "Go on")
    assert out == "".join(f"{cli.printable(text)}\n" for text in (hello[1][1], expected(*brief), expected(*last)))
    assert err == ""


def test_a_saved_conversation_goes_on_in_another_session(session, tmp_path, picture, monkeypatch):
    monkeypatch.chdir(picture.parent)
    talk = (f"/image {picture.name}", "It?", "Sure?", "/image a picture.png", "And\tthis?", "/system Be brief.")
    whole, _ = session(*talk, "So?", args=("--system", "Be kind."))
    first, _ = session(*talk, "/save talk.json", args=("--system", "Be kind."))
    monkeypatch.chdir("/")
    forgotten = ("Forget this", f"/image {picture}")
    second, err = session(*forgotten, f"/load {tmp_path}/talk.json", "So?")
    assert first + second.split("\n", 1)[1] == whole
    assert err == ""


def test_a_conversation_that_does_not_load_changes_nothing(session, generator, tmp_path, picture):
    first = answer(generator, "Hello")
    second = answer(generator, "Hello", first, "And then?")
    saved = tmp_path / "talk.json"
    turns = [{"from": "human", "value": "<image>\nIt?"}, {"from": "gpt", "value": "Yes."}]
    saved.write_text(json.dumps([{"image": "gone.png", "conversations": turns}]))
    out, err = session("/save early.json", "Hello", f"/load {saved}", f"/save {picture}", "/load", "And then?")
    assert out == f"{first}\n{second}\n"
    lines = err.splitlines()
    assert len(lines) == 4
    for line, what in zip(lines, ["nothing to save", "gone.png", "exists and is no saved", "/load FILE"], strict=True):
        assert what in line


def test_mistakes_are_told_in_a_line_and_the_session_goes_on(session, generator):
    out, err = session("/image nowhere.png", "/image", "/imagine", "word " * 3000, "Hello")
    assert out == answer(generator, "Hello") + "\n"
    lines = err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)
    for line, what in zip(lines, ["nowhere.png", "/image FILE", "/imagine", "shorten the conversation"], strict=True):
        assert what in line


def test_help_is_shown_on_request(session):
    out, err = session("/help")
    assert out == ""
    for command in ("/image", "/save", "/load", "/system", "/adapter", "/reset", "/quit"):
        assert command in err


def test_adapters_answer_by_their_names(session, checkpoint, generator, tmp_path):
    loras, given, expected = {"red": support.lora(2), "a b": support.lora(4, dora=True)}, [], {}
    base = open_checkpoint(checkpoint)
    for seed, (name, lora) in enumerate(loras.items(), 1):
        trained = support.adapter(base.config, lora, seed)
        given += ["--adapter", f"{name}={support.workdir(tmp_path / name, checkpoint, lora, trained)}"]
        params = {key: jnp.array(value) for key, value in support.with_merged(base.load(), lora, trained).items()}
        expected[name] = Generator(build(base.config, params), generator.prompts)
    first = answer(expected["red"], "Hello")
    second = answer(expected["a b"], "Hello", first, "And then?")
    third = answer(generator, "Hello", first, "And then?", second, "So?")
    lines = ("Hello", "/adapter blue", "/adapter a b", "And then?", "/adapter", "So?")
    out, err = session(*lines, args=tuple(given))
    assert out == "".join(f"{cli.printable(text)}\n" for text in (first, second, third))
    assert err.splitlines() == ["error: no adapter is named 'blue': there is 'red', 'a b'"]
    assert session("/adapter red")[1] == "error: no adapter is named 'red': there is none\n"


def test_a_mark_typed_by_hand_is_the_place_of_a_picture(session, engine, generator, picture, monkeypatch):
    out, err = session("He<image>llo")
    assert (out, err.count("error: 1 <image> in the message, but 0 images")) == ("", 1)
    lines = (f"/image {picture}", f"/image {picture}", "Compare it with <image>, please.")
    first = answer(generator, "<image>\n<image>\nCompare it with , please.", images=[picture] * 2)
    assert session(*lines)[0] == f"{first}\n"
    for prompts in (engine.base.prompts, generator.prompts):
        monkeypatch.setattr(prompts, "config", dataclasses.replace(prompts.config, image_position="as_is"))
    as_is = answer(generator, "<image>\nCompare it with <image>, please.", images=[picture] * 2)
    assert session(*lines)[0] == f"{as_is}\n"


def test_ctrl_c_stops_an_answer_and_keeps_its_beginning(session, engine, generator, monkeypatch):
    class Interrupted:
        cancelled = False

        def __iter__(self):
            yield Piece("beginning")
            raise KeyboardInterrupt

        def cancel(self):
            self.cancelled = True

    interrupted, submit, asked = Interrupted(), engine.submit, []

    def record(prompt, sampling):
        asked.append(prompt.request)
        return interrupted if len(asked) == 1 else submit(prompt, sampling)

    monkeypatch.setattr(engine, "submit", record)
    out, err = session("Hello", "Go on")
    assert "[stopped]" in err
    assert interrupted.cancelled
    assert asked[1].turns == [("user", "Hello"), ("assistant", "beginning"), ("user", "Go on")]
    assert out == f"beginning\n{answer(generator, 'Hello', 'beginning', 'Go on')}\n"


def test_system_prompt_is_the_first_turn(session, generator):
    turns = [("system", "Be brief."), ("user", "Hello")]
    expected = generator.answer([Request(turns)], Sampling(max_new_tokens=6))[0]
    assert session("/reset", "Hello", args=("--system", "Be brief."))[0] == f"{cli.printable(expected)}\n"


def test_sampling_follows_seed_and_temperature(session):
    hot = ("--temperature", "5", "--top-p", "0.99")
    first, other, again = (session("Hello", args=(*hot, "--seed", seed))[0] for seed in ("1", "2", "1"))
    assert first == again != other


def test_the_longest_answer_is_what_the_context_has_room_for(engine, monkeypatch):
    long, short = Request([("user", "word " * 400)]), Request([("user", "Hello")])
    room, asked, submit = engine.room(engine.prepare(long)), [], engine.submit

    def record(request, sampling):
        asked.append(sampling.max_new_tokens)
        return submit(request, Sampling(max_new_tokens=1))

    monkeypatch.setattr(engine, "submit", record)
    for request in (long, short):
        list(chat.Answerer(engine, Sampling(), None).stream(request))
    assert 0 < room < 512
    assert asked == [room, 512]


def test_another_template_than_the_checkpoints_warns(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    chat.main(["--checkpoint", str(checkpoint), "--template", "chatml_direct"])
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "warning: the checkpoint was made with template v1, not chatml_direct\n"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--template", "v11"], "v1"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint"),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--prompt", "Hello", "--max-new-tokens", "5000"], "shorten"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(checkpoint, args, message):
    with pytest.raises(UserError, match=message) as error:
        chat.main(["--checkpoint", str(checkpoint), *args])
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_stage_one_describes_a_picture(tmp_path, picture, capsys):
    plain = tiny.checkpoint(tmp_path, template="plain")
    chat.main(["--checkpoint", str(plain), "--image", str(picture), "--prompt", "ignored", "--max-new-tokens", "4"])
    expected = Generator.from_checkpoint(open_checkpoint(plain)).answer(
        [Request([("user", "<image>")], [picture])], Sampling(max_new_tokens=4)
    )
    assert capsys.readouterr().out == f"{expected[0]}\n"


@pytest.mark.parametrize("name", ["../secret.png", "/dev/zero", "pipe.png", "zeros.png", "folder.png"])
def test_a_conversation_of_others_names_images_below_its_folder_alone(session, tmp_path, name):
    (tmp_path / "talk").mkdir()
    tiny.add_irregular(tmp_path / "talk")
    turns = [{"from": "human", "value": "<image>\nIt?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "talk/talk.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
    out, err = session(f"/load {tmp_path}/talk/talk.json", f"/image {tmp_path}/talk/pipe.png", "/image /dev/zero")
    assert out == "" and len(err.splitlines()) == 3
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_images_from_elsewhere_are_loaded_by_an_option(session, tmp_path, picture):
    (tmp_path / "talk").mkdir()
    _, err = session(f"/image {picture}", "It?", f"/save {tmp_path}/talk/talk.json", f"/save {tmp_path}/talk.json")
    assert err == ""
    names = [json.loads((tmp_path / file).read_text())[0]["image"] for file in ("talk/talk.json", "talk.json")]
    assert names == [str(picture), picture.name]
    load = f"/load {tmp_path}/talk/talk.json"
    assert "--allow-absolute-images" in session(load)[1]
    assert session(load, args=("--allow-absolute-images",)) == ("", "")
    assert session(f"/load {tmp_path}/talk.json") == ("", "")


def test_escapes_in_answers_texts_and_names_are_visible(session, tmp_path, monkeypatch, capsys):
    """Answers come in pieces, between which an escape may be split."""
    monkeypatch.setattr(chat.Answerer, "stream", lambda self, request: iter(["It is ", *tiny.ESCAPES]))
    (tmp_path / "bad.json").write_text(json.dumps([{"conversations": [{"from": tiny.ESCAPES, "value": 1}]}]))
    out, err = session("Hello", f"/load {tmp_path}/bad.json", f"/image {tmp_path}/{tiny.ESCAPES[:20]}.png")
    assert not tiny.obeyed(out + err) and out == f"It is {cli.printable(tiny.ESCAPES)}\n"
    assert err.count("error: ") == 2
    turns = [{"from": "human", "value": f"Q{tiny.ESCAPES}"}, {"from": "gpt", "value": f"A{tiny.ESCAPES}"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"conversations": turns}]))
    conversation = chat.Conversation(None)
    conversation.load(str(tmp_path / "talk.json"))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    chat._show_conversation(conversation)
    told = capsys.readouterr().err
    assert not tiny.obeyed(told) and told.startswith("> Q\\x1b[31m") and told.count("\\x1b[31m") == 2
