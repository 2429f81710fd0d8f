"""What samples of other formats hold that is not supported: keys, marks of images, videos and sounds, and formats.

To ignore any of these would train on something else than the file says, so each is a fault. A key in none of these
tables, such as `source` or `width`, describes the sample and is ignored.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llava_jax.data.templates import IMAGE_TOKEN

# ---- Keys

READ = {"id", "image", "images", "conversations", "messages", "system", "system_prompt"}  # of a sample

_NO_VIDEO = "the model sees images only: give frames as images, or drop the sample"
_NO_SOUND = "the model hears nothing: drop the sample"
_NO_TOOLS = "describe tools in `system`, or remove the key"
_NO_PREFERENCES = "it is not trained on preferences: write the answer to learn into `conversations`"
_NO_WEIGHTS = "all answers have the same weight"
_NO_OTHER = "the model sees images only: render it as one, or drop the sample"
MEDIA = (
    dict.fromkeys(("video", "videos", "video_path", "video_url", "frames"), _NO_VIDEO)
    | dict.fromkeys(
        ("audio", "audios", "audio_path", "audio_url", "input_audio", "sound", "sounds", "speech"), _NO_SOUND
    )
    | dict.fromkeys(("pdf", "pdfs", "document", "documents", "point_cloud"), _NO_OTHER)
)
# Keys of a sample that would change its targets -> the way out.
UNREAD = (
    MEDIA
    | dict.fromkeys(("tools", "functions"), _NO_TOOLS)
    | dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"), _NO_PREFERENCES)
    | dict.fromkeys(
        ("system_message", "system_msg", "system_instruction", "systemprompt", "sys"), "write it into `system`"
    )
    | {"history": "write the earlier turns into `conversations`, before the others"}
)
# Other names of images; beside `image` they only describe it.
IMAGE_KEYS = dict.fromkeys(
    ("image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files", "image_name", "image_list",
     "image_id", "image_ids", "image_base64", "image_bytes", "img", "imgs", "img_path", "img_paths", "img_id",
     "picture", "pictures"),
    "images are read from `image` or `images`: rename the key",
)  # fmt: skip
# Keys of a turn, in the same way.
UNREAD_IN_TURNS = (
    MEDIA
    | dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), "calls of tools are not trained on")
    | dict.fromkeys(
        ("reasoning_content", "reasoning_details", "reasoning", "thinking", "think", "thought", "thoughts"),
        "write it into the answer, or remove the key",
    )
    | dict.fromkeys(("system", "system_prompt"), "write it into the sample's `system`")
    | dict.fromkeys(("mask", "masked"), f"{_NO_WEIGHTS}: make a sample that ends before it")
    | dict.fromkeys(("image", "images", *IMAGE_KEYS), f"name images in the sample's `image`, {IMAGE_TOKEN} in the text")
)
_MISSPELLED = {key.title(): f"write it in lower case, `{key}`" for key in READ - {"id"}}
_CHOICES = ("choices", "options")
_TEXTS = ("instruction", "input", "prompt", "question", "query", "context", "hint", "preamble", "passage", *_CHOICES)
# Whether the tokens of an answer are targets, and with which weight.
WEIGHTS = ("loss", "weight", "loss_weight", "loss_scale", "loss_mask", "calculate_loss", "train", "trainable",
           "training", "train_on_turn")  # fmt: skip


def unread_keys(value: Mapping[str, Any], has_images: bool) -> Iterator[str]:
    """The faults of a sample's keys that are not read and have a value."""
    known = UNREAD if has_images else UNREAD | IMAGE_KEYS
    for key, held in value.items():
        if _says(held) and (reason := known.get(key.lower()) or _MISSPELLED.get(key)):
            yield f"`{key}` is not read: {reason}"


def unlearned(value: Mapping[str, Any]) -> Iterator[str]:
    """The faults of keys that exclude a sample's answers from training."""
    if value.get("label") is False:  # of KTO
        yield f"`label` is false, as of a bad answer: {_NO_PREFERENCES}"
    for key in WEIGHTS:
        if value.get(key) == 0:  # as False is
            yield f"`{key}` is {value[key]}, but {_NO_WEIGHTS}: drop the sample"


def unread_texts(value: Mapping[str, Any], texts: Iterable[str]) -> Iterator[str]:
    """Keys of a sample that hold a text like a question, or choices, which none of its turns repeats."""
    for key in _TEXTS:
        said = value.get(key)
        said = [said] if isinstance(said, str) else said if key in _CHOICES and isinstance(said, list) else []
        if any(isinstance(part, str) and not any(part.strip() in text for text in texts) for part in said):
            yield key


def unread_turn_keys(turn: Mapping[str, Any], answers: bool) -> Iterator[str]:
    for key, value in turn.items():
        if key in UNREAD_IN_TURNS and _says(value):
            yield f"`{key}` is not read: {UNREAD_IN_TURNS[key]}"
        elif answers and key in WEIGHTS and value not in (None, 1):  # True equals 1
            yield f"`{key}` is {value}, but {_NO_WEIGHTS}: make a sample that ends before it"


