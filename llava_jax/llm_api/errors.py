"""The errors of a request: transient (another try may succeed), of one prompt, or of every request (`UserError`)."""

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

REFUSED, SERVER_ERROR = "refused-by-server", "server-error"  # reasons of `Refused`: permanent, transient
MAX_MESSAGE = 300  # characters of a server's message
UNKNOWN = 500  # the status of an error that gives none: transient
PERMANENT = (401, 402, 403, 404, 405)  # for every request: the key, the credit, the model or the address is wrong
TRANSIENT = (408, 409, 425)  # and all from 500 on
NO_CREDIT = "insufficient_quota"  # the code of a 429 that waiting does not help
FILTER = re.compile(
    r"content.?(filter|policy|management)|moderation|flagged|data.?inspection|inappropriate content|safety system",
    re.IGNORECASE,
)
WRONG = re.compile(
    r"invalid_(request|argument)|context[_ ]length|unsupported|not supported|unrecognized|not permitted", re.IGNORECASE
)
RATE = re.compile(
    rf"rate[_ ]?limit|too many requests|resource_exhausted|overloaded|throttl|qps|{NO_CREDIT}|\b429\b", re.IGNORECASE
)
CODES = ("code", "status", "status_code", "statusCode", "http_code", "http_status")  # fields that may hold a status
STATUS = re.compile(r"[45][0-9]{2}(?:\.0)?")
MESSAGES = ("message", "msg", "detail", "error_msg", "status_msg")
WRAPPERS = ("error", "errors", "base_resp", "message")  # fields that may hold the error; base_resp is MiniMax's


class Refusal(NamedTuple):
    """A rate limit error (429): seconds to wait, if given, and whether tokens, not requests, were too many."""

    retry_after: float | None
    of_tokens: bool = False


class TransientError(Exception):
    """A try without an answer; another may bring one.

    Attributes:
      charged: whether the server may have charged the try.
      refusal: set if the request came too early for the server's rate limit.
    """

    def __init__(self, error: object, charged: bool = False, refusal: Refusal | None = None):
        super().__init__(_short(error))
        self.charged, self.refusal = charged, refusal


class Refused(Exception):
    """The server does not take this prompt, or fails at it again and again, while it answers others."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class ServerError(Exception):
    """An error that the server reports, wherever it stands in the reply.

    Attributes:
      filtered: a filter stops this prompt.
      rate_limited: the server asks to wait.
      transient: another try may succeed.
      permanent: every request has this error.
      charged: whether the server may have charged the request, since a part of the answer had come.
      headers: of the response.
    """

    def __init__(self, status: int, message: str, code: object = None, parameter: object = None):
        super().__init__(f"status {status}: {_short(message)}")
        self.status, self.code, self.parameter = status, str(code or ""), str(parameter or "")
        self.filtered = status in (400, 403) and bool(FILTER.search(f"{self.code} {self}"))
        self.rate_limited = status == 429 and self.code != NO_CREDIT
        self.transient = status >= 500 or status in TRANSIENT
        self.permanent = status in PERMANENT and not self.filtered or self.code == NO_CREDIT
        self.charged = False
        self.headers: Mapping[str, str] = {}

    @property
    def refusal(self) -> Refusal:
        """The rate limit error, where it is one."""
        of_tokens = self.headers.get("x-ratelimit-remaining-tokens") == "0" or "tokens per min" in str(self)
        return Refusal(retry_after(self.headers), of_tokens)


def server_error(error: Any, status: int | None = None) -> ServerError:
    """An error from its JSON: a text, or an object with `message`, `code` and `param`, which others may wrap."""
    error = _flat(error)
    message = next((error[name] for name in MESSAGES if error.get(name)), None) or json.dumps(error)
    raw = error["metadata"].get("raw") if isinstance(error.get("metadata"), Mapping) else None  # OpenRouter's provider
    message = f"{message} ({raw})" if raw else str(message)
    code = NO_CREDIT if NO_CREDIT in (error.get("code"), error.get("type")) else error.get("code")
    return ServerError(status or _status(error, message), message, code, error.get("param"))


def _flat(error: Any) -> Mapping[str, Any]:
    """The fields of an error and of the objects that wrap it; inner ones win."""
    error = unlisted(error)
    if not isinstance(error, Mapping):
        return {"message": str(error)}
    for name in WRAPPERS:
        if isinstance(inner := unlisted(error.get(name)), Mapping):
            return _flat({field: value for field, value in error.items() if field != name} | dict(inner))
    return {"message": error["error"], **error} if isinstance(error.get("error"), str) else error


def _status(error: Mapping[str, Any], message: str) -> int:
    """The HTTP status that an error stands for."""
    for name in CODES:
        if STATUS.fullmatch(str(error.get(name))):
            return int(float(error[name]))
    words = " ".join(str(error.get(name)) for name in ("code", "type", "status", "error")) + f" {message}"
    if RATE.search(words):
        return 429
    return 400 if FILTER.search(words) or WRONG.search(words) else UNKNOWN


def unlisted(value: Any) -> Any:
    """The value of a list of one, as Google's servers send errors."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from the headers of a response: milliseconds, seconds or a date. None if not given."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    date = email.utils.parsedate_tz(headers.get("retry-after"))
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def _short(message: object) -> str:
    return " ".join(str(message).split())[:MAX_MESSAGE]
