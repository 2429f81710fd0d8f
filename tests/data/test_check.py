"""Every problem is found, named and counted, and a good data set has none."""

import json
import unicodedata

import pytest
import tiny
from PIL import Image
from transformers import AutoTokenizer

from llava_jax.cli import UserError
from llava_jax.data import check_images
from llava_jax.data.check import main
from llava_jax.data.check_records import CheckedRecords
from llava_jax.data.sources import LlavaJson
from llava_jax.data.tokenization import load_tokenizer

LONG = "word " * 100


def sample(ident, question="<image>\nWhat is it?", answer="A cat.", image="a.png", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": ident, "image": image, "conversations": turns, **fields}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    return folder


def check(tmp_path, images, records, *args):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return main(["--json", str(data), "--images", str(images), *map(str, args)])


def test_a_good_data_set(tmp_path, images, bare_llama_dir, capsys):
    text_only = sample("b", "hi", image=None)
    two = sample("c", "<image><image>", image=["a.png", "a.png"])
    args = ["--tokenizer", bare_llama_dir, "--template", "v1", "--max-length", 2048]
    assert check(tmp_path, images, [sample("a"), text_only, two]) == 0
    assert check(tmp_path, images, [sample("a"), text_only, two], *args) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no problems" in captured.err


def test_long_padding_is_reported_with_what_mends_it(tmp_path, images, bare_llama_dir, capsys):
    """It is no problem of the data: the exit status stays 0."""
    args = [
        "--tokenizer",
        bare_llama_dir,
        "--template",
        "v1",
        "--image-tokens",
        4,
        "--report",
        tmp_path / "report.json",
    ]
    records = [sample(f"{i}") for i in range(8)]
    assert check(tmp_path, images, records, *args, "--max-length", 512) == 0
    told = capsys.readouterr().err
    line = "padding, one sample a row: 90% of positions: --config.max_length=52 leaves 0% and cuts no sample"
    assert line in told and "--config.pack=True leaves" in told
    assert json.loads((tmp_path / "report.json").read_text())["padding"].startswith("90% of positions")
    assert check(tmp_path, images, records, *args, "--max-length", 64) == 0
    assert "padding" not in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["padding"] is None


@pytest.mark.parametrize(
    ("kind", "record", "detail"),
    [
        ("structure", "{", "line 2: is no JSON"),
        ("structure", {"id": "x"}, "`conversations` is no list"),
        ("role", {"id": "x", "conversations": [{"from": "bot", "value": "a"}]}, 'turn 1 is from "bot"'),
        ("order", sample("x", conversations=[{"from": "gpt", "value": "<image>"}] * 2), "two turns of assistant"),
        ("marks", sample("x", "What is it?"), "0 <image> in the text, but 1 images"),
        ("marks", sample("x", image=None), "1 <image> in the text, but 0 images"),
        ("missing-image", sample("x", image="b.png"), "b.png does not exist"),
        ("bad-image", sample("x", image="broken.png"), "broken.png"),
        ("duplicate-id", sample("good"), "line 2 has the id of"),
        ("empty-answer", sample("x", answer=" \n"), "the answer to question 1 is empty"),
        ("special-token", sample("x", "<image>\n<s>old</s>"), "</s>"),
        ("key", sample("x", video="a.mp4"), "`video` is not read"),
        ("key", sample("x", context="It is red."), "warning: `context` is not read, and no turn says the same"),
        ("marks", sample("x", "<audio>\nWhat is said?", image=None), "the text of a user holds <audio>"),
        ("marks", sample("x", "<image>\nIs <video> there?"), "warning: question 1 holds <video>"),
        ("image-position", sample("x", "a <image> b <image>", image=["a.png"] * 2), "image_position=as_is"),
    ],
)
def test_a_problem_is_a_line(tmp_path, images, capsys, kind, record, detail):
    assert check(tmp_path, images, [sample("good"), record]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith(f"{kind}, ") and detail in line]
    ident = record["id"] if isinstance(record, dict) else "1"
    assert len(lines) == 1 and lines[0].startswith(f"{kind}, {ident}, ")
    assert f"1 {kind}" in captured.err or f"2 {kind}" in captured.err


def test_turns_that_training_drops_or_cannot_learn(tmp_path, images, capsys):
    greeting = sample("x", image=None, conversations=[{"from": "gpt", "value": "Hello!"}])
    unanswered = sample("y", image=None, conversations=[{"from": "human", "value": "Hello?"}])
    assert check(tmp_path, images, [greeting, unanswered]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [
        ["order", "x"],
        ["nothing-learned", "x"],
        ["order", "y"],
        ["nothing-learned", "y"],
    ]


def test_lengths_count_the_tokens_of_images(tmp_path, images, capsys, smollm2_dir):
    records = [sample("short"), sample("long", answer=LONG), sample("text", "hi", LONG, image=None)]
    args = ["--tokenizer", smollm2_dir, "--template", "chatml", "--max-length"]
    assert check(tmp_path, images, records, *args, 128, "--image-tokens", 16) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [["too-long", "long"], ["too-long", "text"]]
    assert "images of 16) will be cut to 128" in lines[0]
    assert check(tmp_path, images, records, *args, 200, "--image-tokens", 16) == 0
    assert check(tmp_path, images, records, *args, 200) == 1


def test_without_a_template_lengths_are_those_of_the_tokenizers_own(
    tmp_path, images, capsys, smollm2_dir, bare_llama_dir
):
    records = [sample("long", answer=LONG)]
    reports = []
    for template in ([], ["--template", "chatml"]):
        args = ["--tokenizer", smollm2_dir, *template, "--report", tmp_path / "report.json", "--max-length", 64]
        assert check(tmp_path, images, records, *args) == 1
        captured = capsys.readouterr()
        assert ("template chatml, which is the tokenizer's own chat template" in captured.err) is not bool(template)
        reports.append((captured.out, json.loads((tmp_path / "report.json").read_text())["lengths"]))
    assert reports[0] == reports[1] and reports[0][0].startswith("too-long, long, ") and reports[0][1]["samples"] == 1

    assert check(tmp_path, images, records, "--tokenizer", bare_llama_dir) == 0
    told = capsys.readouterr().err
    assert f"lengths are not measured: {bare_llama_dir}: has no chat template: name" in told and "no problems" in told
    with pytest.raises(UserError, match="has no chat template: name the template of the conversations, such as --tem"):
        check(tmp_path, images, records, "--tokenizer", bare_llama_dir, "--max-length", 64)
    with pytest.raises(UserError, match="did you mean v1"):
        check(tmp_path, images, records, "--tokenizer", bare_llama_dir, "--template", "v1_")
    other = load_tokenizer(smollm2_dir)
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has a chat template that is none of the templates: name the template"):
        check(tmp_path, images, records, "--tokenizer", tmp_path / "other", "--max-length", 64)


def test_a_template_that_does_not_fit_the_tokenizer(tmp_path, images, capsys, smollm2_dir):
    args = ["--tokenizer", smollm2_dir, "--max-length", 2048, "--template"]
    assert check(tmp_path, images, [sample("a")], *args, "v1") == 1
    assert "template, -, warning: template v1 does not fit the tokenizer: </s> is 3 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="template llama_3 does not fit the tokenizer: an answer's prompt ends with"):
        check(tmp_path, images, [sample("a")], *args, "llama_3")
    assert check(tmp_path, images, [sample("a")], *args, "chatml") == 0


def test_special_tokens_are_the_tokenizers(tmp_path, images, capsys, smollm2_dir):
    records = [sample("a", "<image> <|im_end|>"), sample("b", "<image> <s>")]
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # which is no special token of a text
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert check(tmp_path, images, records, "--tokenizer", tmp_path / "tokenizer") == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "special-token, a, warning: the text of a user holds <|im_end|>"


def test_lines_are_whole_and_single(tmp_path, images, capsys):
    names = ["x" * 300 + "\n\ud800.png", "é\u2028.png"]
    assert check(tmp_path, images, [sample(name, image=name) for name in names[1:]] + [sample(names[0], "q")]) == 1
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert [line.split(",")[0] for line in lines] == ["marks", "missing-image"]
    assert "x" * 300 + " \\ud800.png" in lines[0]


def test_all_users_of_a_bad_picture_are_told(tmp_path, images, capsys):
    assert check(tmp_path, images, [sample(str(i), image="b.png") for i in range(600)]) == 1
    assert len(set(capsys.readouterr().out.splitlines())) == 600


def test_bad_arguments(tmp_path, images):
    with pytest.raises(UserError, match="no such folder"):
        check(tmp_path, tmp_path / "nowhere", [sample("a")])
    with pytest.raises(UserError, match="no such file"):
        main(["--json", str(tmp_path / "no.json"), "--images", str(images)])
    for option in (["--max-length", 5], ["--template", "v1"]):
        with pytest.raises(SystemExit):
            check(tmp_path, images, [sample("a")], *option)


def fixed(tmp_path, images, capsys, text, out, *args):
    """Checks data given as text with --fix: exit status, problems by kind and id, what is kept, what isn't."""
    data = tmp_path / "data.json"
    data.write_text(text)
    status = main(["--json", str(data), "--images", str(images), "--fix", str(tmp_path / out), *args])
    problems = [line.split(", ")[:2] for line in capsys.readouterr().out.splitlines()]
    rejects = (tmp_path / f"{out.split('.')[0]}.rejects.jsonl").read_text().splitlines()
    return status, problems, (tmp_path / out).read_text(), [json.loads(line) for line in rejects]


def test_fix_keeps_good_samples_as_they_are_and_tells_why_the_others_go(tmp_path, images, capsys):
    turns = json.dumps(sample("")["conversations"])
    good = f'{{ "image":"a.png", "extra": [1.0e5], "id" : "a", "conversations": {turns}}}'
    bad = [sample("gone", image="b.png"), sample("empty", answer=""), sample("broken", image="broken.png")]
    array = f"[{good},\n {', '.join(json.dumps(record, indent=1) for record in bad)} , 3]"
    status, problems, kept, rejects = fixed(tmp_path, images, capsys, array, "clean.json")
    assert status == 1 and kept == f"[\n{good}\n]\n"
    assert sorted(problems) == [
        ["bad-image", "broken"],
        ["empty-answer", "empty"],
        ["missing-image", "gone"],
        ["structure", "4"],
    ]
    assert [reject["id"] for reject in rejects] == ["gone", "empty", "broken", "4"]
    assert [reject["record"] for reject in rejects] == [*bad, 3]
    assert rejects[0]["reasons"] == [f"missing-image: {images}/b.png does not exist"]
    assert main(["--json", str(tmp_path / "clean.json"), "--images", str(images)]) == 0

    lines = "\n".join([good, "{", *map(json.dumps, bad)])
    _, _, kept, rejects = fixed(tmp_path, images, capsys, lines, "lines.jsonl")
    assert kept == f"{good}\n" and rejects[0]["record"] == "{"


def test_of_equal_samples_the_first_is_kept_and_of_equal_ids_all(tmp_path, images, capsys):
    """Published mixtures use the id of a picture for several conversations about it."""
    records = [sample("a"), sample("a", answer="Another."), sample("a"), sample("b"), sample("a", answer="Another.")]
    text = "\n".join(map(json.dumps, records))
    status, problems, kept, rejects = fixed(tmp_path, images, capsys, text, "clean.jsonl")
    assert status == 1 and problems == [["duplicate-id", "a"]] * 3
    assert [json.loads(line) for line in kept.splitlines()] == [records[0], records[1], records[3]]
    assert len(rejects) == 2 and "data.json: line 1: it is the same as that one" in rejects[0]["reasons"][0]


def test_samples_with_warnings_are_kept(tmp_path, images, capsys, smollm2_dir):
    greeting = sample("x", image=None, conversations=[{"from": "gpt", "value": "Hello!"}, *sample("")["conversations"]])
    greeting["image"] = "a.png"
    records = [greeting, sample("long", "<image>\nWhat?", LONG), sample("cut", f"<image>{LONG}", "never seen")]
    text = "\n".join(map(json.dumps, records))
    args = ["--tokenizer", str(smollm2_dir), "--template", "chatml", "--max-length", "64", "--image-tokens", "4"]
    _, problems, kept, rejects = fixed(tmp_path, images, capsys, text, "clean.jsonl", *args)
    assert problems == [["order", "x"], ["too-long", "long"], ["too-long", "cut"], ["nothing-learned", "cut"]]
    assert kept.splitlines() == [json.dumps(record) for record in records[:2]]
    assert [reject["id"] for reject in rejects] == ["cut"]


def test_fix_overwrites_none_of_several_files(tmp_path, images):
    data = sample("a", "Hi", image=None)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([data]))
    (tmp_path / "sets.yaml").write_text(
        f"datasets:\n  - json_path: {tmp_path}/a.json\n  - json_path: {tmp_path}/b.json\n"
    )
    args = ["--json", str(tmp_path / "sets.yaml"), "--images", str(images), "--fix", str(tmp_path / "b.json")]
    with pytest.raises(UserError, match="b.json: exists already, and may be one of the files that are checked"):
        main(args)
    assert json.loads((tmp_path / "b.json").read_text()) == [data]


def test_fix_writes_nothing_where_nothing_would_be_left(tmp_path, images):
    (tmp_path / "bad.jsonl").write_text(json.dumps(sample("x", image="b.png")))
    args = ["--json", str(tmp_path / "bad.jsonl"), "--images", str(images), "--fix"]
    with pytest.raises(UserError, match="none of the 1 samples is without a problem"):
        main([*args, str(tmp_path / "clean.json")])
    with pytest.raises(UserError, match="is the file that is checked"):
        main([*args, str(tmp_path / "bad.jsonl")])
    assert {file.name for file in tmp_path.iterdir()} == {"bad.jsonl", "images"}


def test_the_report(tmp_path, images, capsys, smollm2_dir):
    args = ["--tokenizer", smollm2_dir, "--template", "chatml", "--report", tmp_path / "report.json"]
    records = [sample("a"), sample("b", answer=LONG), sample("c", image="b.png"), "{"]
    assert check(tmp_path, images, records, *args) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["records"], report["samples"], report["rejected"], report["problems"]) == (4, 3, 2, 2)
    assert report["counts"] == {"structure": 1, "missing-image": 1}
    assert report["examples"]["missing-image"] == [{"id": "c", "detail": f"{images}/b.png does not exist"}]
    lengths = report["lengths"]
    assert lengths["samples"] == sum(part["samples"] for part in lengths["histogram"]) == 3
    assert lengths["max"] > 576 + 100 and "tokens a sample: mean" in capsys.readouterr().err


