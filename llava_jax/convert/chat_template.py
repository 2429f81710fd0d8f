"""Conversation templates as Jinja, with which transformers' processor renders prompts as in training."""

import json
import re

from llava_jax.data.templates import IMAGE_TOKEN, Template

# A message's content is a string, or a list of texts and images, a line each. Models that were trained with images
# before the text get the images of a list first.
_IMAGES_FIRST = """\
        {%- set images = content | selectattr('type', 'in', ['image', 'image_url']) | list | length -%}
        {%- set texts = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | select -%}
        {%- set text = texts | join('\\n') -%}
        {{- ((<<image mark>> ~ '\\n') * images ~ (text | trim)) | trim if images else text -}}
"""
# Other models get them in the order of the list, as by `data.conversation.join_parts`.
_IMAGES_AS_IS = """\
        {%- set flat = namespace(text='', image=false) -%}
        {%- for part in content -%}
            {%- set image = part['type'] in ['image', 'image_url'] -%}
            {%- set piece = <<image mark>> if image else part['text'] -%}
            {%- if piece -%}
                {%- set spaced = image != flat.image and not (flat.text[-1:] | trim and piece[:1] | trim) -%}
                {%- set flat.text = flat.text ~ ('\\n' if flat.text and not spaced else '') ~ piece -%}
                {%- set flat.image = image -%}
            {%- endif -%}
        {%- endfor -%}
        {{- flat.text -}}
"""
_JINJA = """\
{%- macro flat(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
<<parts>>    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = <<system>> -%}
    {%- set turns = messages[1:] -%}
    {{- <<head>> if system else <<bare head>> -}}
{%- else -%}
    {%- set turns = messages -%}
    {{- <<default head>> -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant take turns, the user first') -}}
    {%- elif message['role'] == 'user' -%}
        {{- ('' if loop.first else <<between>>) ~ <<before>> ~ <<question>> ~ <<after>> -}}
    {%- else -%}
        {{- <<reply>> ~ <<answer>> ~ <<end>> -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- <<reply prompt>> -}}
{%- endif -%}
"""


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
    jinja = _JINJA.replace("<<parts>>", _IMAGES_AS_IS if image_position == "as_is" else _IMAGES_FIRST)
    return re.sub("<<([a-z ]+)>>", lambda match: values[match[1]], jinja)


def _quoted(text: str) -> str:
    """A string literal: Jinja has the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)
