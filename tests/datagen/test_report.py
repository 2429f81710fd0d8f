"""The report counts what is there, shows samples with their pictures, and runs nothing that a text says."""

import html.parser
import json
import re
from pathlib import Path

import pytest
from report_files import EVIL, report, write_files
from scripted_llm import ScriptedLLM

from llava_jax.cli import UserError
from llava_jax.data import build, check
from llava_jax.data.sources import Sample
from llava_jax.datagen import report_samples
from llava_jax.datagen.__main__ import main
from llava_jax.datagen.contexts import Box, Context
from llava_jax.datagen.objects import SYNONYMS, Finder, plural
from llava_jax.datagen.report_samples import Draw
from llava_jax.datagen.statistics import QUESTIONS, Facts, Statistics, describe, kind_of, question_kind, tree
from llava_jax.datagen.sunburst import arcs


def sample(*texts, ident="1", image="cat.jpg"):
    return Sample(ident, (image,), tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


# ---------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man on a bike.", {"person", "bicycle", "motorcycle"}),
        ("Two hot dogs, knives and an orange shirt", {"hot dog", "knife"}),
        ("TEDDY\nBEARS, wine  glasses", {"teddy bear", "wine glass"}),
        ("a train station, a couple of oranges", {"orange"}),
        ("There is no dog, nor any visible cars; it isn't a cat. A puppy!", {"dog"}),
        ("catalogue, scar, dogma", set()),
        ("The dog's tail, the cat’s ears and a catcher's mitt", {"dog", "cat", "baseball glove"}),
        ("women and children with mice", {"person", "mouse"}),
        ("Traffic cones and a Circle", {"traffic cone", "circle"}),
        ("", set()),
    ],
)
def test_names_of_objects(text, expected):
    assert Finder(["Circle", "traffic cone"]).named(text) == expected


def test_the_table_has_cocos_categories():
    assert len(SYNONYMS) == 80 and {"man", "jockey"} <= set(SYNONYMS["person"].split()) and SYNONYMS["stop sign"] == ""
    finder = Finder()
    for category in set(SYNONYMS) - {"orange"}:
        assert category in finder.named(f"a {category} here") and category in finder.named(plural(category))


def test_claims_are_held_against_boxes_and_captions():
    context = Context("1", "cat.jpg", ("A kitten on a bike.",), (Box("spoon", 0, 0, 1, 1), Box("Cup", 0, 0, 1, 1)))
    facts = Facts([context], Finder(["Cup"]))
    told = sample("Is there a cup?", "A cat, two cats, a puppy and a dog.", "Else?", "Motorbikes, spoons. No cups.")
    claims = facts.claims(told)
    assert claims.supported == {"cat", "motorcycle", "spoon"} and claims.unsupported == {"dog": "puppy"}
    assert claims.boxes == {"spoon", "cup"} and claims.covered == {"spoon", "cup"}
    assert facts.claims(sample("?", "a dog", image="coco/cat.jpg")).unsupported == {"dog": "dog"}
    assert facts.claims(sample("?", "a dog", image="dog.jpg")) is None
    assert facts.claims(Sample("1", (), (("user", "?"), ("assistant", "a dog")))) is None

    both = Facts([context, Context("2", "dog.jpg", (), (Box("dog", 0, 0, 1, 1),))], Finder())
    two = Sample("1", ("cat.jpg", "dog.jpg"), (("user", "<image> and <image>?"), ("assistant", "a cat, a dog, a car")))
    assert both.claims(two).unsupported == {"car": "car"} and "dog" in both.claims(two).boxes
    assert facts.claims(two) is None  # what is in the second image is not known

    statistics = Statistics(facts)
    for text in ("a dog and a spoon", "a cat", "a dog and a puppy"):
        statistics.add(sample("?", text))
    objects = statistics.objects
    assert (objects.samples, objects.with_unsupported) == (3, 2)
    assert objects.unsupported == {"dog": 2} and objects.supported == {"cat": 1, "spoon": 1}
    assert objects.boxed == {"spoon": 3, "cup": 3} and objects.covered == {"spoon": 1}


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many dogs are there?", "how many"),
        ("In the image, what color is it?", "colour"),
        ("Where is it?", "where"),
        ("What time of day is it?", "when"),
        ("Who is that?", "who"),
        ("What might be the reason for this?", "why"),
        ("What is the man doing?", "doing what"),
        ("How does she feel?", "how"),
        ("Is it red?", "yes or no"),
        ("Which dog is bigger?", "what or which"),
        ("Describe it.", "a request"),
        ("Hm", "other"),
    ],
)
def test_kinds_of_questions(question, kind):
    assert question_kind(question) == kind and kind in QUESTIONS


