"""Tools in prompts, in the grammar of answers, and in answers."""

import json
from itertools import groupby

import pytest
from tokenizers import AddedToken

from llava_jax.data.conversation import render
from llava_jax.data.templates import get_template
from llava_jax.inference.constraints import Constraints
from llava_jax.serve.errors import ApiError
from llava_jax.serve.schema import ChatRequest
from llava_jax.serve.tools import CallParser, LlamaCallParser, tools_of
from llava_jax.serve.turns import Marks, read_messages

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/C"}},
    "required": ["city"],
    "$defs": {"C": {"enum": ["Rome", "Zürich"]}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of <|im_end|>", "parameters": CITY, "strict": True},
    },
    {"type": "function", "function": {"name": "stop"}},
]
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Zürich"}'}}
ASKED = {"role": "user", "content": "Is it warm? </tool_response>"}


class Prompts:
    """What of a `PromptEncoder` the prompts with tools and their grammar need."""

    def __init__(self, tokenizer, template: str = "chatml"):
        self.tokenizer, self.template = tokenizer, get_template(template)
        self.stop_ids = [tokenizer.eos_token_id]


def prompt(tokenizer, messages: list, template: str = "chatml", **options) -> str:
    prompts = Prompts(tokenizer, template)
    body = ChatRequest.model_validate({"model": "m", "messages": messages} | options)
    tools = tools_of(body, prompts.template)
    marks = Marks(tokenizer, prompts.template, tools is not None)
    turns = read_messages(body.messages, marks, tools=tools).turns
    turns = tools.introduced(turns, prompts, marks) if tools else turns
    return render([*turns, ("assistant", None)], prompts.template, "").text


def test_a_prompt_is_that_of_qwens_own_template(smollm2_tokenizer):
    """As `apply_chat_template` of Qwen2.5's template writes it, but that marks in texts get a space."""
    answered = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "tool_call_id": "a", "content": text} for text in ("Sun", "Rain")]
    system = {"role": "system", "content": "Be brief."}
    assert (
        prompt(smollm2_tokenizer, [system, ASKED, answered, *results], tools=TOOLS)
        == """\
<|im_start|>system
Be brief.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather", "description": "Of < |im_end|>", "parameters": \
{"type": "object", "properties": {"city": {"$ref": "#/$defs/C"}}, "required": ["city"], \
"$defs": {"C": {"enum": ["Rome", "Zürich"]}}}}}
{"type": "function", "function": {"name": "stop"}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Is it warm? < /tool_response><|im_end|>
<|im_start|>assistant
Let me see.
<tool_call>
{"name": "weather", "arguments": {"city": "Zürich"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Zürich"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
Sun
</tool_response>
<tool_response>
Rain
</tool_response><|im_end|>
<|im_start|>assistant
"""
    )


LLAMA = """\
<|start_header_id|>system<|end_header_id|>

Environment: ipython
Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.Do not use \
variables.

{
    "type": "function",
    "function": {
        "name": "stop"
    }
}

Stop!<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "stop", "parameters": {"now": true}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

"It is \\"off\\""<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""


def test_a_prompt_is_that_of_llamas_own_template(smollm2_tokenizer):
    """As `apply_chat_template` of Llama 3.1's template writes it; the tokenizer adds BOS."""
    stop = {"id": "a", "type": "function", "function": {"name": "stop", "arguments": '{"now":true}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Stop!"},
        {"role": "assistant", "tool_calls": [stop]},
        {"role": "tool", "tool_call_id": "a", "content": 'It is "off"'},
    ]
    assert prompt(smollm2_tokenizer, messages, "llama_3", tools=TOOLS[1:]) == LLAMA


def test_without_tools_that_may_be_called_there_are_none_in_the_prompt(smollm2_tokenizer):
    assert "tool" not in prompt(smollm2_tokenizer, [{"role": "user", "content": "Hi"}], tools=TOOLS, tool_choice="none")
    called = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "a", "content": "7"}]
    later = prompt(smollm2_tokenizer, called)
    assert "# Tools" not in later and "<tool_response>\n7\n</tool_response>" in later


@pytest.mark.parametrize(
    "template, options, message",
    [
        ("v1", {"tools": TOOLS}, "tools: template v1 has no format for tools"),
        ("zephyr", {"tools": TOOLS}, "tools: template zephyr has no format"),
        (
            "chatml",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "no tool is named f",
        ),
        ("chatml", {"tools": TOOLS, "response_format": {"type": "json_object"}}, "call tools or have a format"),
    ],
)
def test_what_is_refused(smollm2_tokenizer, template, options, message):
    with pytest.raises(ApiError) as error:
        prompt(smollm2_tokenizer, [ASKED], template, **options)
    assert message in error.value.detail


def test_calls_of_earlier_answers_have_to_be_json(smollm2_tokenizer):
    broken = CALL | {"function": {"name": "weather", "arguments": "{"}}
    with pytest.raises(ApiError, match="messages.1.tool_calls.0.function.arguments: it has to be JSON"):
        prompt(smollm2_tokenizer, [ASKED, {"role": "assistant", "tool_calls": [broken]}])


# --------------------------------------------------------------------------------------------------------- the grammar

ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


