"""Makes a sample of a JSON value, or finds all its faults.

Turns are `conversations` of `from` and `value`, as in LLaVA's format, or `messages` of `role` and `content`, as in
OpenAI's. What is understood is used. What would change the targets and is not understood is a fault, see `unsupported`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_jax.cli import UserError
from llava_jax.data import unsupported
from llava_jax.data.conversation import join_parts
from llava_jax.data.formats import to_llava
from llava_jax.data.records import Record, load_json
from llava_jax.data.templates import IMAGE_TOKEN

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's newer name
}
_WRITTEN = {"system": "system", "user": "human", "assistant": "gpt"}  # LLaVA's names of roles
_PLAIN = {"id", "image", "conversations"}  # the keys of most samples, which need no further checks
_IMAGE_PARTS = ("image", "image_url", "input_image")  # types of parts of a `content`
_NAMES = ("image", "image_url", "path", "url")  # keys of such a part
_URL = re.compile(r"data:|https?://|file://", re.IGNORECASE)  # in place of a name
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation and the names of its images, one for every `<image>` in its turns, in their order."""

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]  # (role, text): perhaps one of 'system'; 'user' and 'assistant' in turn


class Fault(NamedTuple):
    """Why a record is no sample."""

    kind: str
    detail: str


class Reading(NamedTuple):
    """What was read of a JSON value, or its faults."""

    faults: list[Fault]
    images: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()  # all, a first answer included


def parse_sample(record: Record) -> Sample:
    """The sample of a record, without an answer before the first question, as published. Raises `UserError`."""
    value = sample_value(record)
    reading = read_sample(value)
    for fault in reading.faults:
        raise UserError(f"{record.where} (id {sample_id(record, value)}): {fault.detail}")
    return Sample(sample_id(record, value), reading.images, from_first_question(reading.turns))


def record_value(record: Record) -> Any:
    """The JSON value of a record. Raises `UserError` if it is no JSON."""
    return load_json(record.value, record.where) if isinstance(record.value, bytes) else record.value


def sample_value(record: Record) -> Any:
    """The same converted to LLaVA's format if it is in a registered one. Raises `UserError` if that fails, too."""
    return to_llava(record_value(record), record.where)


def sample_id(record: Record, value: Any) -> str:
    """The id of a record, or its index if it has none."""
    given = value.get("id") if isinstance(value, dict) else None
    return str(record.index if given is None else given)