def test_lengths_turns_and_first_words():
    statistics = Statistics(None)
    for told in (
        sample("<image>\nWhat is it?", "A cat.", "What is that?", "A big dog."),
        sample("Describe the image.\n<image>", "A cat " * 10),
        sample("What would you do?<image>", "Run away."),
    ):
        statistics.add(told)
    assert {kind: list(lengths.questions) for kind, lengths in statistics.lengths.items()} == {
        "conversation": [2],
        "detail": [1],
        "reasoning": [1],
    }
    assert list(statistics.lengths["conversation"].answer_words) == [2, 3]
    assert list(statistics.lengths["reasoning"].question_words) == [4]
    assert describe(statistics.lengths["detail"].answer_words)["most"] == 20
    what, describing = tree(statistics.first_words, 5)
    assert (what.word, what.count, describing.word) == ("what", 3, "describe")
    assert [(branch.word, branch.count) for branch in what.branches] == [("is", 2), ("would", 1)]
    assert len(tree(statistics.first_words, 1)) == 1
    drawn = arcs((what, describing), 4)
    assert len(drawn) == 4 + 2 + 3 and "what is that: 1" in [arc.title for arc in drawn]
    assert not any("nan" in arc.path for arc in drawn) and arcs((), 0) == []


def test_kinds_of_samples():
    assert kind_of(sample("a?", "b", "c?", "d")) == "conversation"
    assert kind_of(sample("Give a full account of what is in the picture.", "b")) == "detail"
    assert kind_of(sample("Why?", "b")) == "reasoning"


def test_drawing_is_fair_and_repeatable():
    def draw(count):
        made = Draw(10)
        for item in range(count):
            made.put("a", item)
        made.put("b", "x")
        return made

    drawn = list(draw(1000).drawn())
    assert drawn == list(draw(1000).drawn()) and len(drawn) == 11 and drawn[1] == ("b", "x")
    numbers = [item for group, item in drawn if group == "a"]
    assert len(set(numbers)) == 10 and max(numbers) > 500 and min(numbers) < 500
    assert draw(1000).sizes == {"a": 1000, "b": 1}


# --------------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def made(tmp_path) -> Path:
    write_files(tmp_path)
    return tmp_path


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and data.strip() and self.tags[-1][0] in ("td", "th"):
            self.rows[-1].append(data)


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_the_page(made):
    text = report(made, "--captions", made / "contexts.jsonl")
    page = Page(text)
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["samples"] == ["3"] and rows["rejected"] == ["2"] and rows["refusal"] == ["1", "50.0 %"]
    assert rows["yes or no"] == ["1", "25.0 %"] and rows["why"][0] == "1"
    assert rows["samples with images that have captions or boxes"] == ["2"]
    assert rows["categories in boxes that the sample names"] == ["1", "100.0 %"]
    assert rows["objects in answers that no box or caption has"] == ["1", "33.3 %"]
    assert rows["samples with such an object"] == ["1", "50.0 %"]
    assert rows["dog"] == ["0", "-", "1", "1", "100.0 %"]

    entries = {entry["id"]: entry for entry in data_of(text)["entries"]}
    assert entries["good"]["boxes"] == [["cat", 0.0, 0.0, 1.0, 0.5]] and entries["good"]["group"] == "conversation"
    assert entries["bad"]["unsupported"] == ["puppy"] and entries["bad"]["captions"] == ["A cup of coffee.", EVIL]
    assert entries["r"]["rejected"] and entries["r"]["detail"] == EVIL and entries["lost"]["captions"] == []
    thumbnails = data_of(text)["thumbnails"]
    assert thumbnails["chelsea.jpg"].startswith("data:image/jpeg;base64,") and thumbnails["lost.jpg"] == ""


def test_all_images_of_a_sample_are_shown(made):
    turns = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "A cat."}]
    sample = {"id": "two", "image": ["chelsea.jpg", "lost.jpg"], "conversations": turns}
    (made / "llava.json").write_text(json.dumps([sample]))
    shown = data_of(report(made, "--captions", made / "contexts.jsonl"))
    (entry,) = (entry for entry in shown["entries"] if entry["id"] == "two")
    assert [entry["image"], *(other["image"] for other in entry["more_images"])] == sample["image"]
    assert entry["turns"][0] == "Is <image> like <image>?" and set(shown["thumbnails"]) >= set(sample["image"])


def test_nothing_of_the_texts_is_html(made):
    text = report(made, "--captions", made / "contexts.jsonl")
    page = Page(text)
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?https?:", text)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy


def test_a_bounded_sample_is_shown(made):
    samples = json.loads((made / "llava.json").read_text())[:1]
    many = [{**samples[0], "id": str(i)} for i in range(500)]
    (made / "llava.json").write_text(json.dumps(many))
    text = report(made, "--shown", 20)
    shown = data_of(text)
    assert len(shown["entries"]) == 20 and shown["groups"]["conversation"][1] == 500
    assert len(shown["thumbnails"]) <= 3 and len(text) < 100_000
    assert len({entry["id"] for entry in shown["entries"]}) == 20


def test_without_contexts_nothing_is_said_of_objects(made):
    assert "Not known: captions and boxes were not given" in report(made)