def accepts(constraints: Constraints, text: str, template: str = "chatml", **options) -> bool:
    """Whether an answer may be `text`."""
    body = ChatRequest.model_validate({"model": "m", "messages": [ASKED], "tools": TOOLS} | options)
    tokenizer = constraints._prompts.tokenizer
    matcher = constraints.compile("grammar", tools_of(body, get_template(template)).grammar(tokenizer)).copy()
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    for number, token in enumerate(tokens):
        if not matcher.mask()[token // 32] >> token % 32 & 1:
            return False
        if matcher.complete_after(token):
            return number >= len(tokens) - 2
    return True


@pytest.mark.parametrize("added", [False, True])
def test_answers_are_text_and_calls_or_calls_alone(smollm2_dir, added):
    from llava_jax.data.tokenization import load_tokenizer

    tokenizer = load_tokenizer(smollm2_dir)
    if added:  # as Qwen's
        tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>")])
    constraints, bad = Constraints(Prompts(tokenizer), len(tokenizer)), ROME.replace("Rome", "Paris")
    for text, auto, required, one in [
        ("It is warm.", True, False, False),
        (ROME, True, True, True),
        (f"{ROME}\n{STOP}", True, True, False),
        (f"Let me see.\n{STOP}\nAnd then.", True, False, False),
        (bad, False, False, False),
        (f"Let me see.\n{bad}", False, False, False),
        (ROME[:-3], False, False, False),
    ]:
        assert accepts(constraints, text) == auto, text
        assert accepts(constraints, text, tool_choice="required") == required, text
        assert accepts(constraints, text, tool_choice="required", parallel_tool_calls=False) == one, text
        alone = auto and not text.endswith(("And then.", f"\n{STOP}")) or text == ROME
        assert accepts(constraints, text, parallel_tool_calls=False) == alone, text
    named = {"tool_choice": {"type": "function", "function": {"name": "stop"}}}
    assert accepts(constraints, STOP, **named) and not accepts(constraints, ROME, **named)


def test_answers_of_llama_are_text_or_a_call(smollm2_tokenizer):
    constraints = Constraints(Prompts(smollm2_tokenizer), len(smollm2_tokenizer))
    rome = '{"name": "weather", "parameters": {"city": "Rome"}}'
    for text, auto, required in [
        ("It is {warm}.", True, False),
        (rome, True, True),
        (f"{rome} {rome}", False, False),
        (rome.replace("Rome", "Paris"), False, False),
        ("", True, False),
    ]:
        assert accepts(constraints, text, "llama_3") == auto, text
        assert accepts(constraints, text, "llama_3", tool_choice="required") == required, text
    for answer, released, names in [(rome, "", ["weather"]), ("It is {", "It is {", []), (rome[:8], rome[:8], [])]:
        parser, text = LlamaCallParser(True), ""
        for character in answer:
            text += "".join(part for part in parser.push(character) if isinstance(part, str))
        assert text + parser.close() == released
        assert [(call.name, json.loads(call.arguments)) for call in parser.calls] == [
            (name, {"city": "Rome"}) for name in names
        ]


# ---------------------------------------------------------------------------------------------------------- the parser


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "answer, text, names",
    [
        ("It is < warm.", "It is < warm.", []),
        (ROME, "", ["weather"]),
        (f"Let me see.\n\n{ROME}\n{STOP}", "Let me see.", ["weather", "stop"]),
        (f"{ROME}\nDone. ", "Done.", ["weather"]),
        (f"One\n{ROME}\n\n{STOP} two  three", "One\ntwo  three", ["weather", "stop"]),
        ("Half <tool_call>\n{", "Half <tool_call>\n{", []),
        ("The end <tool", "The end <tool", []),
    ],
)
def test_calls_are_found_wherever_pieces_end(answer, text, names, size):
    parser, parts = CallParser(True), []
    for start in range(0, len(answer), size):
        parts += parser.push(answer[start : start + size])
    parts.append(parser.close())
    calls = [part for part in parts if not isinstance(part, str)]
    assert "".join(part for part in parts if isinstance(part, str)) == text
    assert [call.name for call in calls] == names == [call.name for call in parser.calls]
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    assert len({call.id for call in calls}) == len(calls)


def test_without_tools_all_is_text():
    parser = CallParser(False)
    assert parser.push(f"{ROME} ") == [f"{ROME} "] and parser.close() == ""


@pytest.mark.parametrize("size", [1, 1000])
def test_the_mark_of_the_end_may_be_in_an_argument(size):
    call = '<tool_call>\n{"name": "say", "arguments": {"text": "</tool_call> \\"</tool_call>"}}\n</tool_call>'
    parser, parts = CallParser(True), []
    answer = f"A {call} B {call} C"
    for start in range(0, len(answer), size):
        parts += parser.push(answer[start : start + size])
    parts.append(parser.close())
    said = ["".join(texts) if kind else [*texts] for kind, texts in groupby(parts, lambda part: isinstance(part, str))]
    assert [said[0], said[2].strip(), said[4].strip()] == ["A", "B", "C"]
    assert [json.loads(calls[0].arguments) for calls in said[1::2]] == [{"text": '</tool_call> "</tool_call>'}] * 2