def from_first_question(turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The turns without an answer before the first question."""
    roles = [role for role, _ in turns[:2]]
    if roles[:1] == ["assistant"]:
        return tuple(turns[1:])
    return (turns[0], *turns[2:]) if roles == ["system", "assistant"] else tuple(turns)


def read_sample(value: Any) -> Reading:
    """Reads a JSON value, or finds all its faults. A fault that hides others comes alone."""
    if not isinstance(value, dict):
        return _structure(f"is no object but {_shown(value)}")
    if not isinstance(value.get("id"), str | int | None):
        return _structure(f"`id` is neither text nor a number but {_shown(value['id'])}")
    images, sentences = image_names(value), _sentences(value)
    for fault in (images, sentences):
        if isinstance(fault, Fault):
            return Reading([fault])
    faults: list[Fault] = []
    named: list[str] = []  # images, by parts of a `content`
    turns = _plain_turns(sentences)
    if turns is None:
        turns = [_turn(n, sentence, faults, named) for n, sentence in enumerate(sentences, 1)]
        faults += _index_faults(sentences)
    if named and images and tuple(named) != images:
        faults.append(Fault("structure", f"`content` names images {_shown(named)}, `image` {_shown(images)}"))
    images = images or tuple(named)
    if turns[0][0] == "system" or not value.keys() <= _PLAIN:
        turns = _with_system(value, turns, faults)
        details = (*unsupported.unread_keys(value, bool(images)), *unsupported.unlearned(value))
        faults += [Fault("key", detail) for detail in details]
    return Reading(faults or list(_conversation_faults(turns, images)), images, tuple(turns))


def conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns in LLaVA's format."""
    return [{"from": _WRITTEN[role], "value": text} for role, text in turns]


def image_names(value: dict) -> tuple[str, ...] | Fault:
    """The image names of an object, in `image` or `images`: a name, a list of names, or nothing."""
    given = []
    for key in ("image", "images"):
        images = value.get(key)
        names = [images] if isinstance(images, str) else [] if images is None else images
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return Fault("structure", f"`image` is neither a name nor a list of names but {_shown(images)}")
        if any(map(_URL.match, names)):
            return Fault("structure", f"`{key}` is {_shown(images)}, a URL: save the image to a file and name that")
        if images:
            given.append(tuple(names))
    if len(given) == 2 and given[0] != given[1]:
        return Fault("key", f"`image` is {_shown(value['image'])}, but `images` {_shown(value['images'])}: keep one")
    return given[0] if given else ()


def system_prompt(value: dict, first: str = "") -> str | Fault:
    """The system prompt of an object, or its `first` turn if that is one; "" for the template's own."""
    prompts = {"the first turn": first, **{key: value[key] for key in ("system", "system_prompt") if key in value}}
    for key, text in prompts.items():
        if not isinstance(text, str | None) or not is_encodable(text or ""):
            return Fault("structure", f"`{key}` is no text but {_shown(text)}")
    said = {key: text for key, text in prompts.items() if (text or "").strip()}
    if len(set(said.values())) > 1:
        texts = ", ".join(f"{key} {_shown(text)}" for key, text in said.items())
        return Fault("key", f"has several system prompts, {texts}: keep one")
    return next(iter(said.values()), "")


def _sentences(value: dict) -> list | Fault:
    """The turns of a record, not read yet."""
    given = [value[key] for key in ("conversations", "messages") if value.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        return Fault("key", "`conversations` and `messages` hold other turns: keep one")
    sentences = given[0] if given else value.get("conversations")
    if not isinstance(sentences, list) or not sentences:
        hint = unsupported.explain_missing(value) if sentences is None else ""
        return Fault("structure", f"`conversations` is no list of turns but {_shown(sentences)}{hint}")
    return sentences


def _plain_turns(sentences: list) -> list[tuple[str, str]] | None:
    """Role and text of turns that have `from` and `value` alone, as nearly all have; None if a turn is different."""
    try:
        turns = [(ROLES[sentence["from"]], sentence["value"]) for sentence in sentences if len(sentence) == 2]
        plain = len(turns) == len(sentences) and all(text.isascii() or is_encodable(text) for _, text in turns)
    except (KeyError, TypeError, AttributeError):
        return None
    return turns if plain else None


def _turn(number: int, sentence: Any, faults: list[Fault], named: list[str]) -> tuple[str, str]:
    """Role and text of any turn. Adds to `faults` and, if its `content` names images, to `named`."""

    def fault(kind: str, detail: str) -> None:
        faults.append(Fault(kind, detail))

    if not isinstance(sentence, dict):
        fault("structure", f"turn {number} is no object but {_shown(sentence)}")
        return "", ""
    (_, speaker), (content, text) = (_one_of(sentence, *keys) for keys in (("from", "role"), ("value", "content")))
    if isinstance(text, list):
        text = _joined(number, text, faults, named)
    role = ROLES.get(speaker, "") if isinstance(speaker, str) else ""
    if not role:
        keys = "" if speaker is not None else f", its keys are {', '.join(map(str, sentence))}"
        fault("role", f"turn {number} is from {_shown(speaker)}{keys}: human and gpt are known")
    if not isinstance(text, str):
        fault("structure", f"`{content}` of turn {number} is no text but {_shown(text)}")
        text = ""
    elif not is_encodable(text):
        fault("structure", f"`{content}` of turn {number} is no valid Unicode: it holds half a surrogate pair")
    for detail in unsupported.unread_turn_keys(sentence, answers=role == "assistant"):
        fault("key", f"turn {number}: {detail}")
    return role, text


def _one_of(sentence: dict, *keys: str) -> tuple[str, Any]:
    """The first of two keys that has a value, and the value; both if the values differ."""
    said = {key: sentence[key] for key in keys if sentence.get(key) is not None}
    if len({ROLES.get(value, value) if isinstance(value, str) else str(value) for value in said.values()}) > 1:
        return " and ".join(keys), said
    return next(iter(said.items()), (next((key for key in keys if key in sentence), keys[0]), None))


def _joined(number: int, parts: list, faults: list[Fault], named: list[str]) -> str:
    """The text of a `content` that is a list of texts and images, with `<image>` for each image."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        keys = part if isinstance(part, dict) else {}
        kind = keys.get("type") or next((key for key in ("text", "image") if key in keys), None)
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _IMAGE_PARTS:
            texts.append(IMAGE_TOKEN)
            name = _image_of(part)
            if unread := _unread_of_image(part, name):
                faults.append(Fault("structure", f"turn {number} has an image whose `{unread}` is not read"))
            if name and _URL.match(name):
                faults.append(Fault("structure", f"turn {number} has an image by its URL: save it to a file"))
            elif name:
                named.append(name)
        else:
            faults.append(Fault("structure", f"turn {number} has a part {_shown(part)}: text and image are read"))
    return join_parts([text for text in texts if text])


def _image_of(part: dict) -> str | None:
    """The name in a part like {"type": "image", "image": NAME} or {"type": "image_url", "image_url": {"url": NAME}}."""
    held = (value.get("url") if isinstance(value, dict) else value for value in map(part.get, _NAMES))
    return next((name for name in held if isinstance(name, str)), None)


def _unread_of_image(part: dict, name: str | None) -> str | None:
    """A key of a part that may hold the image itself or tell which it is, and is not read."""
    for key, held in part.items():
        said = held.get("url", held) if isinstance(held, dict) else held
        if key not in ("type", "index", "detail") and said not in (None, "", [], {}, name):
            return key
    return None


def _index_faults(sentences: list) -> Iterator[Fault]:
    """Images whose `index`, as of the sets of HuggingFaceH4, isn't their number in the text, from 0."""
    contents = [sentence.get("content", sentence.get("value")) for sentence in sentences if isinstance(sentence, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    for number, part in enumerate(part for part in parts if part.get("type") in _IMAGE_PARTS):
        if part.get("index", number) not in (None, number):
            yield Fault("structure", f"image {number} of the text has `index` {_shown(part['index'])}: sort the images")


def _with_system(value: dict, turns: list[tuple[str, str]], faults: list[Fault]) -> list[tuple[str, str]]:
    """The turns after the system prompt of the record, if it has one."""
    first, turns = (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)
    system = system_prompt(value, first)
    if isinstance(system, Fault):
        faults.append(system)
        return turns
    return [("system", system), *turns] if system else turns


def _conversation_faults(turns: Sequence[tuple[str, str]], images: tuple[str, ...]) -> Iterator[Fault]:
    talk = from_first_question(turns)
    begin = 1 if talk and talk[0][0] == "system" else 0
    for i, (role, _) in enumerate(talk[begin:]):
        if role == "system":
            yield Fault("order", "a later turn is of system, which only the first can be: write it into a question")
            break
        if role != ("user", "assistant")[i % 2]:
            yield Fault("order", f"two turns of {role} in a row: human and gpt take turns")
            break
    joined = "\0".join([text for _, text in talk[begin:]])
    marks = joined.count(IMAGE_TOKEN)
    if marks != len(images):
        detail = f"{marks} {IMAGE_TOKEN} in the text, but {len(images)} images: there has to be one for each"
        yield Fault("marks", detail)
    if begin and IMAGE_TOKEN in talk[0][1]:
        yield Fault("marks", f"the system prompt holds {IMAGE_TOKEN}, and can show no image")
    if begin or unsupported.may_hold_marks(joined):
        for role, text in talk:
            if mark := unsupported.foreign_mark(text, role == "user"):
                detail = f"the text of a {role} holds {mark}, which marks nothing here: {IMAGE_TOKEN} is read"
                yield Fault("marks", detail)


def _structure(detail: str) -> Reading:
    return Reading([Fault("structure", detail)])


def is_encodable(text: str) -> bool:
    """Whether a text is valid Unicode, without half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