def test_pictures_in_a_folder_of_cocos(made):
    """As in the published mixtures, which have folders in the names of pictures that COCO's files do not have."""
    coco = {
        "info": {},
        "images": [{"id": 5, "file_name": "chelsea.jpg", "width": 451, "height": 300}],
        "annotations": [{"id": 1, "image_id": 5, "caption": "A cat."}],
    }
    boxes = [{"id": 1, "image_id": 5, "category_id": 17, "bbox": [0, 0, 451, 150], "iscrowd": 0}]
    (made / "captions.json").write_text(json.dumps(coco))
    instances = {**coco, "categories": [{"id": 17, "name": "cat"}], "annotations": boxes}
    (made / "instances.json").write_text(json.dumps(instances))
    (made / "images" / "coco").mkdir()
    (made / "images" / "chelsea.jpg").rename(made / "images" / "coco" / "chelsea.jpg")
    (made / "llava.json").write_text((made / "llava.json").read_text().replace("chelsea.jpg", "coco/chelsea.jpg"))
    shown = data_of(report(made, "--captions", made / "captions.json", "--instances", made / "instances.json"))
    entry = next(entry for entry in shown["entries"] if entry["id"] == "good")
    assert entry["captions"] == ["A cat."] and entry["boxes"] == [["cat", 0.0, 0.0, 1.0, 0.5]]
    assert shown["thumbnails"]["coco/chelsea.jpg"]


def test_bad_input(made):
    with pytest.raises(UserError, match="no such folder"):
        main(["report", "--json", str(made / "llava.json"), "--images", str(made / "none"), "--output", "x"])
    (made / "rejects.jsonl").write_text("{}\n[]\n")
    with pytest.raises(UserError, match="rejects.jsonl: line 2: is no object"):
        report(made)
    (made / "llava.json").write_text('[{"id": "a"}]')
    with pytest.raises(UserError, match="llava.json: sample 0"):
        report(made)
    assert not (made / "report.html").exists()
    with pytest.raises(SystemExit):
        main(["report", "--json", "a", "--images", "b", "--output", "c", "--instances", "d"])


def test_a_run_ends_with_a_report_and_data_that_builds(made, monkeypatch):
    """From captions and boxes to a data set that is checked and built; one of two pictures is refused."""

    def reply(body):
        if "A cat." not in body["messages"][-1]["content"]:
            return "I'm sorry, but I can't help with that."
        return "Question:\nWhat does it do?\n===\nAnswer:\nThe cat sits by a warm window and looks at people outside."

    monkeypatch.setenv("OPENAI_API_KEY", "key")
    folder, output = str(made / "images"), made / "out"
    with ScriptedLLM(reply=reply) as server:
        files = ["--captions", str(made / "contexts.jsonl"), "--images", folder, "--output", str(output)]
        asked = ["--base-url", server.url, "--model", "m", "--prices", "1", "2", "--attempts", "1"]
        assert main(["conversation", *files, *asked]) == 0
    made_data = ["--json", str(output / "llava.json"), "--images", folder]
    assert check.main(made_data) == 0
    build.main([*made_data, "--output", str(made / "built")])
    text = (output / "report.html").read_text()
    entries = {entry["image"]: entry for entry in data_of(text)["entries"]}
    assert entries["chelsea.jpg"]["group"] == "conversation" and entries["chelsea.jpg"]["boxes"]
    assert entries["coffee.jpg"]["group"] == "rejected: refusal"
    assert entries["coffee.jpg"]["answer"] == "I'm sorry, but I can't help with that."
    rows = {row[0]: row[1:] for row in Page(text).rows if row}
    assert rows["samples"] == ["1"] and rows["rejected"] == ["1"] and rows["cost"][0].startswith("$")


def test_the_page_is_bounded(tmp_path, monkeypatch):
    write_files(tmp_path)
    huge = "y" * 10**6

    def record(ident, turns, image="chelsea.jpg"):
        talk = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"id": ident, "image": image, "conversations": talk}

    records = [record(huge, [f"<image>{huge}", huge]), record("many", ["<image>", "a"] + ["q", "a"] * 50_000)]
    records += [record(f"{i}", ["<image>Why?", "a" * 1000], "../secret.jpg" if i else "/dev/zero") for i in range(50)]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    rejects = [{"id": huge, "image": huge, "reason": huge, "detail": huge}]
    (tmp_path / "rejects.jsonl").write_text("\n".join(map(json.dumps, rejects)))
    contexts = {"image": "chelsea.jpg", "captions": [huge] * 9, "boxes": [{"category": huge, "bbox": [0, 0, 9, 9]}]}
    (tmp_path / "contexts.jsonl").write_text(json.dumps(contexts))
    text = report(tmp_path, "--captions", tmp_path / "contexts.jsonl")
    assert len(text) < 3_000_000
    data = json.loads(re.search('id="data">(.*)</script>', text)[1])
    assert len(data["entries"]) == 53 and data["thumbnails"]["../secret.jpg"] == data["thumbnails"]["/dev/zero"] == ""
    many = next(entry for entry in data["entries"] if entry["id"] == "many")
    assert many["turns"][-1].endswith(" more)") and len(many["turns"]) < 300
    monkeypatch.setattr(report_samples, "MAX_CHARACTERS", 50_000)
    assert 0 < report(tmp_path).count('"turns"') < 53
