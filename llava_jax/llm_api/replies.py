"""What servers reply with status 200: a completion, or an error that some gateways send in its place."""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_jax.files.reading import loads
from llava_jax.llm_api.cost import Message, estimate_tokens, most_tokens
from llava_jax.llm_api.ledger import CUT_OFF, FILTERED, Answer
from llava_jax.llm_api.limits import Refusal

LONGEST = 300  # characters of what a server says
UNKNOWN = 500  # the status of an error that tells none: another try may do
PERMANENT = (401, 402, 403, 404, 405)  # the same for every request: key, credit, model or address are wrong
TRANSIENT = (408, 409, 425)  # and all from 500 on
NO_CREDIT = "insufficient_quota"  # the code of a 429 that waiting does not help
BROKEN = ("error", "abort", "cancelled")  # finish reasons of answers that the server gave up
FINISH_REASONS = {
    **dict.fromkeys(("max_tokens", "model_length", "max_output_tokens"), CUT_OFF),
    **dict.fromkeys(("refusal", "safety", "image_safety", "prohibited_content", "blocklist", "spii", "recitation",
                     "content_filtered", "guardrail_intervened"), FILTERED),
}  # fmt: skip
FILTER = re.compile(
    r"content.?(filter|policy|management)|moderation|flagged|data.?inspection|inappropriate content|safety system",
    re.IGNORECASE,
)
WRONG = (
    "invalid_request", "invalid_argument", "context_length", "context length", "unsupported", "not supported",
    "unrecognized", "not permitted",
)  # fmt: skip
RATE = (
    "rate limit", "rate_limit", "ratelimit", "too many requests", "resource_exhausted", "overloaded", "throttl", "qps",
)  # fmt: skip
CODES = ("code", "status", "status_code", "statusCode", "http_code", "http_status")  # fields that may have a status
STATUS = re.compile(r"[45][0-9]{2}(?:\.0)?")
MESSAGES = ("message", "msg", "detail", "error_msg", "status_msg")
WITHIN = ("error", "errors", "base_resp", "message")  # fields whose object is the error; base_resp is MiniMax's


class NoAnswer(Exception):
    """A try that brought no answer; another may. `charged` if what it cost is not known."""

    def __init__(self, error: object, charged: bool = False, refusal: Refusal | None = None):
        super().__init__(" ".join(str(error).split())[:LONGEST])
        self.charged, self.refusal = charged, refusal


class ServerError(Exception):
    """An error by the server, wherever it stands in its reply.

    Attributes:
      filtered: it is about this prompt, which a filter stops.
      of_rate: it asks to wait.
      transient: another try may do.
      permanent: every request has it.
    """

    def __init__(self, status: int, message: str, code: object = None, parameter: object = None):
        super().__init__(f"status {status}: {' '.join(message.split())[:LONGEST]}")
        self.status, self.code, self.parameter = status, str(code or ""), str(parameter or "")
        self.filtered = status in (400, 403) and bool(FILTER.search(f"{self.code} {self}"))
        self.of_rate = status == 429 and self.code != NO_CREDIT
        self.transient = status >= 500 or status in TRANSIENT
        self.permanent = status in PERMANENT and not self.filtered or self.code == NO_CREDIT


def server_error(error: Any, status: int | None = None) -> ServerError:
    """An error from its JSON: a text, or an object of `message`, `code` and `param`, which may lie in others."""
    error = _flat(error)
    message = next((error[name] for name in MESSAGES if error.get(name)), None) or json.dumps(error)
    raw = error["metadata"].get("raw") if isinstance(error.get("metadata"), Mapping) else None  # of OpenRouter's source
    message = f"{message} ({raw})" if raw else str(message)
    code = NO_CREDIT if NO_CREDIT in (error.get("code"), error.get("type")) else error.get("code")
    return ServerError(status or _status(error, message), message, code, error.get("param"))


def _flat(error: Any) -> Mapping[str, Any]:
    """The fields of an error and of what it lies in, of which the inner ones count."""
    error = _unlisted(error)
    if not isinstance(error, Mapping):
        return {"message": str(error)}
    for name in WITHIN:
        if isinstance(inner := _unlisted(error.get(name)), Mapping):
            return _flat({field: value for field, value in error.items() if field != name} | dict(inner))
    return {"message": error["error"], **error} if isinstance(error.get("error"), str) else error


