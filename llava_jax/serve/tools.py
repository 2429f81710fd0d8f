"""Calls of tools, for chat templates that have a format for them: how a prompt presents tools, calls and results, how
an answer that calls is constrained, and how it is read.

The format of `chatml` and `qwen3` is that of Qwen2.5, Qwen3 and Hermes, `<tool_call>` around JSON; that of `llama_3` is
Llama 3.1's, an answer that is JSON.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerBase

from llava_jax.data.templates import Template
from llava_jax.data.tokenization import default_system
from llava_jax.inference.constraints import JSON_OPTIONS
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.serve.errors import ApiError
from llava_jax.serve.schema import CalledFunction, ChatRequest, NamedTool, Tool

if TYPE_CHECKING:
    from llava_jax.serve.turns import Marks

CALL = ("<tool_call>", "</tool_call>")
RESULT = ("<tool_response>", "</tool_response>")
MARKS = (*CALL, *RESULT, "<tools>", "</tools>")  # that other text must not contain
# Word for word that of the models' own chat templates.
INSTRUCTIONS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

LLAMA_SYSTEM = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_INSTRUCTIONS = """\
Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

"""


class Tools:
    """The tools of a request, or none if it only has earlier calls and results; in the format of Qwen and Hermes.

    Args:
      tools: that the answer may call.
      required: whether the answer has to be calls and nothing else.
      parallel: whether it may have several calls.
    """

    role = "user"  # of results
    arguments = "arguments"  # the key of a call's

    def __init__(self, tools: Sequence[Tool], required: bool, parallel: bool):
        self._tools, self._required, self._parallel = tools, required, parallel

    def introduced(self, turns: list[tuple[str, str]], prompts: PromptEncoder, marks: "Marks") -> list[tuple[str, str]]:
        """The turns with a system prompt that presents the tools, whose texts are free of `marks`."""
        if not self._tools:
            return turns
        system, turns = _split_system(turns, prompts)
        parts = (system, INSTRUCTIONS.format(tools=marks.disarm("\n".join(map(_json, self._described())))))
        return [("system", "\n\n".join(filter(None, parts))), *turns]

    def _described(self) -> list[dict]:
        functions = (tool.function.model_dump(exclude={"strict"}, exclude_unset=True) for tool in self._tools)
        return [{"type": "function", "function": function} for function in functions]

    def call(self, function: CalledFunction, field: str, marks: "Marks") -> str:
        """A call of an earlier answer. Raises `ApiError`."""
        try:
            arguments = json.loads(function.arguments)
        except (ValueError, RecursionError) as error:
            field = f"{field}.function.arguments"
            raise ApiError(400, f"{field}: it has to be JSON", "invalid_value", field) from error
        call = f'{{"name": "{function.name}", "{self.arguments}": {marks.disarm(_json(arguments))}}}'
        return self._marked(call)

    def _marked(self, call: str) -> str:
        return f"{CALL[0]}\n{call}\n{CALL[1]}"

    def result(self, text: str) -> str:
        """The result of a call."""
        return f"{RESULT[0]}\n{text}\n{RESULT[1]}"

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What answers may be, as llguidance reads it: calls have the schemas of their arguments."""
        # A mark that is a token of its own stands without quotes.
        begin, end = (mark if mark in tokenizer.get_added_vocab() else _json(mark) for mark in CALL)
        call = f'call: "\\n" function "\\n" {end}'
        if self._required:
            more = f' ("\\n" {begin} call)*' if self._parallel else ""
            start = [f"start: {begin} call{more}"]
        else:
            lazy = "" if begin == CALL[0] else "[lazy]"
            some = "(begun call)* rest" if self._parallel else "begun call | rest"
            start = [f"start: {some}", f"begun{lazy}: TEXT {begin}", "rest: TEXT", r"TEXT: /(.|\n)*/"]
        return "\n".join([*start, call, *self._functions()])

    def _functions(self) -> list[str]:
        """The rules of a call without marks, `function`."""
        rules = ["function: " + " | ".join(f"f{number}" for number in range(len(self._tools)))]
        for number, tool in enumerate(self._tools):
            head = _json(f'{{"name": "{tool.function.name}", "{self.arguments}": ')
            schema = {**(tool.function.parameters or {"type": "object"}), "x-guidance": JSON_OPTIONS}
            rules += [f'f{number}: {head} a{number} "}}"', f"a{number}: %json {json.dumps(schema)}"]
        return rules


class LlamaTools(Tools):
    """In the format of Llama 3.1: the first question presents the tools, and an answer is one call or text."""

    role, arguments = "tool", "parameters"

    def introduced(self, turns: list[tuple[str, str]], prompts: PromptEncoder, marks: "Marks") -> list[tuple[str, str]]:
        if not self._tools:
            return turns
        system, ((role, question), *turns) = _split_system(turns, prompts)
        listed = "".join(f"{json.dumps(each, ensure_ascii=False, indent=4)}\n\n" for each in self._described())
        question = LLAMA_INSTRUCTIONS + marks.disarm(listed) + question
        return [("system", LLAMA_SYSTEM + system), (role, question), *turns]

    def _marked(self, call: str) -> str:
        return call

    def result(self, text: str) -> str:
        return _json(text)

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> str:
        start = ["start: function"] if self._required else ["start: function | TEXT?", r"TEXT: /[^{](.|\n)*/"]
        return "\n".join([*start, *self._functions()])