def _says(value: Any) -> bool:
    return value not in (None, False, "", "[]", "{}") and value not in ([], {})


# ---- Marks

# Neither prose nor code contains these.
_MARKS = re.compile(
    r"<\|[a-z_]*(?:image|img|vision|video|audio)\w*\|>"  # <|image_1|>, <|vision_start|>, <|video_pad|>, <|AUDIO|>
    r"|<((?:image|img|video|audio|picture)[ _:-]?#?\d+)>(?![\s\S]*</\1>)"  # <image1>, but in XML
    r"|<(?:image|img|video|audio|picture)[ _-]?(?:pad|placeholder|here|soft_token|context|content)>"
    r"|<(?:start|end)_of_(?:image|img|video|audio)>|<im_patch>|<ref-object>"
    r"|(?<![\w)\]])\[(?-i:IMG_BREAK|IMG_END|BEGIN_AUDIO)\]",  # and no index, as in pixels[IMG_END]
    re.IGNORECASE,
)
_FILES = re.compile(r"<(img|image)>([^\s<>\"'`{}$][^<>\n\"'`{}]*)</\1>", re.IGNORECASE)  # <img>a.jpg</img>
# Also tags of HTML and BBCode. Text about these quotes them, calls them tags, or closes them.
_TAG = r"(?:<(?:image|img|video|audio|speech|sound)\s*/?>|\[(?:IMG|IMAGE|VIDEO|AUDIO)\](?!\())"
_TAGS = re.compile(rf"(?<![\"'`]){_TAG}(?![\"'`]|[ -](?:tag|element|attribute))", re.IGNORECASE)
_BRACKETS = re.compile(r"\[(?:BEGIN_)?(?:IMG|IMAGE|VIDEO|AUDIO)", re.IGNORECASE)
_CODE = re.compile(r"```[\s\S]*?(?:```|\Z)|`[^`\n]*`")
_GROUNDING = re.compile(r"</(?:ref|box|quad|point)>")  # of data sets with boxes, no HTML
_HTML = re.compile(
    r"</\w|\[/\w|<!doctype|<(?:a|body|br|button|div|form|h[1-6]|head|html|input|li|ol|p|script|section|source|span|style"
    r"|table|td|tr|track|ul)\b",
    re.IGNORECASE,
)


def may_hold_marks(text: str) -> bool:
    """Whether a text needs a closer look; most do not."""
    return text.count("<") != text.count(IMAGE_TOKEN) or ("[" in text and _BRACKETS.search(text) is not None)


def foreign_mark(text: str, question: bool) -> str | None:
    """The first mark of another format for an image, a video or a sound in a text. Code has none."""
    plain = _CODE.sub("", text)
    if found := _MARKS.search(plain):
        return found[0]
    if (found := _FILES.search(plain)) and not _is_html(_FILES.sub("", plain)):
        return found[0]
    return next((tag for tag, alone in _tags(text) if alone), None) if question else None


def doubtful_mark(text: str) -> str | None:
    """A tag within a line of a question, which may be a mark or HTML."""
    if not may_hold_marks(text):
        return None
    return next((tag for tag, alone in _tags(text) if not alone), None)


def _is_html(text: str) -> bool:
    return "```" in text or _HTML.search(_GROUNDING.sub("", text)) is not None


def _tags(text: str) -> Iterator[tuple[str, bool]]:
    """Tags that may be marks, and whether they are where marks are: before a line or after it.

    Film scripts have lines that begin with [VIDEO]: that is a mark only at the beginning of the text.
    """
    if _is_html(text):
        return
    begun = False  # whether the lines before have text
    for line in text.split("\n"):
        said = [between.strip() for between in _TAGS.split(line)]
        after = max((i for i, between in enumerate(said) if between), default=-1)
        before = ""
        for i, tag in enumerate(_TAGS.findall(line)):
            before = said[i] or before
            alone = not before or (after <= i and before[-1] in ".?!:")
            if tag[0] == "[" and tag != "[IMG]":
                alone = tag.isupper() and not begun and after < 0
            if tag != IMAGE_TOKEN:
                yield tag, alone
        begun = begun or after >= 0


# ---- Formats

ASKED = ("instruction", "question", "query", "prompt", "problem", "input")
ANSWERED = ("output", "answer", "answers", "response", "completion", "caption", "text", "label", "solution")


def explain_missing(value: Mapping[str, Any]) -> str:
    """The format that a record without `conversations` seems to have, and how to convert it."""
    if "chosen" in value or "rejected" in value:
        return f"; it looks like preferences: {_NO_PREFERENCES}"
    for key, held in value.items():
        if isinstance(held, list) and held and isinstance(held[0], dict):
            if not {"conversations", "messages", "question_id", "question"}.isdisjoint(held[0]):
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
