"""The bodies of requests. That of `/v1/chat/completions` is the part of OpenAI's that this model can serve.

Fields that would change the answer in a way that is not supported are refused by name, never ignored. Fields without
influence on the answer are accepted.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16  # of `n`
MAX_ITEMS = 1024  # messages of a request, parts of a message

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


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class ImageURL(Strict):
    url: str = Field(description="A data URL; http(s) where the server allows it.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; all images have one size."
    )


def _as_image_url(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise PydanticCustomError("image_url", 'has to be {"url": ...} or the URL alone')
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_as_image_url, json_schema_input_type=ImageURL | str)] = Field(
        description='`{"url": ...}`, or the URL alone.'
    )
    prompt_cache_breakpoint: Ignored = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def Several(item: Any) -> Any:
    """The type of a list, validated up to its first invalid item."""
    return Annotated[list[item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


Texts = Several(TextPart)


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: str | Texts
    name: Only() = None


class UserMessage(Strict):
    role: Literal["user"]
    content: str | Several(Part)
    name: Only() = None


class AssistantMessage(Strict):
    """The `message` of a response may be sent back as it is."""

    role: Literal["assistant"]
    content: str | Texts
    name: Only() = None
    refusal: Only() = None
    audio: Only() = None
    annotations: Only([]) = None
    function_call: Only() = None
    tool_calls: Only([]) = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


StopString = Annotated[str, Field(min_length=1, max_length=256)]
Count = Integer(1, 2**31 - 1)
# Any of 64 bits, also as JavaScript writes it: JSON.stringify(-(2 ** 63)) is -9223372036854776000.
Seed = Integer(-(10**20), 10**20)


class LoadRequest(Strict):
    """Of vLLM's `/v1/load_lora_adapter`."""

    lora_name: str
    lora_path: str = Field(description="Below the server's --adapter-directory.")
    load_inplace: Only(False) = None
    is_3d_lora_weight: Only(False) = None


class UnloadRequest(Strict):
    """Of vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str
    lora_int_id: Only() = None


class ChatRequest(Strict):
    model: str
    messages: Several(Message)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Integer(1, MAX_CHOICES) | None = None
    max_completion_tokens: Count | None = Field(None, description="By default as many as the context has room for.")
    max_tokens: Count | None = Field(None, description="The older name of `max_completion_tokens`.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="1 by default; 0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Integer(-1, 2**31 - 1) | None = Field(
        None, description="Not in OpenAI's API: sample among this many most likely tokens; 0 and -1 for all."
    )
    seed: Seed | None = Field(None, description="By default another each time.")
    stop: StopString | Annotated[list[StopString], Field(max_length=4, fail_fast=True)] | None = None
    logprobs: bool | None = None
    top_logprobs: Integer(0, 20) | None = None
    continue_final_message: bool | None = Field(
        None, description="Of vLLM's API: the answer continues a last message of the assistant, as by default."
    )
    add_generation_prompt: bool | None = Field(None, description="Of vLLM's API: the opposite.")

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None
    parallel_tool_calls: Ignored = None

    frequency_penalty: Only(0) = None
    presence_penalty: Only(0) = None
    repetition_penalty: Only(1) = None
    min_p: Only(0) = None
    logit_bias: Only({}) = None
    response_format: Only({"type": "text"}) = None
    modalities: Only(["text"]) = None
    audio: Only() = None
    tools: Only([]) = None
    tool_choice: Only("none", "auto") = None
    functions: Only([]) = None
    function_call: Only("none", "auto") = None
    reasoning_effort: Only("none") = None
    verbosity: Only() = None
    web_search_options: Only() = None
    moderation: Only() = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream to be true")
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
