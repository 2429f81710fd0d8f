"""`/v1/responses`: requests become those for chat completions, and answers become a `Response` of items.

Nothing is stored: clients send the conversation each time, as with chat completions.
"""

import functools
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from fastapi.sse import format_sse_event
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from llava_jax.inference.answer import Piece
from llava_jax.serve import schema
from llava_jax.serve.answers import Answers
from llava_jax.serve.errors import ApiError, from_validation
from llava_jax.serve.replies import Reply
from llava_jax.serve.schema import BOOKKEEPING, Several, Strict, Unused
from llava_jax.serve.tools import Call, parser_of

_DATA = TypeAdapter(dict[str, Any])  # of an event


class InputText(Unused("annotations logprobs prompt_cache_breakpoint")):
    type: Literal["input_text", "output_text"]
    text: str


class InputImage(Unused("prompt_cache_breakpoint", file_id=())):
    type: Literal["input_image"]
    image_url: str = Field(description="A data URL; http(s) where the server allows it.")
    detail: Literal["auto", "low", "high", "original"] | None = None


Content = Annotated[InputText | InputImage, Field(discriminator="type")]


class MessageItem(Unused("id status phase")):
    """A message; that of a response may be sent back as it is."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Several(Content)


class CallItem(Unused("id status", namespace=(), caller=(), async_=())):
    type: Literal["function_call"]
    call_id: str
    name: schema.Name
    arguments: str


class ResultItem(Unused("id status")):
    type: Literal["function_call_output"]
    call_id: str
    output: str


def _kind(item: Any) -> str:
    kind = (item.get("type") if isinstance(item, dict) else item.type) or "message"
    return kind if isinstance(kind, str) else ""


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")],
    Discriminator(_kind),
]


class ToolItem(schema.Function, Unused(defer_loading=(False,))):
    type: Literal["function"]


class NamedToolItem(Strict):
    type: Literal["function"]
    name: schema.Name


class SchemaFormat(schema.JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Unused(verbosity=())):
    format: Annotated[schema.PlainFormat | schema.ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )


UnusedOfResponses = Unused(
    f"user stream_options {BOOKKEEPING}",
    access_programs=(),
    background=(False,),
    background_options=(),
    context_management=([],),
    conversation=(),
    image=(),
    include=([],),
    max_tool_calls=(),
    moderation=(),
    previous_response_id=(),
    prompt=(),
    reasoning=({}, {"effort": "none"}),
    top_logprobs=(0,),
    truncation=("disabled",),
)


class ResponseRequest(UnusedOfResponses):
    model: str
    input: str | Several(Item)
    instructions: str | None = None
    max_output_tokens: schema.Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ToolItem], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolItem | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ResponseRequest":
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise PydanticCustomError("tool_choice", "tool_choice needs tools")
        return self


def as_chat(body: ResponseRequest) -> schema.ChatRequest:
    """The request for a chat completion. Raises `ApiError`."""
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages += map(_message, items)
    form = body.text and body.text.format
    if isinstance(form, SchemaFormat):
        fields = {"name": form.name, "schema": form.schema_, "strict": form.strict}
        form = schema.SchemaFormat(type="json_schema", json_schema=schema.JsonSchema(**fields))
    tools = [
        {"type": "function", "function": tool.model_dump(exclude={"type", "defer_loading"}, exclude_unset=True)}
        for tool in body.tools or ()
    ]
    choice = body.tool_choice
    if isinstance(choice, NamedToolItem):
        choice = {"type": "function", "function": {"name": choice.name}}
    same = ("model", "temperature", "top_p", "parallel_tool_calls", "stream")
    value = {name: getattr(body, name) for name in same} | {
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "response_format": form,
        "tools": tools,
        "tool_choice": choice,
    }
    try:
        return schema.ChatRequest.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, value) from None


def _message(item: MessageItem | CallItem | ResultItem) -> dict[str, Any]:
    match item:
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case ResultItem():
            return {"role": "tool", "content": item.output, "tool_call_id": item.call_id}
        case _:
            content = item.content if isinstance(item.content, str) else list(map(_part, item.content))
            return {"role": item.role, "content": content}


def _part(part: InputText | InputImage) -> dict[str, Any]:
    if isinstance(part, InputText):
        return {"type": "text", "text": part.text}
    return {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}


def reply_to(body: ResponseRequest) -> Callable[[schema.ChatRequest, Answers], Reply]:
    """The constructor of the reply."""
    return functools.partial(ResponseReply, body)


class ResponseReply(Reply):
    """A `Response`, or the events of its items, messages and calls in their order."""

    def __init__(self, request: ResponseRequest, chat: schema.ChatRequest, answers: Answers):
        super().__init__(answers)
        keep = {"model", "instructions", "max_output_tokens", "temperature", "top_p", "metadata", "text"}
        self._head = {
            **{name: getattr(request, name) for name in keep},
            "id": f"resp_{uuid.uuid4().hex}",
            "created_at": int(time.time()),
            "object": "response",
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in request.tools or ()],
            "store": False,
        }
        for name in ("text", "tool_choice"):
            if hasattr(value := self._head[name], "model_dump"):
                self._head[name] = value.model_dump(by_alias=True, exclude_none=True)
        request.input = ""  # up to 32 MB, not needed while the answer is generated
        self._parser = parser_of(chat, answers.template)
        self._number = 0  # of the next event
        self._items: list[ResponseOutputMessage | ResponseFunctionToolCall] = []  # that have ended
        self._message, self._text = "", ""  # the id of a message that has begun, and its text

    async def completion(self) -> str:
        async for index, piece in self.pieces():
            for _ in self.add(index, piece):
                pass
        for _ in self._add_end():
            pass
        return self._response(self._status(), self._items).model_dump_json()

    def begin(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress", []))

    def add(self, index: int, piece: Piece) -> Iterator[bytes]:
        for part in self._parser.push(piece.text):
            yield from self._add_call(part) if isinstance(part, Call) else self._add_text(part)

    def end(self, index: int) -> Iterator[bytes]:
        yield from self._add_end()
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status, self._items))

    def finish(self) -> Iterator[bytes]:
        return iter(())  # no [DONE]

    def failure(self, error: ApiError) -> bytes:
        return self._event("error", **{name: error.body()["error"][name] for name in ("code", "message", "param")})

    def _add_end(self) -> Iterator[bytes]:
        """The end of the last item, which is an empty message where nothing was generated."""
        rest = self._parser.close()
        if rest or not (self._items or self._message):
            yield from self._add_text(rest)
        yield from self._end_message(self._status())

    def _add_text(self, text: str) -> Iterator[bytes]:
        if not self._message:
            text = text.lstrip() if self._items else text  # after a call
            self._message = f"msg_{uuid.uuid4().hex}"
            yield self._event("response.output_item.added", **self._place, item=self._message_item("in_progress", []))
            yield self._text_event("response.content_part.added", part=_output_text(""))
        self._text += text
        if text:
            yield self._text_event("response.output_text.delta", delta=text, logprobs=[])

    def _end_message(self, status: str) -> Iterator[bytes]:
        if not self._message:
            return
        part = _output_text(self._text)
        yield self._text_event("response.output_text.done", text=self._text, logprobs=[])
        yield self._text_event("response.content_part.done", part=part)
        item = self._message_item(status, [part])
        yield self._event("response.output_item.done", **self._place, item=item)
        self._items.append(item)
        self._message, self._text = "", ""

    @property
    def _place(self) -> dict[str, int]:
        """Of the item that comes now."""
        return {"output_index": len(self._items)}

    def _add_call(self, call: Call) -> Iterator[bytes]:
        yield from self._end_message("completed")
        place, item = self._place, _call_item(call)
        begun = item.model_copy(update={"arguments": "", "status": "in_progress"})
        yield self._event("response.output_item.added", item=begun, **place)
        place["item_id"] = item.id
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", delta=call.arguments, **place)
        yield self._event(f"{kind}.done", arguments=call.arguments, name=call.name, **place)
        yield self._event("response.output_item.done", item=item, **self._place)
        self._items.append(item)

    def _status(self) -> str:
        return "incomplete" if self.answers.answers[0].finish_reason == "length" else "completed"

    def _message_item(self, status: str, content: list[ResponseOutputText]) -> ResponseOutputMessage:
        return ResponseOutputMessage(id=self._message, content=content, role="assistant", status=status, type="message")

    def _response(self, status: str, output: list[Any]) -> Response:
        usage, incomplete = None, None
        if status != "in_progress":
            counted = self.usage()
            usage = ResponseUsage(
                input_tokens=counted.prompt_tokens,
                input_tokens_details=InputTokensDetails(
                    cached_tokens=self.answers.answers[0].prefix_tokens, cache_write_tokens=0
                ),
                output_tokens=counted.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
                total_tokens=counted.total_tokens,
            )
        if status == "incomplete":
            incomplete = {"reason": "max_output_tokens"}
        return Response(
            status=status, output=output, usage=usage, incomplete_details=incomplete, error=None, **self._head
        )

    def _text_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._message, **self._place, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return format_sse_event(event=kind, data_str=_DATA.dump_json(data).decode())


def _output_text(text: str) -> ResponseOutputText:
    return ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=[])


def _call_item(call: Call) -> ResponseFunctionToolCall:
    fields = {"call_id": call.id, "name": call.name, "arguments": call.arguments, "status": "completed"}
    return ResponseFunctionToolCall(type="function_call", id=f"fc_{call.id.removeprefix('call_')}", **fields)
