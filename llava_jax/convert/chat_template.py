"""Conversation templates as Jinja, with which transformers' processor renders prompts as in training."""

import json
import re
from pathlib import Path

from llava_jax.data.templates import IMAGE_TOKEN, Template

# A message's content is a string, or a list of texts and images, a line each. Models that were trained with images
# before the text get the images of a list first (images_first), others in the order of the list (images_as_is), as by
# `data.conversation.join_parts`. messages.jinja has the rest.
_FILES = Path(__file__).with_name("jinja_files")


def chat_template(
    template: Template, system: str, image_token: str = IMAGE_TOKEN, image_position: str = "first"
) -> str:
    """Jinja that renders messages as `data.conversation.render` renders turns.

    Args:
      system: the system prompt of conversations that have none.
      image_token: the token of images in the processor's tokenizer.
      image_position: of images in a turn, see `data.conversation.place_prompt_images`.
    """
    image = template.image.replace(IMAGE_TOKEN, image_token)
    clean = " | trim" if template.strip else ""
    content = f"flat(message['content']){clean} | replace({_quoted(IMAGE_TOKEN)}, {_quoted(image)})"
    question = (
        f"{_quoted(image)} * flat(message['content']).count({_quoted(IMAGE_TOKEN)})" if template.captions else content
    )
    values = {
        "image mark": _quoted(IMAGE_TOKEN),
        "system": f"flat(messages[0]['content']){clean}",
        "head": " ~ system ~ ".join(_quoted(part) for part in template.head.split("{system}")),
        "bare head": _quoted(template.bare_head),
        # In one string: the system prompt of a ChatML template is found by searching for this text.
        "default head": _quoted(template.head.replace("{system}", system) if system else template.bare_head),
        "between": _quoted(template.between),
        "before": _quoted(template.question[0]),
        "question": f"({question})",
        "after": _quoted(template.question[1]),
        "reply": _quoted(template.reply + template.lead),
        "answer": f"({content})",
        "end": _quoted(template.end + template.tail),
        "reply prompt": _quoted(template.reply),
    }
    parts = "images_as_is" if image_position == "as_is" else "images_first"
    jinja = _read("messages").replace("<<parts>>", _read(parts))
    return re.sub("<<([a-z ]+)>>", lambda match: values[match[1]], jinja)


def _read(name: str) -> str:
    return (_FILES / f"{name}.jinja").read_text(encoding="utf-8")


def _quoted(text: str) -> str:
    """A string literal: Jinja has the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)
