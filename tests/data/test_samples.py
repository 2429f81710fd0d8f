"""What a record says, in each of its spellings, and every fault of it."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.cli import UserError
from llava_jax.data.records import Record
from llava_jax.data.samples import Sample, parse_sample, read_sample

QUESTION, ANSWER = {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}
TURNS = (("user", "<image>\nWhat is it?"), ("assistant", "A cat."))
SAMPLE = {"id": "x", "image": "a.jpg", "conversations": [QUESTION, ANSWER]}


def parse(value):
    return parse_sample(Record("F: line 1", 0, 0, 0, value))


def messages(*contents, **fields):
    roles = ("user", "assistant") * len(contents)
    said = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"id": "x", "messages": said, **fields}


def image_part(name=None):
    return {"type": "image", "image": name} if name else {"type": "image"}


def part(kind, text=None, index=None):
    """As the sets of HuggingFaceH4 on the Hub have it."""
    return {"type": kind, "text": text, "index": index}


TEXT = {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(
    "value",
    [
        SAMPLE,
        SAMPLE | {"images": ["a.jpg"]},
        {"id": "x", "images": ["a.jpg"], "conversations": [QUESTION, ANSWER], "image": None},
        SAMPLE | {"video": None, "tools": [], "history": "", "source": "vqa", "width": 640, "system": ""},
        SAMPLE | {"label": 0, "loss": 0.7, "weight": 1, "image_id": 7, "clip": 0.31, "text": None},
        messages("<image>\nWhat is it?", "A cat.", image="a.jpg"),
        messages([image_part(), TEXT], [{"type": "text", "text": "A cat."}], images=["a.jpg"]),
        messages([image_part("a.jpg"), TEXT], "A cat."),
        messages([image_part("a.jpg"), TEXT], "A cat.", image="a.jpg"),
        messages([{"type": "image_url", "image_url": {"url": "a.jpg"}}, TEXT], "A cat."),
        messages([{"image": "a.jpg"}, {"text": "What is it?"}], "A cat."),
        messages(["<image>", "What is it?"], "A cat.", image="a.jpg"),
        messages([part("image", index=0), part("text", "What is it?")], [part("text", "A cat.")], images=["a.jpg"]),
        messages([{"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}, TEXT], "A cat."),
        SAMPLE | {"messages": None},
        SAMPLE | {"conversations": [QUESTION | {"loss": False}, ANSWER | {"loss": True, "weight": 1, "name": "bot"}]},
        SAMPLE | {"conversations": [QUESTION | {"role": "user"}, {"role": "assistant", "value": "A cat."}]},
        SAMPLE | {"conversations": [ANSWER, QUESTION, ANSWER]},
    ],
)
def test_every_spelling_is_the_same_sample(value):
    assert parse(value) == Sample("x", ("a.jpg",), TURNS)


@pytest.mark.parametrize(
    "value",
    [
        SAMPLE | {"system": "Be brief."},
        SAMPLE | {"system_prompt": "Be brief."},
        SAMPLE | {"system": "Be brief.", "system_prompt": "Be brief."},
        SAMPLE | {"conversations": [{"from": "system", "value": "Be brief."}, QUESTION, ANSWER]},
        SAMPLE | {"conversations": [{"role": "developer", "content": "Be brief."}, QUESTION, ANSWER]},
        SAMPLE | {"system": "Be brief.", "conversations": [{"from": "system", "value": ""}, QUESTION, ANSWER]},
        SAMPLE | {"conversations": [{"from": "system", "value": "Be brief."}, ANSWER, QUESTION, ANSWER]},
    ],
)
def test_system_prompts_come_first(value):
    assert parse(value) == Sample("x", ("a.jpg",), (("system", "Be brief."), *TURNS))


FAULTS = [
    ("key", "`image` is", SAMPLE | {"images": ["b.jpg"]}),
    ("key", "`conversations` and `messages` hold other turns", SAMPLE | {"messages": [{"role": "user"}]}),
    ("key", "several system prompts, system", SAMPLE | {"system": "a", "system_prompt": "b"}),
    ("structure", "`system` is no text", SAMPLE | {"system": ["a"]}),
    ("key", "`video` is not read", SAMPLE | {"video": "a.mp4"}),
    ("key", "`videos` is not read", SAMPLE | {"videos": ["a.mp4"]}),
    ("key", "`audio` is not read", SAMPLE | {"audio": {"path": "a.wav"}}),
    ("key", "`history` is not read", SAMPLE | {"history": [["q", "a"]]}),
    ("key", "`tools` is not read", SAMPLE | {"tools": [{"name": "f"}]}),
    ("key", "`rejected` is not read", SAMPLE | {"rejected": {"from": "gpt", "value": "b"}}),
    ("key", "`image_path` is not read", {"conversations": [QUESTION | {"value": "q"}, ANSWER], "image_path": "a.jpg"}),
    ("key", "`image_id` is not read", {"conversations": [QUESTION | {"value": "q"}, ANSWER], "image_id": 7}),
    ("key", "`system_message` is not read", SAMPLE | {"system_message": "s"}),
    ("key", "`System` is not read: write it in lower case, `system`", SAMPLE | {"System": "s"}),
    ("key", "`Image` is not read", {"conversations": [QUESTION | {"value": "q"}, ANSWER], "Image": "a.jpg"}),
    ("key", "`label` is false", SAMPLE | {"label": False}),
    ("key", "`train` is False", SAMPLE | {"train": False}),
    ("key", "turn 2: `loss_scale` is 0", SAMPLE | {"conversations": [QUESTION, ANSWER | {"loss_scale": 0}]}),
    ("key", "turn 2: `thought` is not read", SAMPLE | {"conversations": [QUESTION, ANSWER | {"thought": "hm"}]}),
    ("marks", "the text of a user holds <ref-object>",
     SAMPLE | {"conversations": [QUESTION | {"value": "<image>Find <ref-object>"}, ANSWER]}),
    ("key", "turn 2: `loss` is False", SAMPLE | {"conversations": [QUESTION, ANSWER | {"loss": False}]}),
    ("key", "turn 2: `weight` is 0", SAMPLE | {"conversations": [QUESTION, ANSWER | {"weight": 0}]}),
    ("key", "turn 2: `tool_calls`", SAMPLE | {"conversations": [QUESTION, ANSWER | {"tool_calls": [{}]}]}),
    ("key", "turn 2: `reasoning_content`", messages("q", "a") | {"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]}),
    ("key", "turn 1: `system` is not read", SAMPLE | {"conversations": [QUESTION | {"system": "s"}, ANSWER]}),
    ("key", "turn 2: `mask` is not read", SAMPLE | {"conversations": [QUESTION, ANSWER | {"mask": True}]}),
    ("key", "turn 1: `images`", SAMPLE | {"conversations": [QUESTION | {"images": ["b.jpg"]}, ANSWER]}),
    ("order", "a later turn is of system", SAMPLE | {"conversations": [QUESTION, {"from": "system", "value": "s"}]}),
    ("marks", "the system prompt holds <image>", SAMPLE | {"system": "<image>"}),
    ("marks", "the text of a user holds <|image_1|>", messages("<|image_1|>\nWhat?", "a")),
    ("marks", "the text of a user holds <video>", messages("<video>\nWhat?", "a")),
    ("role", 'turn 1 is from "tool"', messages("q", "a") | {"messages": [{"role": "tool", "content": "x"}]}),
    ("role", "its keys are user, assistant", {"conversations": [{"user": "q", "assistant": "a"}]}),
    ("role", "turn 1 is from [", {"conversations": [{"from": ["human"], "value": "q"}]}),
    ("role", 'turn 1 is from {"from"', {"conversations": [{"from": "human", "role": "assistant", "value": "q"}]}),
    ("structure", "`content` of turn 2 is no text but null", messages("q", None)),
    ("structure", "an image by its URL", messages([image_part("https://a/b.jpg"), TEXT], "a")),
    ("structure", "an image by its URL", messages([image_part("data:image/png;base64,xx"), TEXT], "a")),
    ("structure", "turn 1 has a part", messages([{"type": "video", "video": "a.mp4"}, TEXT], "a")),
    ("structure", '`image` is "https://a/b.jpg", a URL', SAMPLE | {"image": "https://a/b.jpg"}),
    ("structure", '`images` is ["data:image/png;base64,', SAMPLE | {"images": ["data:image/png;base64,xx"]}),
    ("structure", "turn 1 has a part 3", messages([3], "a")),
    ("structure", "an image whose `source` is not read", messages([image_part() | {"source": "x"}, TEXT], "a")),
    ("structure", "an image whose `image` is not read", messages([{"type": "image", "image": {"bytes": "x"}}], "a")),
    ("structure", "an image whose `path` is not read", messages([image_part("a.jpg") | {"path": "b.jpg"}], "a")),
    ("structure", "image 0 of the text has `index` 1", messages([part("image", index=1)], "a", images=["a.jpg"])),
    ("structure", "`content` names images", messages([image_part("b.jpg"), TEXT], "a", image="a.jpg")),
    ("marks", "2 <image> in the text, but 1 images", messages([image_part("a.jpg"), image_part()], "a")),
    ("structure", "it looks like a format of `instruction` and `output`", {"instruction": "q", "output": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "detail", "value"), FAULTS)
def test_what_is_not_used_is_a_fault_by_name(kind, detail, value):
    faults = [fault for fault in read_sample(value).faults if detail in fault.detail]
    assert [fault.kind for fault in faults] == [kind]
    with pytest.raises(UserError, match="F: line 1"):
        parse(value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["human", "gpt", "user", "a.jpg"]),
    lambda value: (
        st.lists(value, max_size=3)
        | st.dictionaries(
            st.sampled_from(["from", "value", "role", "content", "type", "text", "image", "image_url"]),
            value,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["id", "image", "images", "conversations", "messages", "system", "system_prompt", "video", "history", "x"]
        ),
        json_values,
        max_size=5,
    )
    | json_values
)
def test_any_json_is_a_sample_or_has_faults(value):
    before = copy.deepcopy(value)
    if read_sample(value).faults:
        with pytest.raises(UserError):
            parse(value)
    else:
        sample = parse(value)
        assert sum(text.count("<image>") for _, text in sample.turns) == len(sample.images)
    assert value == before


texts = st.text(st.characters(codec="utf-8", exclude_characters="<["), max_size=20)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.none() | texts, st.integers(0, 2))
def test_both_formats_say_the_same(rounds, system, images):
    turns = [turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))]
    turns[0] = ("user", "<image>\n" * images + turns[0][1])
    names = [f"{i}.jpg" for i in range(images)]
    ours = {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in turns]}
    theirs = {"messages": [{"role": role, "content": text} for role, text in turns]}
    ours |= {"image": names, "system": system}
    if system is not None:
        theirs["messages"].insert(0, {"role": "system", "content": system})
    parsed = parse(ours)
    assert parsed == parse(theirs | {"images": names})
    spoken = system is not None and system.strip() != ""
    assert parsed.turns == (*([("system", system)] if spoken else []), *turns)
