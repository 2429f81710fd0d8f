"""The bodies of requests: the part of OpenAI's and of vLLM's that this model can serve.

Fields that would change the answer in a way that is not supported are refused by name, never ignored. Fields without
influence on the answer are accepted.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from llava_jax.inference.constraints import KINDS
from llava_jax.inference.requests import MAX_BIASES

MAX_CHOICES = 16  # of `n`
MAX_ITEMS = 1024  # messages of a request, parts of a message
MAX_TOKENS = 50_000  # of a prompt as token ids

# Values are dropped, since a request may be kept as long as its answer is generated.
Ignored = Annotated[
    Any, AfterValidator(lambda value: None), Field(description="Accepted; without influence on the answer.")
]


def Only(*values: Any) -> Any:
    """The type of a field that is not supported: only null and `values`, which change nothing, are accepted."""
    accepted = [None, *values]

    def check(value: Any) -> Any:
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in accepted):
            raise PydanticCustomError("unsupported", "is not supported by this server")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": accepted, "description": "Not supported."})]


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def Integer(minimum: int, maximum: int) -> Any:
    """Integers in a range; in JSON 1.0 is one, too."""
    return Annotated[int, Field(ge=minimum, le=maximum), BeforeValidator(_integer)]


class Strict(BaseModel):
    """Unknown fields are errors, and so are strings for numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def Unused(ignored: str = "", **neutral: Sequence[Any]) -> type[Strict]:
    """A base with the fields `ignored`, separated by spaces, and those of `neutral`, which may be null or a value."""
    fields = dict.fromkeys(ignored.split(), (Ignored, None))
    return create_model("Unused", __base__=Strict, **fields, **{name: (Only(*v), None) for name, v in neutral.items()})


class TextPart(Unused("prompt_cache_breakpoint")):
    type: Literal["text"]
    text: str


class ImageURL(Strict):
    url: str = Field(description="A data URL; http(s) where the server allows it.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; all images have one size."
    )


def _as_image_url(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise PydanticCustomError("image_url", 'has to be {"url": ...} or the URL alone')
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Unused("prompt_cache_breakpoint")):
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_as_image_url, json_schema_input_type=ImageURL | str)] = Field(
        description='`{"url": ...}`, or the URL alone.'
    )
    uuid: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Of vLLM's API. Accepted; images are cached by their content."
    )


def _parsed(value: Any) -> Any:
    """A JSON schema, which may be sent as text."""
    try:
        return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError("json_text", "is text, but no JSON") from None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def Several(item: Any) -> Any:
    """The type of a list, validated up to its first invalid item."""
    return Annotated[list[item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


Texts = Several(TextPart)
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]  # of a function


class SystemMessage(Unused(name=())):
    role: Literal["system", "developer"]
    content: str | Texts


class UserMessage(Unused(name=())):
    role: Literal["user"]
    content: str | Several(Part)


class CalledFunction(Strict):
    name: Name
    arguments: str


class ToolCall(Unused("index")):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Unused(name=(), refusal=(), audio=(), annotations=([],), function_call=())):
    """The `message` of a response may be sent back as it is."""

    role: Literal["assistant"]
    content: str | Texts | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "an assistant's message has to have content or tool_calls")
        return self


class ToolMessage(Unused("name")):
    """The result of a call."""

    role: Literal["tool"]
    content: str | Texts
    tool_call_id: Annotated[str, Field(max_length=256)]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="Accepted; calls always follow `parameters`.")


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Unused("description")):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted; answers always follow the schema.")


class PlainFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
Schema = Annotated[dict[str, Any], BeforeValidator(_parsed, json_schema_input_type=dict[str, Any] | str)]
Choices = Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)]


class StructuredOutputs(Strict):
    """Of vLLM's API: one of these."""

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class StreamOptions(Unused("include_obfuscation")):
    include_usage: bool | None = None


