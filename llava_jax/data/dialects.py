"""What samples of other formats hold that is not read: keys, marks of images, videos and sounds, whole formats.

To leave any of it out would train on something else than the file says, so each is named. A key that is in none of
these tables, such as `source` or `width`, says something about the sample and is left alone.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llava_jax.data.conversation import IMAGE_TOKEN

# ---- Keys

READ = {"id", "image", "images", "conversations", "messages", "system", "system_prompt"}  # of a sample
READ_IN_TURNS = {"from", "value", "role", "content"}

_NO_VIDEO = "the model sees images only: give frames as images, or drop the sample"
_NO_SOUND = "the model hears nothing: drop the sample"
_NO_TOOLS = "describe tools in `system`, or remove the key"
_NO_PREFERENCES = "it is not trained on preferences: write the answer to learn into `conversations`"
MEDIA = dict.fromkeys(("video", "videos", "video_path", "video_url"), _NO_VIDEO) | dict.fromkeys(
    ("audio", "audios", "audio_path", "audio_url", "input_audio", "sound", "sounds", "speech"), _NO_SOUND
)
# Keys of a sample that change what is learned of it -> the way out.
UNREAD = (
    MEDIA
    | dict.fromkeys(("tools", "functions"), _NO_TOOLS)
    | dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"), _NO_PREFERENCES)
    | {"history": "write the earlier turns into `conversations`, before the others"}
)
# Other names of images, which say something about `image` where that is there.
IMAGE_KEYS = dict.fromkeys(
    ("image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files", "image_name", "img",
     "img_path", "picture", "pictures"),
    "images are read from `image` or `images`: rename the key",
)  # fmt: skip
# The same of a turn.
UNREAD_IN_TURNS = (
    MEDIA
    | dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), "calls of tools are not trained on")
    | dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "write it into the answer, or remove the key")
    | dict.fromkeys(("image", "images", *IMAGE_KEYS), f"name images in the sample's `image`, {IMAGE_TOKEN} in the text")
)
WEIGHTS = ("loss", "weight", "loss_weight", "train", "trainable")  # of an answer; all are learned alike


def unread_keys(value: Mapping[str, Any], has_images: bool) -> Iterator[str]:
    """What a sample's keys say that is not read. Empty values say nothing."""
    known = UNREAD if has_images else UNREAD | IMAGE_KEYS
    yield from (f"`{key}` is not read: {known[key]}" for key in value if key in known and _says(value[key]))


def unread_turn_keys(turn: Mapping[str, Any], answers: bool) -> Iterator[str]:
    for key, value in turn.items():
        if key in UNREAD_IN_TURNS and _says(value):
            yield f"`{key}` is not read: {UNREAD_IN_TURNS[key]}"
        elif answers and key in WEIGHTS and value not in (None, 1):  # True equals 1
            yield f"`{key}` is {value}, but all answers are learned alike: make a sample that ends before it"


def _says(value: Any) -> bool:
    return value not in (None, False, "", "[]", "{}") and value not in ([], {})


# ---- Marks

# What no text of people and no program has.
_MARKS = re.compile(
    r"<\|[a-z_]*(?:image|img|vision|video|audio)\w*\|>"  # <|image_1|>, <|vision_start|>, <|video_pad|>, <|AUDIO|>
    r"|<(?:image|img|video|audio|picture)[ _-]?(?:\d+|pad|placeholder|here|soft_token|context)>"  # <image1>
    r"|<(?:start|end)_of_(?:image|img|video|audio)>|<im_patch>"
    r"|<img>[^\s<>\"'`](?:[^<>\n\"'`]*[^\s<>\"'`])?</img>|<image>[^\n<>]{0,200}</image>"  # <img>a.jpg</img>
    r"|\[(?:IMG|IMAGE|VIDEO|AUDIO)_\w+\]",
    re.IGNORECASE,
)
# Tags of HTML and BBCode, too. Text about those quotes them, says what they are, or closes them.
_TAG = r"(?:<(?:image|img|video|audio|speech|sound)>|\[(?:IMG|IMAGE|VIDEO|AUDIO)\])"
_TAGS = re.compile(rf"(?<![\"'`]){_TAG}(?![\"'`]|[ -](?:tag|element|attribute))", re.IGNORECASE)
_CLOSING = re.compile(r"</\w|\[/\w|```")


def foreign_mark(text: str, question: bool) -> str | None:
    """The first mark of another format that stands in a text for an image, a video or a sound."""
    if text.count("<") == text.count(IMAGE_TOKEN) and "[" not in text:  # nearly all texts
        return None
    if found := _MARKS.search(text):
        return found[0]
    return next((tag for tag, alone in _tags(text) if alone), None) if question else None


def doubtful_mark(text: str) -> str | None:
    """A tag within a line of a question: it may be meant as a mark, or as HTML."""
    return next((tag for tag, alone in _tags(text) if not alone), None)


def _tags(text: str) -> Iterator[tuple[str, bool]]:
    """Tags that may be marks, and whether they stand where marks do: before a line, or after it."""
    if _CLOSING.search(text):
        return
    for tag in _TAGS.finditer(text):
        if tag[0] != IMAGE_TOKEN:
            before = _TAGS.sub("", text[: tag.start()].rpartition("\n")[2]).strip()
            after = _TAGS.sub("", text[tag.end() :].partition("\n")[0]).strip()
            yield tag[0], not before or (not after and before[-1] in ".?!:")


# ---- Formats

ASKED = ("instruction", "question", "query", "prompt", "problem", "input")
ANSWERED = ("output", "answer", "answers", "response", "completion", "caption", "text", "label", "solution")
SIMILAR = {"conversation", "dialogue", "dialog", "turns", "chat", "texts"}


def explain_missing(value: Mapping[str, Any]) -> str:
    """Which format a record without `conversations` looks like, and how to convert it."""
    if "chosen" in value or "rejected" in value:
        return f"; it looks like preferences: {_NO_PREFERENCES}"
    for key, held in value.items():
        if isinstance(held, list) and held and isinstance(held[0], dict):
            if not {"conversations", "messages"}.isdisjoint(held[0]):
                return f"; its `{key}` holds a list of samples: jq '.[\"{key}\"]' OLD > NEW.json writes the list alone"
            keys = ", ".join(held[0])
            return f"; its `{key}` is a list of objects of {keys}: {_TURNS}"
    asked = next((key for key in ASKED if key in value), None)
    answered = next((key for key in ANSWERED if key in value), None)
    if asked or answered:
        found = " and ".join(f"`{key}`" for key in (asked, answered) if key)
        return f"; it looks like a format of {found}: {_TURNS}"
    return f"; its keys are {', '.join(map(str, value)) or 'none'}: {_TURNS}"


_TURNS = 'turns are written as "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
