"""The example behind the emoji demo, on emoji and packages that are drawn here: no network, no npm."""

import hashlib
import importlib.util
import io
import json
import os
import random
import tarfile
from base64 import b64encode
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from configs import emoji as config
from examples.commands import Ran
from examples.emoji import baselines, data, drawing, gallery, packages, recipe, teacher, tower
from examples.emoji.data import ASK_NAME, HELD_OUT, KINDS, TRAINED
from examples.emoji.packages import Package
from llava_jax.cli import UserError
from llava_jax.data.check import main as check
from llava_jax.data.sources import LlavaJson
from llava_jax.datagen.__main__ import main as datagen
from llava_jax.evaluate.__main__ import main as evaluate
from llava_jax.llm_api.ledger import Ledger
from llava_jax.models.config import VisionConfig
from llava_jax.training import config_check

NAMES = ("red ox", "teal fox", "green bat", "blue plum", "gold rice", "pink wine", "grey cake")
SUBGROUPS = ("animal-mammal", "animal-mammal", "animal-mammal", "food-fruit", "food-asian", "drink", "food-sweet")
COLOURS = ("red", "teal", "green", "blue", "gold", "pink", "grey")
IDS = [f"1f4{n:02x}" for n in range(len(NAMES))]
TINY = VisionConfig(32, 64, num_layers=3, num_heads=2, image_size=16, patch_size=8, projection_dim=16)


def draw(number: int, vendor: int) -> Image.Image:
    """A shape of a colour of its own, as a vendor would: a bit elsewhere, and of another size."""
    image = Image.new("RGBA", (64, 64))
    box = (8 + 2 * vendor, 8, 44 + 4 * vendor, 56)
    (ImageDraw.Draw(image).ellipse if number % 2 else ImageDraw.Draw(image).rectangle)(box, COLOURS[number])
    return image


def pack(directory: Path, package: Package, files: dict[str, bytes]) -> Package:
    """Writes a tarball as npm's are; -> the package with its size and hash."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, inner in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(inner)
            archive.addfile(member, io.BytesIO(inner))
    (directory / package.tarball).write_bytes(content.getvalue())
    digest = b64encode(hashlib.sha512(content.getvalue()).digest()).decode()
    return package._replace(size=len(content.getvalue()), integrity=f"sha512-{digest}")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of tarballs, and the packages that they are."""
    directory = tmp_path_factory.mktemp("packages")
    listed = [
        {"unified": id.upper(), "image": f"{id}.png", "subcategory": subgroup}
        | {f"has_img_{vendor}": True for vendor in packages.IMAGES}
        for id, subgroup in zip(IDS, SUBGROUPS, strict=True)
    ]
    other = listed[0] | {"unified": "1F499", "image": "1f499.png"}
    listed += [other | {"subcategory": "heart"}, other | {"has_img_apple": False}, other]  # the last has no name
    texts = {chr(int(id, 16)): {"tts": [name], "default": [*name.split(), name]}
             for id, name in zip(IDS, NAMES, strict=True)}  # fmt: skip
    annotations = {"annotations": {"annotations": texts}}
    files = {"annotations/en/annotations.json": json.dumps(annotations).encode()}
    made = {"annotations": pack(directory, packages.ANNOTATIONS, files)}
    for i, (vendor, package) in enumerate(packages.IMAGES.items()):
        files = {f"img/{vendor}/64/{id}.png": png(draw(n, i)) for n, id in enumerate(IDS)}
        made[vendor] = pack(directory, package, {"emoji.json": json.dumps(listed).encode()} | files)
    return directory, made


@pytest.fixture(scope="module")
def root(stored, tmp_path_factory):
    """Images, questions and conversations."""
    directory, made = stored
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, made)
        data.main(["--root", str(root), "--packages", str(directory)])
        teacher.main(["--root", str(root)])
    return root