StopString = Annotated[str, Field(min_length=1, max_length=256)]
Count = Integer(1, 2**31 - 1)
Tokens = Annotated[list[Integer(0, 2**31 - 1)], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
# Any of 64 bits, also as JavaScript writes it: JSON.stringify(-(2 ** 63)) is -9223372036854776000.
Seed = Integer(-(10**20), 10**20)


class LoadRequest(Unused(load_inplace=(False,), is_3d_lora_weight=(False,))):
    """Of vLLM's `/v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str = Field(description="Below the server's --adapter-directory.")


class UnloadRequest(Unused(lora_int_id=())):
    """Of vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str


class Generation(Unused("user guided_decoding_backend")):
    """What chat and text completions have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Integer(1, MAX_CHOICES) | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="1 by default; 0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        Field(None, description="By token id.")
    )
    seed: Seed | None = Field(None, description="By default another each time.")
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None

    # Not in OpenAI's API, but in vLLM's.
    top_k: Integer(-1, 2**31 - 1) | None = Field(None, description="Among this many likeliest tokens; 0 and -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[Integer(0, 2**31 - 1)], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="The older name of `structured_outputs.json`; so are others.")
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def limit(self) -> int | None:
        """Of an answer's tokens."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """To each token that are reported; None for no report."""
        return None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def constraints(self) -> list[tuple[str, str, Any]]:
        """(field, kind, value) for `inference.constraints`."""
        given, form = self.structured_outputs, getattr(self, "response_format", None)
        values = [
            ("response_format", "json", {"type": "object"} if isinstance(form, ObjectFormat) else None),
            ("response_format", "json", form.json_schema.schema_ if isinstance(form, SchemaFormat) else None),
            ("structured_outputs", "json", given and given.json_),
            ("structured_outputs", "json", {"type": "object"} if given and given.json_object else None),
            *(("structured_outputs", kind, given and getattr(given, kind)) for kind in ("regex", "choice", "grammar")),
            *((f"guided_{kind}", kind, getattr(self, f"guided_{kind}")) for kind in KINDS),
        ]
        return [(field, kind, value) for field, kind, value in values if value is not None]

    @model_validator(mode="after")
    def _consistent(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
        constraints = self.constraints()
        if len(constraints) > 1:
            what = "response_format, structured_outputs and guided_*: send one format for the answer"
            raise PydanticCustomError("constraints", what)
        if constraints and self.ignore_eos:
            raise PydanticCustomError("ignore_eos", "ignore_eos: an answer that has a format ends where that does")
        return self


# Of chat completions and of responses.
BOOKKEEPING = "store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention"
UnusedOfChat = Unused(
    f"metadata prediction {BOOKKEEPING}",
    chat_template=(),
    chat_template_kwargs=({}, {"enable_thinking": False}),  # no template here thinks
    media_io_kwargs=({},),
    mm_processor_kwargs=({},),
    modalities=(["text"],),
    audio=(),
    functions=([],),
    function_call=("none", "auto"),
    reasoning_effort=("none",),
    verbosity=(),
    web_search_options=(),
    moderation=(),
)


class ChatRequest(Generation, UnusedOfChat):
    messages: Several(Message)
    max_completion_tokens: Count | None = Field(None, description="By default as many as the context has room for.")
    logprobs: bool | None = None
    top_logprobs: Integer(0, 20) | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = Field(
        None, description="Of vLLM's API: the answer continues a last message of the assistant, as by default."
    )
    add_generation_prompt: bool | None = Field(None, description="Of vLLM's API: the opposite.")

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def drop_prompt(self) -> None:
        """Frees its memory."""
        self.messages.clear()

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.calls_tools and self.ignore_eos:
            raise PydanticCustomError("ignore_eos", "ignore_eos: an answer that may call tools ends where its calls do")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise PydanticCustomError("tool_choice", "tool_choice needs tools")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens differ: send one of them")
        continued = self.messages[-1].role == "assistant"
        if self.continue_final_message is (not continued) or self.add_generation_prompt is continued:
            raise PydanticCustomError(
                "continue_final_message",
                "the answer continues the last message if that is the assistant's: with such a message send "
                "continue_final_message true and add_generation_prompt false, else the opposite, or send neither",
            )
        return self


TEXT_TOKENS = 16  # of a text completion; OpenAI's default


class TextRequest(Generation, Unused(best_of=(1,), suffix=("",))):
    """Of `/v1/completions`."""

    prompt: str | Several(str) | Tokens | Several(Tokens)
    max_tokens: Count | None = Field(None, description="16 by default, as OpenAI's.")
    logprobs: Integer(0, 20) | None = None
    echo: bool | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens or TEXT_TOKENS

    @property
    def answers(self) -> int:
        return (self.n or 1) * len(self.prompts())

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Texts, or token ids."""
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt

    def drop_prompt(self) -> None:
        """Frees its memory."""
        self.prompt = ""

    @model_validator(mode="after")
    def _agree(self) -> "TextRequest":
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError("echo", "echo with logprobs: the tokens of a prompt have no log-probabilities")
        return self


class Tokenize(Unused(add_generation_prompt=(True,), return_token_strs=(False,))):
    """Of vLLM's `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Several(Message) | None = None
    add_special_tokens: bool | None = Field(None, description="For `prompt`; true by default.")

    @model_validator(mode="after")
    def _agree(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "send either prompt or messages")
        return self


class Detokenize(Strict):
    """Of vLLM's `/detokenize`."""

    model: str | None = None
    tokens: Tokens