def _status(error: Mapping[str, Any], message: str) -> int:
    """The status of HTTP that an error stands for."""
    for name in CODES:
        if STATUS.fullmatch(str(error.get(name))):
            return int(float(error[name]))
    words = " ".join(str(error.get(name)) for name in ("code", "type", "status", "error")) + f" {message}"
    if any(word in words.lower() for word in (*RATE, NO_CREDIT)) or re.search(r"\b429\b", words):
        return 429
    return 400 if FILTER.search(words) or any(word in words.lower() for word in WRONG) else UNKNOWN


def _unlisted(value: Any) -> Any:
    """Google's servers put an error into a list."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def read_json(content: bytes) -> Any:
    """The JSON of a reply. Raises `NoAnswer` where it is none, or `ServerError` where it is a page for people."""
    try:
        return loads(content, strict=False)
    except ValueError as error:
        if content.lstrip()[:1] == b"<":
            page = " ".join(content.decode(errors="replace").split())
            raise ServerError(UNKNOWN, f"an HTML page, no answer; is the path of the URL right? {page}") from error
        raise NoAnswer(f"the answer is no JSON: {error}", charged=True) from error


def read_completion(completion: Any, messages: Sequence[Message], most: int) -> Answer:
    """The answer in a chat completion's JSON, with estimates where the server's count of tokens cannot be true.

    `most` tokens were allowed, 0 for any number. Raises `NoAnswer` where there is no answer, `ServerError` where there
    is an error in its place.
    """
    completion = _unlisted(completion)
    _check(completion)
    try:
        choice = completion["choices"][0]
        text, refusal = _text(choice["message"].get("content")), choice["message"].get("refusal")
        finish_reason = str(choice.get("finish_reason") or "stop").lower().partition(":")[0]  # "content_filter: SAFETY"
        finish_reason = FINISH_REASONS.get(finish_reason, finish_reason)
        if not text and refusal:
            text, finish_reason = str(refusal), FILTERED
    except (LookupError, TypeError, AttributeError) as error:
        raise NoAnswer(f"the answer is no chat completion: {json.dumps(completion)[:100]}", charged=True) from error
    most = most or sys.maxsize
    usage = completion.get("usage")
    if _possible(usage, text, most_tokens(messages), most):
        return Answer(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"])
    written = min(estimate_tokens([{"content": text or ""}]), most)
    return Answer(text, finish_reason, estimate_tokens(messages), written, "estimated")


def whole_completion(chunks: Iterable[Any]) -> dict[str, Any]:
    """The completion that was sent in chunks. Raises as `read_completion`."""
    texts: list[str] = []
    refusals: list[str] = []
    finish_reason, usage = None, None
    for chunk in chunks:
        _check(chunk)
        try:
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                texts += [text] if (text := _text(delta.get("content"))) is not None else []
                refusals += [delta["refusal"]] if delta.get("refusal") else []
                finish_reason = choice.get("finish_reason") or finish_reason
        except (LookupError, TypeError, AttributeError) as error:
            raise NoAnswer(f"the stream has no chunk of an answer: {json.dumps(chunk)[:100]}", charged=True) from error
    if finish_reason is None:
        raise NoAnswer("the stream was cut", charged=True)
    message = {"content": "".join(texts) if texts else None, "refusal": "".join(refusals)}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}


def _check(completion: Any) -> None:
    """Raises `ServerError` where a completion, or its choice, is or has an error."""
    if not isinstance(completion, Mapping):
        return
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    has_error = any(completion.get(name) for name in ("error", "errors"))
    if has_error or completion.get("object") == "error" or not choices and completion.keys() & {*MESSAGES, *CODES}:
        raise server_error({name: value for name, value in completion.items() if name != "choices"})
    if not choices and completion.get("base_resp"):
        raise server_error(completion["base_resp"])
    if choice.get("error"):
        raise server_error(choice["error"])
    if choice.get("finish_reason") in BROKEN:
        raise ServerError(UNKNOWN, f"the server gave up the answer (finish_reason {choice['finish_reason']})")


def _text(content: Any) -> str | None:
    """The text of a message: its content, or the parts of it that are text and not thinking."""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        texts = [part["text"] for part in parts if part.get("type", "text") in ("text", "output_text")]
        content = "".join(texts) if texts else None
    # Half surrogate pairs cannot be stored.
    return None if content is None else content.encode(errors="replace").decode()


def _possible(usage: Any, text: str | None, most_prompt: int, most_completion: int) -> bool:
    """Whether the server's count of tokens can be true."""
    if not isinstance(usage, dict):
        return False
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return False
    return 0 < prompt <= most_prompt and bool(text) <= completion <= most_completion