def test_good_pictures_are_decoded_once_and_again_when_they_change(tmp_path, images, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    looked = []
    load = check_images.load_image
    monkeypatch.setattr(check_images, "load_image", lambda path: looked.append(path.name) or load(path))
    Image.new("RGB", (4, 4), "red").save(images / "b.png")
    records = [sample("a"), sample("b", image="b.png"), sample("c", image="broken.png"), sample("d", image="b.png")]

    def look_again():
        looked.clear()
        assert check(tmp_path, images, records) == 1
        return sorted(looked)

    assert look_again() == ["a.png", "b.png", "broken.png"]
    assert look_again() == ["broken.png"]
    Image.new("RGB", (4, 5), "red").save(images / "b.png")
    assert look_again() == ["b.png", "broken.png"]
    (cached,) = (tmp_path / "cache" / "llava_jax").glob("pictures-*")
    cached.write_bytes(cached.read_bytes()[:-3])  # as a kill leaves it
    assert look_again() == ["b.png", "broken.png"]
    assert look_again() == ["broken.png"]
    (images / "a.png").unlink()
    records.append(sample("e", image="a.png", answer="Gone."))
    assert check(tmp_path, images, records) == 1


def test_a_survey_is_a_source_like_the_file(tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([sample("a"), sample("b", "<image>é", image=["a.png"])]))
    checked = CheckedRecords(data)
    assert list(checked.read(())) == []
    assert list(checked) == list(LlavaJson(data)) and checked.digest == LlavaJson(data).digest


def test_images_may_stay_where_they_are(tmp_path, images):
    interleaved = sample("x", "a <image> b <image>", image=["a.png", "a.png"])
    assert check(tmp_path, images, [interleaved], "--image-position", "as_is") == 0


def test_keys_that_are_left_alone_are_told(tmp_path, images, capsys):
    said = sample("b", source="gqa", system="Be brief.", video=None) | {"question": "What is it?"}
    assert check(tmp_path, images, [sample("a", source="vqa", width=3), said]) == 0
    assert (
        "keys of samples that are not read: source (2), width (1), video (1), question (1)\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_and_files_of_other_systems(tmp_path, images, encoding, form):
    (images / "a.png").rename(images / unicodedata.normalize(form, "caf\u00e9.png"))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([sample("a", "<image>\n\u56fe?", image="caf\u00e9.png")], ensure_ascii=False), encoding)
    arguments = ["--json", str(data), "--images", str(images)]
    assert main(arguments) == main(arguments) == 0  # the second finds it in the cache
    assert LlavaJson(data, images).read_images(0, ["caf\u00e9.png"])[0].startswith(b"\x89PNG")


def test_a_template_without_a_system_prompt_says_so(tmp_path, images, capsys, bare_llama_dir):
    args = ["--tokenizer", bare_llama_dir, "--template", "plain"]
    assert check(tmp_path, images, [sample("a"), sample("b", system="Be brief.")], *args) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "b, sample b: template plain has no place for a system prompt" in line


@pytest.mark.parametrize("name", tiny.OUTSIDE + tiny.IRREGULAR)
def test_images_outside_the_folder_and_what_is_no_file(tmp_path, images, capsys, name):
    tiny.add_irregular(images)
    assert check(tmp_path, images, [sample("good"), sample("x", image=name), sample("y", image=[name] * 2,
                                    question="<image><image>")]) == 1  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    kind = "bad-image" if name in tiny.IRREGULAR else "image-name"
    assert [line.split(", ")[:2] for line in lines] == [[kind, "x"], [kind, "y"]]


def test_links_are_followed_and_absolute_names_are_allowed_by_an_option(tmp_path, images, capsys):
    tiny.add_irregular(images)
    (images / "disk").symlink_to(tmp_path)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    inside = [sample(name, image=name) for name in ("disk/secret.png", "link.png", "disk/../a.png", "./a.png")]
    assert check(tmp_path, images, inside) == 0
    absolute = [*inside, sample("x", image=str(tmp_path / "secret.png"))]
    assert check(tmp_path, images, absolute) == 1
    assert "--allow-absolute-images" in capsys.readouterr().out
    assert check(tmp_path, images, absolute, "--allow-absolute-images") == 0
    assert check(tmp_path, images, [sample("x", image="/dev/zero")], "--allow-absolute-images") == 1
    assert check(tmp_path, images, [sample("x", image="../secret.png")], "--allow-absolute-images") == 1


def test_escapes_in_ids_texts_and_names_are_visible(tmp_path, images, capsys):
    named = sample(f"id{tiny.ESCAPES}", image=f"{tiny.ESCAPES}.png")
    role = sample("x", conversations=[{"from": tiny.ESCAPES, "value": "a"}])
    key = sample("y", **{tiny.ESCAPES: "a text", "instruction": "x"})
    assert check(tmp_path, images, [named, role, key, "{" + tiny.ESCAPES, sample(f"id{tiny.ESCAPES}")]) == 1
    captured = capsys.readouterr()
    assert not tiny.obeyed(captured.out + captured.err) and captured.out.count("id\\x1b[31m") >= 2


def test_problems_of_huge_samples_are_short_lines(tmp_path, images, capsys):
    records = [
        sample("i" * 10**6, image="b.png"),
        sample({"a": 1}),
        sample("n", image="n" * 10**5),
        sample("s", image=["a.png"] * 10_000),
        sample("t", image=None, conversations=[{"from": "human", "value": "a"}] * 100_000),
        sample("v", image=None, conversations=[{"from": "human", "value": 7}] * 2, more="x" * 10**6),
    ]
    records.append(sample("good"))
    assert check(tmp_path, images, records, "--fix", tmp_path / "fixed.jsonl", "--report", tmp_path / "r.json") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 10 and all(len(line) < 1000 for line in lines)
    kinds = {line.split(", ")[0] for line in lines}
    assert kinds == {"missing-image", "structure", "marks", "order", "image-name"}