FORMATS = {"chatml": Tools, "qwen3": Tools, "llama_3": LlamaTools}  # by template


def _split_system(turns: list[tuple[str, str]], prompts: PromptEncoder) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt, by default the template's, and the other turns."""
    if turns[0][0] == "system":
        return turns[0][1], turns[1:]
    own = prompts.template.system
    return default_system(prompts.tokenizer) if own is None else own, turns


def tools_of(body: ChatRequest, template: Template) -> Tools | None:
    """Those that a request may call; None if it neither has tools nor calls. Raises `ApiError`."""
    past = any(message.role == "tool" or getattr(message, "tool_calls", None) for message in body.messages)
    if not (body.calls_tools or past):
        return None
    field = "tools" if body.calls_tools else "messages"
    if (form := FORMATS.get(template.name)) is None:
        what = f"{field}: template {template.name} has no format for tools and their calls: leave them out"
        raise ApiError(400, what, "unsupported_parameter", field)
    if not body.calls_tools:
        return form((), False, False)
    if body.constraints():
        what = "tools: an answer can call tools or have a format: leave one out, or send tool_choice none"
        raise ApiError(400, what, "unsupported_parameter", "tools")
    tools, choice = body.tools, body.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            what = f"tool_choice: no tool is named {choice.function.name}"
            raise ApiError(400, what, "invalid_value", "tool_choice")
    parallel = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    return form(tools, choice == "required" or isinstance(choice, NamedTool), parallel)


class Call(NamedTuple):
    id: str
    name: str
    arguments: str  # JSON


def parser_of(body: ChatRequest, template: Template) -> "CallParser":
    """Of an answer to `body`."""
    llama = FORMATS.get(template.name) is LlamaTools
    return (LlamaCallParser if llama else CallParser)(body.calls_tools)


class CallParser:
    """Separates the calls of an answer from its text.

    Args:
      active: whether the answer may have calls; otherwise all is text.

    Attributes:
      calls: so far.
    """

    def __init__(self, active: bool):
        self.active, self.calls = active, []
        self._held = ""  # what may be a part of a call, or white space beside one
        self._between = ""  # what stands before the next text: a line break, if a call is between it and earlier text
        self._fresh = False  # whether a call came last

    def push(self, text: str) -> list[str | Call]:
        """-> new texts and calls, in their order."""
        parts = list(filter(None, self._parts(text)))
        self.calls += [part for part in parts if isinstance(part, Call)]
        return parts

    def _parts(self, text: str) -> Iterator[str | Call]:
        if not self.active:
            yield text
            return
        self._held += text
        while CALL[0] in self._held:
            before, _, rest = self._held.partition(CALL[0])
            if (found := _split_call(rest)) is None:
                return
            yield self._text(before.rstrip())
            call, self._held = found
            self._fresh = True
            yield call
        begun = max((n for n in range(len(CALL[0])) if self._held.endswith(CALL[0][:n])), default=0)
        certain = self._held[: len(self._held) - begun].rstrip()
        self._held = self._held[len(certain) :]
        yield self._text(certain)

    def close(self) -> str:
        """The rest of the text, at the answer's end; a call that has no end is text."""
        rest, self._held = self._held, ""
        return self._text(rest.rstrip()) if self.active else rest

    def _text(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip()
        if text:
            text = self._between + text if self._fresh else text
            self._between, self._fresh = "\n", False
        return text


class LlamaCallParser(CallParser):
    """Of an answer that is a call as a whole, or text."""

    def _parts(self, text: str) -> Iterator[str | Call]:
        self._held += text
        if not self.active or not self._held.startswith("{"):
            released, self._held = self._held, ""
            self.active = self.active and not released  # the rest is text, too
            yield released
            return
        with contextlib.suppress(ValueError):  # it is not complete
            call = _parsed(self._held)
            self._held = ""
            yield call


def _split_call(text: str) -> tuple[Call, str] | None:
    """A call at the beginning and the text after it; None before its end, whose mark may also be in an argument."""
    end = text.find(CALL[1])
    while end >= 0:
        with contextlib.suppress(ValueError):
            return _parsed(text[:end]), text[end + len(CALL[1]) :]
        end = text.find(CALL[1], end + 1)
    return None


def _parsed(text: str) -> Call:
    """A call, of which the grammar made sure that it is one."""
    call = json.loads(text)
    return Call(f"call_{uuid.uuid4().hex[:24]}", call["name"], _json(call.get("arguments", call.get("parameters"))))


def _json(value: object) -> str:
    """As chat templates write it."""
    return json.dumps(value, ensure_ascii=False)