@pytest.fixture(scope="module")
def answered(root):
    """With a tower, and the answers of the baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "CONFIG", TINY)
        patch.setattr(tower, "LAYERS", 2)
        tower.main(["--root", str(root), "--epochs", "30"])
    baselines.main(["--root", str(root)])
    return root


def use(patch: pytest.MonkeyPatch, made: dict[str, Package]) -> None:
    for module in (packages, data):
        patch.setattr(module, "ANNOTATIONS", made["annotations"])
        patch.setattr(module, "IMAGES", {vendor: made[vendor] for vendor in packages.IMAGES})


def test_packages_are_fetched_by_npm_and_checked(stored, tmp_path, monkeypatch):
    directory, made = stored
    use(monkeypatch, made)
    npm = tmp_path / "bin/npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$1" = pack ] || exit 1\necho x >> {tmp_path}/calls\nfor p; do :; done\n'
                   f'cp {directory}/$(echo $p | tr @ -).tgz "$4"\n')  # fmt: skip
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    (tmp_path / "got").mkdir()
    packages.fetch(tmp_path / "got")
    packages.fetch(tmp_path / "got")
    assert (tmp_path / "calls").read_text() == "x\n" * 5  # once for each
    file = tmp_path / "got" / made["apple"].tarball
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{file.name}: has {len(content) - 1:,} bytes, not {len(content):,}: delete"):
        packages.fetch(tmp_path / "got")
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{file.name}: its hash is sha512-"):
        packages.fetch(tmp_path / "got")


def test_without_npm_the_way_out_is_named(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"install Node.js, or put cldr-.*-45.0.0.tgz and 4 more into .* npm pack cldr"):
        packages.fetch(tmp_path / "none")
    (tmp_path / "npm").write_text("#!/bin/sh\necho no such version\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(UserError, match=r"^npm cannot fetch cldr-annotations-modern@45.0.0: no such version$"):
        packages.fetch(tmp_path / "none")


def test_a_file_that_a_package_lacks_is_named(stored):
    directory, made = stored
    with pytest.raises(UserError, match=r"has no package/img/1.png"):
        list(packages.read_files(directory / made["apple"].tarball, ["emoji.json", "img/1.png"]))


def test_the_held_out_vendor_is_only_in_the_test(root):
    emoji = data.read(root)
    assert [(one.name, one.kind) for one in emoji] == [(n, KINDS[s]) for n, s in zip(NAMES, SUBGROUPS, strict=True)]
    assert emoji[0].keywords == ("red", "ox")
    lines = {name: [json.loads(line) for line in (root / f"data/{name}.jsonl").read_text().splitlines()]
             for name in ("captions", "contexts", "questions")}  # fmt: skip
    for name in ("captions", "contexts"):
        shown = [line["image"] for line in lines[name]]
        assert len(shown) == len(set(shown)) == len(NAMES) * len(TRAINED) * data.VARIATIONS
        assert {image.split("/")[0] for image in shown} == set(TRAINED)
        assert all((root / "images" / image).exists() for image in shown)
    assert {line["image"] for line in lines["questions"]} == {f"{HELD_OUT}/{id}.png" for id in IDS}
    assert sorted(path.name for path in (root / "images" / HELD_OUT).iterdir()) == [f"{id}.png" for id in IDS]
    for number, whether in enumerate(line for line in lines["questions"] if line["category"] == data.YES_OR_NO):
        asked = whether["text"].removeprefix("Is it called ").removesuffix("?")
        assert (asked == NAMES[number]) == (whether["answer"] == "yes") == (number % 2 == 0) and asked in NAMES


def test_drawings_are_on_white_and_variations_keep_them():
    image = drawing.on_white(draw(0, 0))
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((20, 20)) == (255, 0, 0)
    inks = []
    for seed in range(20):
        varied = np.asarray(drawing.variation(image, random.Random(seed), 48), int)
        assert varied.shape == (48, 48, 3)
        np.testing.assert_array_equal(varied, np.asarray(drawing.variation(image, random.Random(seed), 48)))
        ink = (255 - varied).sum(-1) > 60
        assert 0.1 < ink.mean() < 0.6  # 0.44 of the drawing
        inks.append(varied[ink].mean(0))
    assert np.std(inks, axis=0).min() > 5 and np.argmax(np.mean(inks, axis=0)) == 0  # mostly red
    matrix = drawing.hue_rotation(2 * np.pi / 3)
    np.testing.assert_allclose(matrix @ [255, 0, 0], [0, 255, 0], atol=1e-4)
    np.testing.assert_allclose(drawing.hue_rotation(1.0) @ [90, 90, 90], [90, 90, 90], atol=1e-4)


def test_conversations_are_datagens_and_true(root, capsys):
    emoji = {one.id: one for one in data.read(root)}
    samples = LlavaJson(root / "made/llava.json")
    rejects = (root / "made/rejects.jsonl").read_text().splitlines()
    contexts = len(NAMES) * len(TRAINED) * data.VARIATIONS
    assert len(samples) + len(rejects) == contexts and len(samples) > contexts / 2
    assert {json.loads(line)["reason"] for line in rejects} <= {"near-duplicate"}
    answers = {"Yes.": 0, "No.": 0}
    for sample in samples:
        one = emoji[Path(sample.images[0]).stem.split("-")[0]]
        texts = [text.replace("<image>", "").strip() for _, text in sample.turns]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            if answer in answers:
                answers[answer] += 1
                said = one.name in question or f" {one.kind}" in question
                assert said == (answer == "Yes."), question
            elif question in teacher.NAMES:
                assert answer.lower() == f"{one.name}."
            elif question in teacher.KINDS:
                assert answer.lower() == f"{one.kind}."
    assert 0.7 < answers["Yes."] / answers["No."] < 1.4 and sum(answers.values()) > contexts / 2

    def requests() -> int:
        ledger = Ledger(root / "made/ledger.sqlite")
        found = ledger.totals().requests
        ledger.close()
        return found

    assert requests() == contexts
    teacher.main(["--root", str(root)])  # resumes: every answer is in the ledger
    assert requests() == contexts
    assert f"{len(samples)} samples of {contexts} contexts" in capsys.readouterr().out
    assert teacher.reply({"model": "m", "messages": [{"content": "A dog."}]}, list(emoji.values()))[0] == 400


def test_bags_of_words_are_names_kinds_and_keywords(root):
    texts = tower.bags_of_words(data.read(root))
    assert [bag.shape[0] for bag in texts.bags] == [len(NAMES), len({KINDS[s] for s in SUBGROUPS}), 14]
    for bag, right in zip(texts.bags, texts.right, strict=True):
        np.testing.assert_allclose(bag.sum(1), 1, rtol=1e-6)
        np.testing.assert_allclose(right.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(texts.right[0], np.eye(len(NAMES)))
    assert (texts.right[2][0] == 0.5).sum() == 2  # red, ox


def test_the_tower_that_transformers_loads_embeds_as_the_one_that_is_trained(root, tmp_path, monkeypatch):
    monkeypatch.setattr(tower, "CONFIG", TINY)
    monkeypatch.setattr(tower, "LAYERS", 2)
    params = tower.init(jax.random.key(0), tower.bags_of_words(data.read(root)))
    tower.save_clip(tmp_path, TINY, {f"vision.{name}": value for name, value in params.items()})
    reference, info = transformers.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images = [Image.open(root / "images" / HELD_OUT / f"{id}.png").resize((16, 16)) for id in IDS]
    pixels = transformers.CLIPImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = reference(pixels, output_hidden_states=True).hidden_states[tower.LAYERS][:, 1:].numpy()
    features = features / np.sqrt(np.square(features).mean(-1, keepdims=True) + 1e-6)
    embedded = features @ np.asarray(params["projection.kernel"])
    expected = (embedded / np.linalg.norm(embedded, axis=-1, keepdims=True)).mean(1)
    images = np.stack(list(map(np.asarray, images)))
    np.testing.assert_allclose(tower.embed_images(params, images), expected, rtol=0, atol=1e-4)
    some = tower.embed_images(params, images, jax.random.key(0), seen=0.5)
    assert 1e-3 < np.abs(some - expected).max() < 1


def test_the_tower_learns_what_it_is_shown(answered):
    zero_shot = json.loads((answered / "clip/zero_shot.json").read_text())
    assert np.mean([zero_shot[id][0] == name for id, name in zip(IDS, NAMES, strict=True)]) > 0.7
    assert set(zero_shot) == set(IDS) and {kind for _, kind in zero_shot.values()} <= set(KINDS.values())


def test_baselines_answer_the_questions(answered, tmp_path, capsys):
    questions = str(answered / "data/questions.jsonl")
    found = {}
    for name in ("frequent", "pixels", "clip"):
        evaluate(["score", "exact", f"--answers={answered}/answers/{name}.jsonl", "--labels", questions, "--json"])
        found[name] = json.loads(capsys.readouterr().out)
        assert found[name]["total"] == 3 * len(NAMES)
    assert found["frequent"]["by_category"] == {"kind": 42.86, "name": 14.29, "yes or no": 57.14}
    assert found["pixels"]["accuracy"] == 100  # the vendors of these tests differ little
    guess = baselines.of_guess({"a": ("fox", "mammal")})
    asked = [("name", ASK_NAME), ("kind", "?"), ("yes or no", "Is it called fox?"), ("yes or no", "Is it called ox?")]
    answers = [guess({"image": "twitter/a.png", "category": category, "text": text}) for category, text in asked]
    assert answers == ["fox", "mammal", "yes", "no"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_recipe_is_one(stage):
    config_check.check(config.get_config(stage))
    with pytest.raises(ValueError, match="neither pretrain nor finetune"):
        config.get_config("")


def test_the_samples_of_both_stages_have_no_fault(root, tmp_path, capsys):
    datagen(["captions", "--captions", f"{root}/data/captions.jsonl", "--output", f"{tmp_path}/captions.json"])
    for file in (tmp_path / "captions.json", root / "made/llava.json"):
        assert not check(["--json", str(file), "--images", str(root / "images")])
        assert "no problems" in "".join(capsys.readouterr())


def test_commands_run_in_order_with_the_time_left(tmp_path, capsys):
    class Scripted:
        def run(self, *arguments: str) -> Ran:
            return Ran(" ".join(arguments), 60.0, 0)

    planned = [recipe.Step("a", 1, ("x",)), recipe.Step("b", 2, ("y", "z")), recipe.Step("c", 3, ("z",))]
    ran = recipe.run_steps(Scripted(), planned)
    assert {name: one.output for name, one in ran.items()} == {"a": "x", "b": "y z", "c": "z"}
    assert capsys.readouterr().out == "\n[1/3] a\n[2/3] b, about 0:05:00 left\n[3/3] c, about 0:02:00 left"


@pytest.fixture
def outputs():
    """Of the steps whose output is read."""
    score = {"accuracy": 70.0, "by_category": {"name": 50.0, "kind": 60.0, "yes or no": 100.0}, "total": 21}
    ran = {f"score of {name}": Ran(json.dumps(score) + "\n", 2.0, 0) for name in recipe.ANSWERS}
    return ran | {"chat": Ran("Hot dog.\n", 10.4, 0)}


def test_the_summary_is_a_table(outputs, tmp_path):
    summary = recipe.summarize(tmp_path, outputs)
    assert summary["seconds"]["total"] == 18 and summary["chat"][ASK_NAME] == "Hot dog." and summary["questions"] == 21
    lines = recipe.table(summary).splitlines()
    assert lines[0] == "| twitter's emoji | name | kind | yes or no | all |" and len(lines) == 6
    assert lines[-1] == "| the assistant | 50.0 % | 60.0 % | 100.0 % | 70.0 % |"
    shown = recipe.report(tmp_path, summary)
    assert "21 questions after 0.3 minutes" in shown and "Hot dog." in shown and lines[-1] in shown


def test_the_gallery_shows_answers(answered, tmp_path):
    outcomes = answered / "outcomes/assistant"
    questions = str(answered / "data/questions.jsonl")
    evaluate(["score", "exact", f"--answers={answered}/answers/pixels.jsonl", "--labels", questions,
              "--questions", questions, "--outcomes", f"{outcomes}/emoji.outcomes.jsonl"])  # fmt: skip
    gallery.main(["--root", str(answered), "--output", str(tmp_path / "emoji.png")])
    image = np.asarray(Image.open(tmp_path / "emoji.png").convert("RGB"))
    for colour in (gallery.RIGHT, COLOURS[0]):  # a text and an emoji
        rgb = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert (np.abs(image.astype(int) - rgb).sum(-1) < 40).sum() > 20


def test_every_step_of_the_recipe_is_a_command(smollm2_gguf):
    for step in recipe.steps(Path("runs/emoji"), short=False):
        assert step.expected > 0 and importlib.util.find_spec(step.arguments[0])
